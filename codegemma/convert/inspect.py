"""Describes and checks a checkpoint without running the model: `codegemma inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegemma import files, hub
from codegemma.checkpoints import Checkpoint, format_of, open_checkpoint
from codegemma.checkpoints.tensors import BLOCKS, Tensor
from codegemma.checkpoints.untrusted import read_json
from codegemma.convert import checksums
from codegemma.prompts import CHAT_TEMPLATE

# Exponent bits of a float, all set in NaN and infinity, and the type that reads them.
EXPONENTS = {
    "F32": (0x7F800000, "<u4"),
    "F16": (0x7C00, "<u2"),
    "BF16": (0x7F80, "<u2"),
    "E8M0": (0xFF, "u1"),
}
SCALE_OFFSETS = {  # of the scales in a block, in bytes: float16, but in MXFP4 a mere exponent
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint. `types` counts matrices by type; `control` holds the control token ids.

    `problems` are damage, `notes` what a sound file lacks.
    """

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
    notes: list[str]

    def lines(self) -> Iterator[str]:
        """The lines that `codegemma inspect` prints."""
        size = f"{self.parameters:,} parameters, {self.nbytes:,} bytes"
        yield f"{self.path}: {self.format}, {self.architecture}, {size}"
        yield "matrices      " + ", ".join(f"{count} {type}" for type, count in self.types.items())
        yield "config        " + _listed(self.config)
        ids = "none" if self.vocabulary is None else f"{self.vocabulary:,} ids; {_listed(self.control)}"
        yield "vocabulary    " + ids
        yield f"chat          {'has a template' if self.chat_template else 'no template'}"
        yield f"licence       {self.licence}"
        yield from (f"note          {note}" for note in self.notes)
        yield from (f"PROBLEM       {problem}" for problem in self.problems)


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in fields.items() if value is not None)


def inspect(source: str | Path) -> Inspection:
    """Reads the header and the tokenizer, and checks all weights; runs no code from a file.

    Damage to weights is listed in `problems`. Raises ValueError on a file that cannot be opened.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    tensors, tokenizer = checkpoint.tensors, checkpoint.tokenizer
    types = Counter(tensor.type for tensor in tensors.values() if len(tensor.shape) == 2)
    return Inspection(
        path=checkpoint.path,
        format=format_of(checkpoint.path),
        architecture=checkpoint.config.architecture,
        config=vars(checkpoint.config),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        nbytes=checkpoint.nbytes,
        types=dict(types.most_common()),
        vocabulary=tokenizer.vocab_size if tokenizer else None,
        control=dict(vars(tokenizer.control)) if tokenizer else {},
        chat_template=chat_template(checkpoint),
        licence=str(checkpoint.metadata.get("general.license", "Gemma Terms of Use")),
        problems=list(_problems(checkpoint)),
        notes=list(_notes(checkpoint)),
    )


def title(checkpoint: Checkpoint) -> str:
    """A model's name: from its header, else its published name, else its file name."""
    preset = hub.preset_of(checkpoint)
    name = preset.title if preset else hub.name_of(checkpoint.path)
    return str(checkpoint.metadata.get("general.name") or name)


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template in a model's files, else Gemma's if the model was trained to chat."""
    template, path = checkpoint.metadata.get("tokenizer.chat_template"), checkpoint.path
    if template is None and (file := path / "chat_template.jinja").is_file():
        template = file.read_text()
    if not template and (file := path / "tokenizer_config.json").is_file():
        template = read_json(file).get("chat_template")
    if isinstance(template, str):
        return template
    preset = hub.preset_of(checkpoint)
    return CHAT_TEMPLATE if preset and "chat" in preset.uses else None


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    tokenizer, header = checkpoint.tokenizer, checkpoint.metadata
    if tokenizer is None:
        yield "no tokenizer: ids work, text does not; put tokenizer.model beside it"
        return
    if tokenizer.control.fim != "named":
        yield "the vocabulary names no FIM tokens: not CodeGemma, unless an adapter taught it ids 67 to 70"
    separator = header.get("tokenizer.ggml.fim_sep_token_id", header.get("tokenizer.ggml.eot_token_id"))
    if "tokenizer.ggml.tokens" in header and separator != tokenizer.control.file_separator:
        yield "llama.cpp will not stop at the file separator: convert it again to add fim_sep_token_id"


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    tokenizer, rows = checkpoint.tokenizer, checkpoint.config.vocab
    if tokenizer and (size := tokenizer.vocab_size) > rows:
        yield f"the tokenizer has {size:,} ids, the embedding {rows:,} rows: take both from one model"
    yield from checksums.problems(checkpoint.path)
    for name, tensor in checkpoint.tensors.items():
        try:
            if not _finite(tensor):
                yield f"tensor {name} holds NaN or infinite numbers: download or convert it again"
        except ValueError as error:  # its bytes cannot be read
            yield str(error)


def _finite(tensor: Tensor) -> bool:
    """Whether all floats, or all scales of blocks, are finite."""
    files.drop_mapped_pages()
    scale_type = "E8M0" if tensor.type == "MXFP4" else "F16"
    mask, dtype = EXPONENTS[scale_type if tensor.type in SCALE_OFFSETS else tensor.type]
    for piece in tensor.pieces():
        floats = [piece.data]
        if tensor.type in SCALE_OFFSETS:
            blocks = piece.data.reshape(-1, BLOCKS[tensor.type][1])
            size = np.dtype(dtype).itemsize
            floats = [blocks[:, offset : offset + size] for offset in SCALE_OFFSETS[tensor.type]]
        if any((np.ascontiguousarray(values).view(dtype) & mask == mask).any() for values in floats):
            return False
    return True
