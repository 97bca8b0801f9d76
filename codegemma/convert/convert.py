"""Any checkpoint of the family in, any out, with a proof: convert, verify, inspect, and what other programs need."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from codegemma import files, hub, prompts
from codegemma.checkpoints import (
    TAUGHT,
    Checkpoint,
    format_of,
    gguf,
    keras,
    nemo,
    open_checkpoint,
    orbax,
    torch,
)
from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints.table import BLOCKS, ELEMENTS, Deferred, Tensor, plain
from codegemma.convert.quantize import (
    CHUNK,
    QUANTISED,
    Cost,
    Importance,
    blocks,
    chosen,
    importance_of,
    rows_float32,
)
from codegemma.files import building
from codegemma.generate.engine import Engine
from codegemma.native import Native

Target = Literal["gguf", "safetensors", "orbax", "keras", "nemo", "gemma_pytorch"]
Program = Literal["ollama", "lmstudio", "llamacpp", "transformers", "nemo"]
Progress = Callable[[int, int], None]  # bytes read so far, and of all
SUFFIXES: dict[str, Target] = {".gguf": "gguf", ".nemo": "nemo"}
KEPT_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Converted:
    path: Path
    format: Target
    costs: list[Cost]  # of each matrix whose type changed


def convert(
    source: str | Path,
    target: Path,
    to: Target | None = None,
    *,
    quantize_to: str | None = None,
    dtype: str | None = None,
    importance: Importance | Path | None = None,
    overwrite: bool = False,
    merge: Callable[[Checkpoint], Checkpoint] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model (a name, or a path of any format) in another format, tensor by tensor.

    The types of the source are kept, except that formats without blocks get bfloat16 for blocks. `dtype` ("bf16",
    "f16", "f32") changes them; `quantize_to` (GGUF only) makes blocks, weighed by `importance` (its file, or texts to
    measure it on); `merge` is applied to the opened model, such as an adapter's. The target appears only when it is
    complete; interrupted quantisation is gone on with. Raises ValueError naming what is wrong and what to do.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    to = to or SUFFIXES.get(target.suffix)
    if to is None or to not in get_args(Target):
        raise ValueError(f"{target} does not say its format: pass --to {', '.join(get_args(Target))}")
    if quantize_to and (to != "gguf" or dtype):
        raise ValueError(
            f"--quantize makes GGUF blocks, which {to if to != 'gguf' else 'dtype ' + str(dtype)} cannot hold: "
            "use --to gguf alone, or --dtype"
        )
    if importance and not quantize_to:
        raise ValueError(
            "importance weighs the columns that --quantize rounds: pass --quantize too, or neither"
        )
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: choose another name, or pass --overwrite")
    checkpoint = merge(checkpoint) if merge else checkpoint
    wanted = _wanted(checkpoint, to, quantize_to, dtype)
    stamp = None if merge or not quantize_to else _stamp(checkpoint, quantize_to, importance)
    if isinstance(importance, Path):
        importance = importance_of(importance, checkpoint)
    sums: dict[str, tuple[float, float]] = {}
    tensors = {
        name: _typed(name, tensor, wanted[name], importance or {}, sums)
        for name, tensor in checkpoint.tensors.items()
    }
    files.sweep(target)
    _room(target, sum(tensor.nbytes for tensor in tensors.values()))
    if target.exists() and overwrite:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    written = replace(checkpoint, tensors=_watched(tensors, progress))
    if to in ("gguf", "nemo"):
        save(to, target, written, stamp)
    else:
        with building(target) as directory:
            save(to, directory, written)
    costs = [
        Cost(name, checkpoint.tensors[name].type, wanted[name], math.sqrt(wrong / size) if size else 0.0)
        for name, (wrong, size) in sums.items()
    ]
    return Converted(target, to, costs)


def save(to: Target, path: Path, made: Checkpoint, stamp: str | None = None) -> None:
    tokenizer, template = made.tokenizer, chat_template(made)
    model = tokenizer.model if tokenizer else None
    match to:
        case "gguf":
            gguf.save(path, made.config, made.tensors, tokenizer, _kept(made), title(made), template, stamp)
        case "nemo":
            nemo.save(path, made.config, made.tensors, model)
        case "keras":
            keras.save(path, made.config, made.tensors, model)
        case "safetensors":
            safetensors.save(
                path, made.config, made.tensors, tokenizer, template, _stops(made), _taught(made)
            )
            if made.path.is_dir() and format_of(made.path) in ("safetensors", "torch"):
                for pattern in KEPT_FILES:
                    for file in made.path.glob(pattern):
                        shutil.copyfile(file, path / file.name)
        case "orbax" | "gemma_pytorch":
            (orbax if to == "orbax" else torch).save(path, made.config, made.tensors)
            (path / "config.json").write_text(
                json.dumps(safetensors.config_fields(made.config) | _taught(made), indent=2) + "\n"
            )
            if model:
                (path / "tokenizer.model").write_bytes(model)
    if to not in ("gguf", "nemo"):
        (path / "NOTICE").write_text(hub.NOTICE)


def _wanted(checkpoint: Checkpoint, to: Target, quantize_to: str | None, dtype: str | None) -> dict[str, str]:
    """The type that each tensor gets."""
    if dtype and dtype.upper() not in ("BF16", "F16", "F32"):
        raise ValueError(f"dtype must be bf16, f16 or f32, got {dtype!r}")
    if quantize_to:
        return chosen(quantize_to, checkpoint)
    return {
        name: dtype.upper() if dtype else "BF16" if to != "gguf" and tensor.type in QUANTISED else tensor.type
        for name, tensor in checkpoint.tensors.items()
    }


def _stamp(checkpoint: Checkpoint, quantize_to: str, importance: Importance | Path | None) -> str:
    """All that a quantised file depends on."""
    files = [checkpoint.path] if checkpoint.path.is_file() else sorted(checkpoint.path.rglob("*"))
    if isinstance(importance, Path):
        files += [importance] if importance.is_file() else sorted(importance.rglob("*"))
    weights = {} if importance is None or isinstance(importance, Path) else importance
    return repr(
        [
            quantize_to,
            *((str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            *((name, values.tobytes()) for name, values in weights.items()),
        ]
    )


def _typed(
    name: str, tensor: Tensor, type: str, importance: Importance, sums: dict[str, tuple[float, float]]
) -> Tensor:
    """The tensor in another type, made when it is written; `sums` gets the squared norms of error and weights."""

    def quantised(rows: Tensor) -> np.ndarray:
        try:
            made, wrong, size = blocks(rows, type, importance.get(name))
        except ValueError as fault:
            raise ValueError(f"tensor {name} {fault}") from None
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + wrong, before[1] + size
        return made

    if len(tensor.shape) == 1 or type == tensor.type:
        return tensor
    return _by_rows(tensor, type, quantised if type in QUANTISED else lambda rows: _cast(name, rows, type))


def _by_rows(tensor: Tensor, type: str, turn: Callable[[Tensor], np.ndarray]) -> Tensor:
    """A tensor that `turn` makes of this one, of some rows at a time where these can be had alone."""
    if isinstance(tensor, Deferred) and tensor.part is None:
        return Deferred(type, tensor.shape, lambda: turn(tensor.rows(0, tensor.shape[0])))
    return Deferred(type, tensor.shape, part=lambda start, stop: turn(tensor.rows(start, stop)))


def _cast(name: str, tensor: Tensor, type: str) -> np.ndarray:
    rows, columns = tensor.shape
    out, step = np.empty(tensor.shape, ELEMENTS[type]), max(1, CHUNK // columns)
    for start in range(0, rows, step):
        values = rows_float32(tensor, start, min(rows, start + step))
        if not np.isfinite(values).all() or type == "F16" and np.abs(values).max() > 65_504:
            raise ValueError(
                f"tensor {name} holds NaN, infinite or (for f16) too large weights: the model is damaged, "
                "or choose bf16"
            )
        out[start : start + step] = plain(type, values)
    return out


def _watched(tensors: Mapping[str, Tensor], progress: Progress | None) -> dict[str, Tensor]:
    """The same tensors; as each is read, progress is told, and what was read before leaves the memory."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def watched(rows: Tensor) -> np.ndarray:
        nonlocal done
        files.let_go()
        done += rows.nbytes
        if progress:
            progress(done, total)
        return rows.data

    return {
        name: tensor if len(tensor.shape) == 1 else _by_rows(tensor, tensor.type, watched)
        for name, tensor in tensors.items()
    }


