"""Compares two checkpoints of a model by tensors, token ids and predictions: `codegemma verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from codegemma import files, hub, prompts
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.checkpoints.tensors import ArrayTensor, Tensor
from codegemma.convert.quantize import QUANTISED, relative_error
from codegemma.native import PAGE, Native, Slice, dequantize

# The largest relative error (norm of the error over norm of the tensor) by type: half a unit in the last
# place for floats, and for blocks about twice the error of normally distributed weights, which
# tests/test_quantize.py measures (llama.cpp's own, of the types that we do not write).
MAX_ERROR = {"F32": 1e-7, "F16": 2.0**-11, "BF16": 2.0**-9, "Q8_0": 0.012, "Q6_K": 0.04}
MAX_ERROR |= {"Q5_K": 0.09, "Q5_1": 0.09, "Q5_0": 0.1, "Q4_K": 0.16, "Q4_1": 0.17, "Q4_0": 0.19}
MAX_ERROR |= {"IQ4_NL": 0.16, "IQ4_XS": 0.16, "MXFP4": 0.23, "Q3_K": 0.31, "Q2_K": 0.6}
MAX_NORM_ERROR = 2.0**-8  # relative error of vectors, which are the weights of norms
MAX_TOKENS = 256  # compared for each text; one run of the engine takes as many
MAX_KL = 100.0  # nats per square of the largest relative error
TEXTS = (
    'def fibonacci(n: int) -> int:\n    """The n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++)\n"
    '\t\tprintf("%d\\n", i * i);\n}\n',
    "SELECT name, COUNT(*) FROM users WHERE age >= 21 GROUP BY name;\n-- größer, 日本語, 🙂\n",
    "<start_of_turn>user\nWhat does <|fim_prefix|> mean?<end_of_turn>\n",
)
IDS_COMPARED = {True: "equal on all texts", False: "different", None: "not compared: a tokenizer is missing"}


