"""Writing a checkpoint in another format, tensor by tensor: `codegemma convert`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from codegemma import files, hub, prompts
from codegemma.checkpoints import (
    FIM_ORDERS_KEY,
    Checkpoint,
    format_of,
    gguf_model,
    huggingface,
    keras,
    nemo,
    open_checkpoint,
    orbax,
    torch,
)
from codegemma.checkpoints.tensors import ELEMENTS, LazyTensor, Tensor, from_float32
from codegemma.config import ExportFormat
from codegemma.convert.importance import importance_of
from codegemma.convert.inspect import chat_template, title
from codegemma.convert.quantize import (
    CHUNK,
    QUANTISED,
    Cost,
    Importance,
    chosen,
    quantize_matrix,
    relative_error,
)
from codegemma.native import dequantize

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all
SUFFIXES: dict[str, ExportFormat] = {".gguf": "gguf", ".nemo": "nemo"}
TOKENIZER_FILES = (  # copied from one Hugging Face directory to the next
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPARE_BYTES = 64 << 20  # of disk, beside the tensors


@dataclass(frozen=True)
class Converted:
    """A written checkpoint, and the cost of each matrix that became blocks."""

    path: Path
    format: ExportFormat
    costs: list[Cost]


def convert(
    source: str | Path,
    target: Path,
    to: ExportFormat | None = None,
    *,
    quantize_to: str | None = None,
    dtype: str | None = None,
    importance: Importance | Path | None = None,
    overwrite: bool = False,
    merge: Callable[[Checkpoint], Checkpoint] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model (a name, or a path of any format) in another format.

    Types are kept, except that formats without blocks get bfloat16 for blocks. `dtype` ("bf16", "f16", "f32")
    changes them; `quantize_to` (GGUF only) makes blocks, weighed by `importance` (the numbers, their file, or
    texts to measure them on); `merge` is applied to the opened model, for example an adapter's. The target
    appears only when it is complete, and an interrupted quantisation resumes. Raises ValueError naming what
    is wrong and what to do.
    """
    to = _target_format(target, to, overwrite)
    if quantize_to and (to != "gguf" or dtype):
        other = to if to != "gguf" else f"dtype {dtype}"
        raise ValueError(
            f"--quantize makes GGUF blocks, which {other} cannot hold: use --to gguf alone, or --dtype"
        )
    if importance and not quantize_to:
        raise ValueError("importance weighs the columns that --quantize rounds: pass both, or neither")
    checkpoint = open_checkpoint(hub.resolve(source))
    checkpoint = merge(checkpoint) if merge else checkpoint
    types = _types(checkpoint, to, quantize_to, dtype)
    stamp = None if merge or not quantize_to else _stamp(checkpoint, quantize_to, importance)
    if isinstance(importance, Path):
        importance = importance_of(importance, checkpoint)
    norms: dict[str, tuple[float, float]] = {}
    tensors = {
        name: _with_type(name, tensor, types[name], importance or {}, norms)
        for name, tensor in checkpoint.tensors.items()
    }
    files.remove_leftovers(target)
    _check_disk(target, sum(tensor.nbytes for tensor in tensors.values()))
    if target.exists() and overwrite:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    converted = replace(checkpoint, tensors=_with_progress(tensors, progress))
    if to in ("gguf", "nemo"):
        save(to, target, converted, stamp)
    else:
        with files.atomic_directory(target) as directory:
            save(to, directory, converted)
    costs = [
        Cost(name, checkpoint.tensors[name].type, types[name], relative_error(*pair))
        for name, pair in norms.items()
    ]
    return Converted(target, to, costs)


def _target_format(target: Path, to: ExportFormat | None, overwrite: bool) -> ExportFormat:
    """The format to write. Raises ValueError where it is unknown, or where the target may not be replaced."""
    to = to or SUFFIXES.get(target.suffix)
    if to is None or to not in get_args(ExportFormat):
        raise ValueError(f"{target} does not say its format: pass --to {', '.join(get_args(ExportFormat))}")
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: choose another name, or pass --overwrite")
    return to


def save(to: ExportFormat, path: Path, checkpoint: Checkpoint, stamp: str | None = None) -> None:
    """Writes a checkpoint as it is: as a file in GGUF and NeMo, else into the folder `path`.

    A GGUF file with a `stamp` resumes an interrupted write of the same stamp.
    """
    tokenizer, template = checkpoint.tokenizer, chat_template(checkpoint)
    match to:
        case "gguf":
            entries = {"general.name": title(checkpoint)} | _gguf_header(checkpoint)
            gguf_model.save(path, checkpoint, entries, template, stamp)
        case "nemo":
            nemo.save(path, checkpoint)
        case "keras":
            keras.save(path, checkpoint)
        case "safetensors":
            stops = sorted(prompts.fim_stops(tokenizer)) if tokenizer else []
            huggingface.save(path, checkpoint, template, stops)
            if checkpoint.path.is_dir() and format_of(checkpoint.path) in ("safetensors", "torch"):
                for file in (file for pattern in TOKENIZER_FILES for file in checkpoint.path.glob(pattern)):
                    shutil.copyfile(file, path / file.name)
        case "orbax" | "gemma_pytorch":
            (orbax if to == "orbax" else torch).save(path, checkpoint)
    if to not in ("gguf", "nemo"):
        (path / "NOTICE").write_text(hub.NOTICE)