def _room(target: Path, size: int) -> None:
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < size * 1.02 + (64 << 20):
        raise ValueError(
            f"{target} takes {size / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free: make room, or "
            "choose another disk"
        )


def title(checkpoint: Checkpoint) -> str:
    """What a model is called: by its own header, else as the family does, else as its file."""
    named = checkpoint.metadata.get("general.name")
    known = hub.preset_in(checkpoint.path.name, checkpoint.config)
    return str(named) if named else known.title if known else checkpoint.path.stem


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The template that came with a model, else Gemma's where the model was made to chat."""
    stated = checkpoint.metadata.get("tokenizer.chat_template")
    if stated is None and checkpoint.path.is_dir():
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            if (file := checkpoint.path / name).exists():
                stated = stated or (
                    file.read_text()
                    if name.endswith("jinja")
                    else safetensors.read_json(file).get("chat_template")
                )
    known = next(
        filter(
            None,
            (
                hub.preset_in(name, checkpoint.config)
                for name in (title(checkpoint), checkpoint.path.name, checkpoint.path.parent.name)
            ),
        ),
        None,
    )
    if isinstance(stated, str):
        return stated
    return safetensors.CHAT_TEMPLATE if known and "chat" in known.uses else None


def _stops(checkpoint: Checkpoint) -> list[int]:
    return sorted(prompts.fim_stops(checkpoint.tokenizer)) if checkpoint.tokenizer else []