@dataclass(frozen=True)
class Verification:
    """How two checkpoints differ; `faults` is empty where rounding to the target's types explains it."""

    errors: dict[str, float] = field(default_factory=dict)  # by tensor: relative error
    same_ids: bool | None = None  # None where a tokenizer is missing
    largest: float = 0.0  # absolute difference of logits
    mean: float = 0.0  # absolute difference of logits
    kl: float = 0.0  # mean KL(source || target), nats
    agreement: float = 1.0  # share of equal top tokens
    faults: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The lines that `codegemma verify` prints."""
        worst = max(self.errors, key=self.errors.__getitem__, default="")
        identical = sum(error == 0 for error in self.errors.values())
        name = f" ({worst})" if worst else ""
        yield f"tensors          {len(self.errors)}, of which {identical} identical"
        yield f"largest error    {self.errors.get(worst, 0.0):.3%} of the weights' norm{name}"
        yield f"token ids        {IDS_COMPARED[self.same_ids]}"
        yield f"logits           differ by at most {self.largest:.3g}, on average {self.mean:.3g}"
        yield f"KL divergence    {self.kl:.3g} nats per token"
        yield f"same top token   {self.agreement:.1%}"
        yield from (f"FAULT            {fault}" for fault in self.faults)


def verify(
    source: str | Path, target: str | Path, texts: tuple[str, ...] = TEXTS, threads: int | None = None
) -> Verification:
    """Compares two checkpoints tensor by tensor, then their token ids and logits for fixed texts.

    Differences are no errors: the result lists those that rounding does not explain as `faults`. Raises
    ValueError where a checkpoint cannot be opened.
    """
    left, right = (open_checkpoint(hub.resolve(path)) for path in (source, target))
    if {**vars(left.config), "context": 0} != {**vars(right.config), "context": 0}:
        return Verification(faults=[f"the configs differ: {left.config} and {right.config}"])
    faults, errors = [], {name: _error(tensor, right.tensors[name]) for name, tensor in left.tensors.items()}
    for name, error in errors.items():
        type = right.tensors[name].type
        limit = MAX_ERROR[type] if len(right.tensors[name].shape) == 2 else MAX_NORM_ERROR
        if not error <= limit:
            faults.append(f"{name} ({type}) differs by {error:.2%}, but {type} allows {limit:.2%}")
    left_ids, right_ids = (_ids(checkpoint, texts) for checkpoint in (left, right))
    same_ids = None if left_ids is None or right_ids is None else left_ids == right_ids
    if same_ids is False:
        faults.append("the tokenizers give different ids for the same texts, or differ in their control ids")
    rows = left_ids or [[2, *(97 + 31 * i % (left.config.vocab - 97) for i in range(64))]]
    rows = [list(ids) for ids in dict.fromkeys(tuple(ids[:MAX_TOKENS]) for ids in rows)]
    blocks = any(tensor.type in QUANTISED for model in (left, right) for tensor in model.tensors.values())
    worst = max(*errors.values(), MAX_ERROR["Q8_0"] * blocks)  # with blocks, activations have 8 bits too
    predictions = _compare(_logits(left, rows, threads), _logits(right, rows, threads))
    if not predictions.kl <= (limit := 1e-9 + MAX_KL * worst**2):
        rule = f"but errors of at most {worst:.2%} in the weights explain {limit:.2g}"
        faults.append(f"the predictions differ by {predictions.kl:.2g} nats (KL), {rule}")
    return replace(predictions, errors=errors, same_ids=same_ids, faults=faults)


def _error(left: Tensor, right: Tensor) -> float:
    """The relative error of the right tensor; 0 where both tensors hold the same bytes."""
    squared_error, squared_norm, same = 0.0, 0.0, left.type == right.type
    for pieces in zip(left.pieces(), right.pieces(), strict=True):
        a, b = (ArrayTensor(piece.type, piece.shape, piece.data) for piece in pieces)  # read once
        same = same and np.array_equal(a.data, b.data)
        values, others = (dequantize(piece) if len(piece.shape) == 2 else piece.float32() for piece in (a, b))
        difference = values - others
        squared_norm += float(np.vdot(values, values))
        squared_error += float(np.vdot(difference, difference))
        files.drop_mapped_pages()
    return 0.0 if same else relative_error(squared_error, squared_norm or 1.0)


def _ids(checkpoint: Checkpoint, texts: tuple[str, ...]) -> list[list[int]] | None:
    """Ids of each text (control tokens read as text, then as tokens) and of a FIM prompt; the control ids."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return None
    bos = tokenizer.control.bos or 0
    rows = [[bos, *tokenizer.encode(text, control=control)] for text in texts for control in (False, True)]
    if tokenizer.control.fim:
        rows.append(prompts.fim(tokenizer, texts[0], "\n", "a/b.py").ids)
    return [*rows, [token if isinstance(token, int) else 0 for token in vars(tokenizer.control).values()]]


def _logits(checkpoint: Checkpoint, rows: list[list[int]], threads: int | None) -> Iterator[np.ndarray]:
    """The logits of each row of at most MAX_TOKENS ids, float32 [T, V]; the next row overwrites them."""
    native = Native(checkpoint, threads)
    for ids in rows:
        logits = native.run([Slice(ids, 0, [native.new_page() for _ in range(0, len(ids), PAGE)], len(ids))])
        assert logits is not None  # nothing cancels it
        yield logits.values


def _compare(left: Iterator[np.ndarray], right: Iterator[np.ndarray]) -> Verification:
    """The differences between the logits of two models."""
    largest, mean, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    for a_TV, b_TV in zip(left, right, strict=True):
        for pair in zip(a_TV, b_TV, strict=True):
            a_V, b_V = (logits_V.astype(np.float64) for logits_V in pair)
            difference = a_V - b_V
            largest, mean = max(largest, float(abs(difference).max())), mean + float(abs(difference).mean())
            p_V, q_sum = np.exp(a_V - a_V.max()), np.exp(b_V - b_V.max()).sum()
            # sum of p log(p / q), where log p = a - max a - log sum exp(a - max a)
            left_lse, right_lse = a_V.max() + np.log(p_V.sum()), b_V.max() + np.log(q_sum)
            kl += float(p_V @ difference / p_V.sum() - left_lse + right_lse)
            agree, count = agree + int(a_V.argmax() == b_V.argmax()), count + 1
    return Verification(largest=largest, mean=mean / count, kl=kl / count, agreement=agree / count)