def _gguf_header(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries that a GGUF file passes on to a new one: about itself, its vocabulary and its training."""
    own = ("general.architecture", "general.alignment")  # the new file has its own
    from_gguf = bool(checkpoint.metadata) and format_of(checkpoint.path) == "gguf"
    kept = ("general.", "tokenizer.") if from_gguf else ()
    return {
        key: value
        for key, value in checkpoint.metadata.items()
        if key == FIM_ORDERS_KEY or key.startswith(kept) and key not in own
    }


def _types(
    checkpoint: Checkpoint, to: ExportFormat, quantize_to: str | None, dtype: str | None
) -> dict[str, str]:
    """The type that each tensor gets."""
    if dtype and dtype.upper() not in ("BF16", "F16", "F32"):
        raise ValueError(f"dtype must be bf16, f16 or f32, got {dtype!r}")
    if quantize_to:
        return chosen(quantize_to, checkpoint)
    kept = {
        name: "BF16" if to != "gguf" and tensor.type in QUANTISED else tensor.type
        for name, tensor in checkpoint.tensors.items()
    }
    return dict.fromkeys(kept, dtype.upper()) if dtype else kept


def _stamp(checkpoint: Checkpoint, quantize_to: str, importance: Importance | Path | None) -> str:
    """All that a quantised file depends on: an interrupted write resumes if it is the same."""
    inputs = [checkpoint.path] if checkpoint.path.is_file() else sorted(checkpoint.path.rglob("*"))
    weights: Importance = {}
    if isinstance(importance, Path):
        inputs += [importance] if importance.is_file() else sorted(importance.rglob("*"))
    elif importance is not None:
        weights = importance
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in inputs]
    return repr([quantize_to, *stats, *((name, values.tobytes()) for name, values in weights.items())])


def _with_type(
    name: str, tensor: Tensor, type: str, importance: Importance, norms: dict[str, tuple[float, float]]
) -> Tensor:
    """The tensor in another type, lazily; `norms` gets the squared norms of error and weights."""

    def quantized(rows: Tensor) -> np.ndarray:
        try:
            blocks, *pair = quantize_matrix(rows, type, importance.get(name))
        except ValueError as fault:
            raise ValueError(f"tensor {name} {fault}") from None
        before = norms.get(name, (0.0, 0.0))
        norms[name] = before[0] + pair[0], before[1] + pair[1]
        return blocks

    if len(tensor.shape) == 1 or type == tensor.type:
        return tensor
    return _by_rows(tensor, type, quantized if type in QUANTISED else lambda rows: _cast(name, rows, type))


def _by_rows(tensor: Tensor, type: str, compute: Callable[[Tensor], np.ndarray]) -> Tensor:
    """A lazy tensor of what `compute` makes of this one's rows."""

    def read(start: int, stop: int) -> np.ndarray:
        return compute(tensor.rows(start, stop))

    return LazyTensor(type, tensor.shape, read, tensor.by_rows)


def _cast(name: str, tensor: Tensor, type: str) -> np.ndarray:
    """A matrix as elements of an unquantised type. Raises ValueError on values that it cannot hold."""
    rows, columns = tensor.shape
    elements, step = np.empty(tensor.shape, ELEMENTS[type]), max(1, CHUNK // columns)
    for start in range(0, rows, step):
        values = dequantize(tensor.rows(start, min(rows, start + step)))
        if not np.isfinite(values).all() or type == "F16" and np.abs(values).max() > 65_504:
            raise ValueError(
                f"tensor {name} holds NaN, infinite or (for f16) too large weights: the model is damaged, or "
                "choose bf16"
            )
        elements[start : start + step] = from_float32(type, values)
    return elements


def _with_progress(tensors: Mapping[str, Tensor], progress: Progress | None) -> dict[str, Tensor]:
    """The same tensors, which report progress as they are read, and free the pages that were read before."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def reported(rows: Tensor) -> np.ndarray:
        nonlocal done
        files.unmap()
        done += rows.nbytes
        if progress:
            progress(done, total)
        return rows.data

    return {
        name: tensor if len(tensor.shape) == 1 else _by_rows(tensor, tensor.type, reported)
        for name, tensor in tensors.items()
    }


def _check_disk(target: Path, nbytes: int) -> None:
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < nbytes * 1.02 + SPARE_BYTES:
        raise ValueError(
            f"{target} takes {nbytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free: make room, or "
            "choose another disk"
        )