def _kept(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of a GGUF header that a new file keeps: what it says of itself and its vocabulary."""
    return {
        key: value
        for key, value in checkpoint.metadata.items()
        if key.startswith(("general.", "tokenizer."))
        and format_of(checkpoint.path) == "gguf"
        and key not in ("general.architecture", "general.alignment")
    } | _taught(checkpoint)


def _taught(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.metadata.items() if key == TAUGHT}


# ---------------------------------------------------------------------------------------------------------- verify
# The root mean square of a tensor's error over that of the tensor: half a unit in the last place, and for blocks about
# twice what normally distributed weights lose (tests/test_quantize.py measures them).
MOST_ERROR = {
    "F32": 1e-7,
    "F16": 2.0**-11,
    "BF16": 2.0**-9,
    "Q8_0": 0.012,
    "Q6_K": 0.04,
    "Q5_K": 0.09,
    "Q5_1": 0.09,
    "Q5_0": 0.1,
    "Q4_K": 0.16,
    "Q4_1": 0.17,
    "Q4_0": 0.19,
}
CONTEXT = 256  # tokens of a text that are compared
MOST_KL = 100.0  # nats, times the square of the largest relative error
TEXTS = (
    'def fibonacci(n: int) -> int:\n    """The n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    '#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++)\n\t\tprintf("%d\\n", i * i);\n}\n',
    "SELECT name, COUNT(*) FROM users WHERE age >= 21 GROUP BY name;\n-- größer, 日本語, 🙂\n",
    "<start_of_turn>user\nWhat does <|fim_prefix|> mean?<end_of_turn>\n",
)


@dataclass(frozen=True)
class Proof:
    """What a comparison of two checkpoints found; `faults` is empty where the target is as good as its types allow."""

    errors: dict[str, float]  # by tensor: relative root mean square
    identical: int  # tensors without any
    same_ids: bool | None  # None where one of them has no tokenizer
    largest: float = 0.0  # of the differences of logits
    mean: float = 0.0
    kl: float = 0.0  # mean KL(source || target), nats
    agreement: float = 1.0  # share of equal top tokens
    faults: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The table that `codegemma verify` prints."""
        worst = max(self.errors, key=self.errors.__getitem__, default="")
        ids = {True: "equal on all texts", False: "different", None: "not compared: a tokenizer is missing"}[
            self.same_ids
        ]
        yield f"tensors          {len(self.errors)}, of which {self.identical} identical"
        yield f"largest error    {self.errors.get(worst, 0.0):.3%} of the weights' norm{f' ({worst})' if worst else ''}"
        yield f"token ids        {ids}"
        yield f"logits           differ by at most {self.largest:.3g}, on average {self.mean:.3g}"
        yield f"KL divergence    {self.kl:.3g} nats per token"
        yield f"same top token   {self.agreement:.1%}"
        yield from (f"FAULT            {fault}" for fault in self.faults)


def verify(
    source: str | Path, target: str | Path, texts: tuple[str, ...] = TEXTS, threads: int | None = None
) -> Proof:
    """Compares two checkpoints tensor by tensor, then their ids and logits on fixed texts."""
    left, right = (open_checkpoint(hub.resolve(path)) for path in (source, target))
    faults: list[str] = []
    same = {**vars(left.config), "context": 0} == {**vars(right.config), "context": 0}
    if not same:
        return Proof({}, 0, None, faults=[f"the configs differ: {left.config} and {right.config}"])
    errors = {name: _error(tensor, right.tensors[name]) for name, tensor in left.tensors.items()}
    for name, error in errors.items():
        type = right.tensors[name].type
        most = MOST_ERROR[type] if len(right.tensors[name].shape) == 2 else 2.0**-8
        if not error <= most:
            faults.append(f"{name} ({type}) differs by {error:.2%}, but {type} allows {most:.2%}")
    encoded = [_ids(checkpoint, texts) for checkpoint in (left, right)]
    same_ids = None if None in encoded else encoded[0] == encoded[1]
    if same_ids is False:
        faults.append("the tokenizers give different ids for the same texts, or differ in their control ids")
    rows = encoded[0] or [[2, *(97 + 31 * i % (left.config.vocab - 97) for i in range(64))]]
    rows = [list(ids) for ids in dict.fromkeys(tuple(ids[:CONTEXT]) for ids in rows)]
    blocks = any(tensor.type in QUANTISED for model in (left, right) for tensor in model.tensors.values())
    worst = max(
        *errors.values(), MOST_ERROR["Q8_0"] * blocks
    )  # with blocks, activations are rounded to 8 bits too
    proof = _compared(_logits(left, rows, threads), _logits(right, rows, threads), worst, faults)
    return replace(
        proof, errors=errors, same_ids=same_ids, identical=sum(error == 0 for error in errors.values())
    )


def _error(left: Tensor, right: Tensor) -> float:
    wrong, size, same = 0.0, 0.0, left.type == right.type
    for one, other in zip(left.pieces(), right.pieces(), strict=True):
        one, other = (Tensor(piece.type, piece.shape, piece.data) for piece in (one, other))
        same = same and np.array_equal(one.data, other.data)
        a, b = (
            piece.float32() if len(piece.shape) == 1 else rows_float32(piece, 0, piece.shape[0])
            for piece in (one, other)
        )
        size += float(np.vdot(a, a))
        a = a - b
        wrong += float(np.vdot(a, a))
        files.let_go()
    return 0.0 if same else math.sqrt(wrong / size) if size else math.sqrt(wrong)


def _ids(checkpoint: Checkpoint, texts: tuple[str, ...]) -> list[list[int]] | None:
    """Ids of the texts, with control tokens spelled in them and without; the control ids themselves; a FIM prompt."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return None
    rows = [
        [tokenizer.control.bos or 0, *tokenizer.encode(text, control=control)]
        for text in texts
        for control in (False, True)
    ]
    if tokenizer.control.fim:
        rows.append(prompts.fim(tokenizer, texts[0], "\n", "a/b.py").ids)
    return [*rows, [token if isinstance(token, int) else 0 for token in vars(tokenizer.control).values()]]


def _logits(checkpoint: Checkpoint, rows: list[list[int]], threads: int | None) -> Iterator[np.ndarray]:
    """float32 [T, V] for each row of ids."""
    engine = Engine(Native(checkpoint, threads), None, "verify", 0)
    return (engine.logits(ids) for ids in rows)


def _compared(
    left: Iterator[np.ndarray], right: Iterator[np.ndarray], worst: float, faults: list[str]
) -> Proof:
    largest, total, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    for a_TV, b_TV in zip(left, right, strict=True):
        for a_V, b_V in zip(a_TV, b_TV, strict=True):
            a_V, b_V = a_V.astype(np.float64), b_V.astype(np.float64)
            difference = a_V - b_V
            both = np.abs(difference)
            largest, total = max(largest, float(both.max())), total + float(both.mean())
            e_V, sums = np.exp(a_V - a_V.max()), np.exp(b_V - b_V.max()).sum()
            # sum of p log(p / q), where log p = a - max a - log sum exp
            kl += float(
                e_V @ difference / e_V.sum() - (a_V.max() + np.log(e_V.sum())) + (b_V.max() + np.log(sums))
            )
            agree, count = agree + int(a_V.argmax() == b_V.argmax()), count + 1
    kl /= count
    if not kl <= (most := 1e-9 + MOST_KL * worst**2):
        faults.append(
            f"the predictions differ by {kl:.2g} nats (KL), but errors of at most {worst:.2%} in the weights "
            f"explain {most:.2g}"
        )
    return Proof({}, 0, None, largest, total / count, kl, agree / count, faults)


# --------------------------------------------------------------------------------------------------------- inspect
@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, without running it. `types` counts matrices, `control` names the ids that steer."""

    path: Path
    format: str
    architecture: str
    config: dict[str, Any]
    parameters: int
    nbytes: int
    types: dict[str, int]
    vocabulary: int | None
    control: dict[str, Any]
    chat_template: str | None
    licence: str
    problems: list[str]

    def lines(self) -> Iterator[str]:
        """What `codegemma inspect` prints."""
        yield f"{self.path}: {self.format}, {self.architecture}, {self.parameters:,} parameters, {self.nbytes:,} bytes"
        yield "matrices      " + ", ".join(f"{count} {type}" for type, count in self.types.items())
        yield "config        " + ", ".join(
            f"{key} {value}" for key, value in self.config.items() if value is not None
        )
        yield "vocabulary    " + (
            "none"
            if self.vocabulary is None
            else f"{self.vocabulary:,} ids; "
            + ", ".join(f"{key} {value}" for key, value in self.control.items() if value is not None)
        )
        yield f"chat          {'has a template' if self.chat_template else 'no template'}"
        yield f"licence       {self.licence}"
        yield from (f"PROBLEM       {problem}" for problem in self.problems)


def inspect(source: str | Path) -> Inspection:
    """Reads header, tensors' places and tokenizer; no code in a file is ever run. Raises ValueError on a damaged one."""
    checkpoint = open_checkpoint(hub.resolve(source))
    tensors, tokenizer = checkpoint.tensors, checkpoint.tokenizer
    types = Counter(tensor.type for tensor in tensors.values() if len(tensor.shape) == 2)
    return Inspection(
        checkpoint.path,
        format_of(checkpoint.path),
        checkpoint.config.architecture,
        vars(checkpoint.config),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        checkpoint.nbytes,
        dict(types.most_common()),
        tokenizer.vocab_size if tokenizer else None,
        dict(vars(tokenizer.control)) if tokenizer else {},
        chat_template(checkpoint),
        str(checkpoint.metadata.get("general.license", "Gemma Terms of Use")),
        list(_problems(checkpoint)),
    )


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    tokenizer, header = checkpoint.tokenizer, checkpoint.metadata
    if tokenizer is None:
        yield "no tokenizer: ids work, text does not; put tokenizer.model beside it"
    else:
        if tokenizer.vocab_size > checkpoint.config.vocab:
            yield (
                f"the tokenizer has {tokenizer.vocab_size:,} ids, but the embedding {checkpoint.config.vocab:,} rows: "
                "they are of different models"
            )
        if tokenizer.control.fim != "named":
            yield "the vocabulary names no FIM tokens: it is no CodeGemma, unless an adapter taught it ids 67 to 70"
        separator = header.get("tokenizer.ggml.fim_sep_token_id", header.get("tokenizer.ggml.eot_token_id"))
        if "tokenizer.ggml.tokens" in header and separator != tokenizer.control.file_separator:
            yield "llama.cpp will not stop at the file separator: convert it again to add the key fim_sep_token_id"
    for name, tensor in checkpoint.tensors.items():
        if not _finite(tensor):
            yield f"tensor {name} holds NaN or infinite numbers: the file is damaged"


SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # where the float16 scales of a block lie


def _finite(tensor: Tensor) -> bool:
    files.let_go()
    if tensor.type in SCALES:
        return all(
            (
                np.ascontiguousarray(piece.data.reshape(-1, BLOCKS[piece.type][1])[:, at : at + 2]).view(
                    "<u2"
                )
                & 0x7C00
                != 0x7C00
            ).all()
            for piece in tensor.pieces()
            for at in SCALES[piece.type]
        )
    mask, kind = {"F32": (0x7F800000, "<u4"), "F16": (0x7C00, "<u2"), "BF16": (0x7F80, "<u2")}[tensor.type]
    return all(
        (np.ascontiguousarray(piece.data).view(kind) & mask != mask).all() for piece in tensor.pieces()
    )


# ---------------------------------------------------------------------------------------------------------- export
def export(
    program: Program,
    source: str | Path,
    target: Path,
    quantize_to: str | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes a model with what a program needs beside it, into a directory; returns the files."""
    if program not in get_args(Program):
        raise ValueError(f"no program {program!r}: choose {', '.join(get_args(Program))}")
    checkpoint = open_checkpoint(hub.resolve(source))
    name = title(checkpoint).lower().replace(" ", "-").replace("/", "-")
    if program == "transformers":
        convert(source, target, "safetensors", progress=progress)
    elif program == "nemo":
        convert(source, target / f"{name}.nemo", progress=progress)
    else:
        folder = target / "codegemma" / name if program == "lmstudio" else target
        convert(source, folder / f"{name}.gguf", quantize_to=quantize_to, progress=progress)
        if program == "ollama":
            (target / "Modelfile").write_text(modelfile(checkpoint, f"{name}.gguf"))
        elif program == "llamacpp":
            (target / "README.md").write_text(
                LLAMACPP.format(file=f"{name}.gguf", context=checkpoint.config.context)
            )
    (target / "NOTICE").write_text(hub.NOTICE)
    return sorted(file for file in target.rglob("*") if file.is_file())


LLAMACPP = """# llama.cpp

    llama-server -m {file} -c {context} --temp 0 --top-k 0 --repeat-penalty 1.0

`POST /infill` with `input_prefix` and `input_suffix` completes; the file names the FIM ids and ends at the separator.
A repeat penalty other than 1.0 damages Gemma's output.
"""


def modelfile(checkpoint: Checkpoint, file: str) -> str:
    """Ollama's: a template with `.Suffix` where the model fills in, with turns where it chats, and every stop."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer, which Ollama needs: put its tokenizer.model beside it"
        )
    control = tokenizer.control
    prefix, suffix, middle = (
        "" if token is None else tokenizer.piece(token)
        for token in (control.fim_prefix, control.fim_suffix, control.fim_middle)
    )
    plain_turn = "{{ .Prompt }}"
    if chat_template(checkpoint):
        plain_turn = (
            "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
            "<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
        )
    template = (
        f"{{{{- if .Suffix }}}}{prefix}{{{{ .Prompt }}}}{suffix}{{{{ .Suffix }}}}{middle}{{{{- else }}}}"
        f"{plain_turn}{{{{- end }}}}"
        if control.fim
        else plain_turn
    )
    stops = [tokenizer.piece(token) for token in _stops(checkpoint) if token != control.eos]
    return "\n".join(
        [
            f"FROM ./{file}",
            f'TEMPLATE """{template}"""',
            *(f'PARAMETER stop "{stop}"' for stop in stops),
            "PARAMETER repeat_penalty 1",
            "PARAMETER temperature 0",
            f'LICENSE """{hub.NOTICE}"""',
            "",
        ]
    )


def card(
    source: str | Path, results: Path | None = None, manifest: Path | None = None, changes: str = ""
) -> str:
    """A model card in the Hub's form, with scores (a folder of `codegemma eval`), data manifest, notice and changes."""
    found = inspect(source)
    name = title(open_checkpoint(found.path))
    scores = (
        {
            file.stem: json.loads(file.read_text())
            for file in sorted(results.glob("*.json"))
            if not file.name.endswith(".times.json")
        }
        if results
        else {}
    )
    if results and not scores:
        raise ValueError(f"{results} holds no finished benchmark: pass the --out of `codegemma eval run`")
    index = [
        {
            "name": name,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": task, "name": one["title"]},
                    "metrics": [
                        {"type": "score", "value": round(100 * one["score"], 2), "name": one["note"]}
                    ],
                }
                for task, one in scores.items()
            ],
        }
    ]
    lines = [
        "---",
        "license: gemma",
        "library_name: codegemma",
        "pipeline_tag: text-generation",
        "tags: [code, gemma]",
        *([f"model-index: {json.dumps(index)}"] if scores else []),
        "---",
        f"# {name}",
        "",
        f"{found.parameters:,} parameters, {found.architecture}, "
        + ", ".join(f"{count} matrices {type}" for type, count in found.types.items())
        + ".",
        "",
    ]
    if scores:
        lines += [
            "## Evaluation",
            "",
            "| benchmark | percent | 95 % | items | how |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['title']} | {100 * one['score']:.1f} | {100 * one['low']:.1f} - {100 * one['high']:.1f} | "
            f"{one['items']} | {one['note']} |"
            for one in scores.values()
        ] + [""]
    if manifest:
        lines += ["## Data", "", "```json", manifest.read_text().strip(), "```", ""]
    lines += [
        "## Licence",
        "",
        hub.NOTICE.strip(),
        "",
        "## Statement of changes",
        "",
        changes or f"Converted to {found.format} by codegemma; the weights were not trained further.",
    ]
    return "\n".join([*lines, ""])
