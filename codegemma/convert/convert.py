"""Writes a model in another file format, quantised if asked: `codegemma convert`."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from codegemma import files, hub, prompts
from codegemma.checkpoints import (
    FIM_ORDERS_KEY,
    Checkpoint,
    format_of,
    gguf_files,
    gguf_model,
    huggingface,
    keras,
    nemo,
    open_checkpoint,
    orbax,
    torch,
)
from codegemma.checkpoints.tensors import ELEMENTS, LazyTensor, Tensor, from_float32
from codegemma.checkpoints.untrusted import naming
from codegemma.config import ExportFormat
from codegemma.convert import checksums
from codegemma.convert.fields import check_fields
from codegemma.convert.importance import importance_of
from codegemma.convert.inspect import chat_template, title
from codegemma.convert.quantize import (
    CHUNK,
    QUANTISED,
    Cost,
    Importance,
    choose_types,
    quantize_matrix,
    relative_error,
)
from codegemma.native import dequantize

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all
Merge = Callable[[Checkpoint], Checkpoint]  # puts adapters into a model's weights
SUFFIXES: dict[str, ExportFormat] = {".gguf": "gguf", ".nemo": "nemo"}
SINGLE_FILES = tuple(SUFFIXES.values())
WRITERS = {"keras": keras.save, "orbax": orbax.save, "gemma_pytorch": torch.save}
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
COPIED_FILES = (*TOKENIZER_FILES, "chat_template.jinja")  # from one Hugging Face directory to another
SPARE_BYTES = 64 << 20  # of disk, in addition to the tensors, for the tokenizer of a large model
# What the folders of models hold. `--overwrite` replaces no folder that holds anything else.
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.h5", "*.ckpt", "*.gguf", "*.model", "*.jinja", "*.index.json"),
    *("config.json", "*_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "metadata.json", "task.json", "preprocessor.json", "checkpoint/*", "assets/*"),
    *("NOTICE*", "LICENSE*", "README.md", "USE_POLICY.md", checksums.SUMS, ".gitattributes"),
)
NAME_ANOTHER = "choose another name, or pass --overwrite"


@dataclass(frozen=True)
class Converted:
    """A written checkpoint, the cost of each matrix that was quantised, and what its user should know."""

    path: Path
    format: ExportFormat
    costs: list[Cost]
    notes: list[str]


def convert(
    source: str | Path,
    target: Path,
    to: ExportFormat | None = None,
    *,
    quantize_to: str | None = None,
    dtype: str | None = None,
    importance: Importance | Path | None = None,
    overwrite: bool = False,
    merge: Merge | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model (a name, or a path of any format) in another format.

    Tensors keep their types, except that blocks become bfloat16 in formats without blocks. `dtype` ("bf16",
    "f16", "f32") converts all matrices; `quantize_to` quantises them (GGUF only), with errors weighed by
    `importance` (arrays by tensor name, a file of llama-imatrix, or texts to measure it on). `merge` takes
    the opened checkpoint and returns the one to write. The target appears only when it is complete,
    and an interrupted quantisation resumes. Raises ValueError naming what is wrong and what to do.
    """
    to = _target_format(target, to, overwrite)
    if quantize_to and (to != "gguf" or dtype):
        other = f"--to {to}" if to != "gguf" else f"--dtype {dtype}"
        raise ValueError(f"--quantize makes GGUF blocks: use it without {other}")
    if importance and not quantize_to:
        raise ValueError("importance weighs the columns that --quantize rounds: pass both, or neither")
    checkpoint = open_checkpoint(hub.resolve(source))
    checkpoint = merge(checkpoint) if merge else checkpoint
    check_fields(to, checkpoint.config)
    types = _types(checkpoint, to, quantize_to, dtype, importance is not None)
    stamp = None if merge or not quantize_to else _stamp(checkpoint, quantize_to, importance)
    if isinstance(importance, Path):
        importance = importance_of(importance, checkpoint)
    squared_norms: dict[str, np.ndarray] = {}  # by tensor: of the error and of the weights
    tensors = {
        name: _with_type(name, tensor, types[name], importance or {}, squared_norms)
        for name, tensor in checkpoint.tensors.items()
    }
    files.remove_leftovers(target.parent)
    _check_disk(target, sum(tensor.nbytes for tensor in tensors.values()))
    new_checkpoint = replace(checkpoint, tensors=_with_progress(tensors, progress))
    try:
        with nullcontext(target) if to in SINGLE_FILES else files.atomic_directory(target, overwrite) as path:
            save(to, path, new_checkpoint, stamp, overwrite)
            if path != target:
                _target_format(target, to, overwrite)  # again, before it is replaced
    except FileExistsError as error:
        if error.filename != os.path.realpath(target):
            raise
        raise ValueError(f"{target} exists now: {NAME_ANOTHER}") from error
    costs = [
        Cost(name, checkpoint.tensors[name].type, types[name], relative_error(*error_and_weights))
        for name, error_and_weights in squared_norms.items()
    ]
    return Converted(target, to, costs, list(_notes(to, checkpoint)))


def _notes(to: ExportFormat, checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.tokenizer is None:
        yield "the source has no tokenizer: programs that read the file know ids, but no text"
    no_caps = [name for name in gguf_model.SOFTCAPS if getattr(checkpoint.config, name) is None]
    if to == "gguf" and no_caps and checkpoint.config.architecture == "gemma2":
        yield f"llama.cpp computes Gemma 2 with its own soft caps, though {' and '.join(no_caps)} are null"


def _target_format(target: Path, to: ExportFormat | None, overwrite: bool) -> ExportFormat:
    """The format to write. Raises ValueError where it is unknown, or where the target may not be replaced."""
    to = to or SUFFIXES.get(target.suffix)
    if to is None or to not in get_args(ExportFormat):
        raise ValueError(f"{target} does not say its format: pass --to {', '.join(get_args(ExportFormat))}")
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: {NAME_ANOTHER}")
    if target.is_file():
        format_of(target)  # raises for a file that is no model: it is not replaced
    elif target.is_dir() and any(target.iterdir()):
        open_checkpoint(target)  # raises for a folder that holds no model: it is not replaced
        if other := next(_other_files(target), None):
            rule = f"{other}, which is no part of a model and would be lost"
            raise ValueError(f"{target} holds {rule}: move it elsewhere, or choose another name")
    return to


def _other_files(folder: Path) -> Iterator[str]:
    """The files in a model's folder that MODEL_FILES does not name. In folders within it, only those that a
    pattern names by the folder are a model's."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        patterns = [pattern for pattern in MODEL_FILES if "/" in pattern or "/" not in name]
        if not file.is_dir() and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield name


def save(
    to: ExportFormat,
    path: Path,
    checkpoint: Checkpoint,
    stamp: str | None = None,
    overwrite: bool = True,
) -> None:
    """Writes a checkpoint without conversion: into a file for GGUF and NeMo, else into the folder `path`.

    A GGUF file with a `stamp` resumes an interrupted write of the same stamp. Raises ValueError where the
    format has no place for a field of the config, and FileExistsError where a file's name is taken by the
    end and `overwrite` is False.
    """
    check_fields(to, checkpoint.config)
    if to == "gguf":
        header, template = _gguf_header(checkpoint), chat_template(checkpoint)
        gguf_model.save(path, checkpoint, header, template, stamp, overwrite)
    elif to == "nemo":
        nemo.save(path, checkpoint, overwrite)
    elif to == "safetensors":
        stops = sorted(prompts.fim_stops(checkpoint.tokenizer)) if checkpoint.tokenizer else []
        huggingface.save(path, checkpoint, chat_template(checkpoint), stops)
        if checkpoint.path.is_dir() and format_of(checkpoint.path) in ("safetensors", "torch"):
            for file in (file for pattern in COPIED_FILES for file in checkpoint.path.glob(pattern)):
                shutil.copyfile(file, path / file.name)
    else:
        WRITERS[to](path, checkpoint)
    if to not in SINGLE_FILES:
        (path / "NOTICE").write_text(hub.NOTICE)
        checksums.write(path)


def _gguf_header(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header entries of a new GGUF file but for the config's: those of the source if it is GGUF too."""
    is_gguf = bool(checkpoint.metadata) and format_of(checkpoint.path) == "gguf"
    copied = ("general.", "tokenizer.") if is_gguf else ()
    new = ("general.architecture", "general.alignment")  # which gguf_model.save writes
    return {"general.name": title(checkpoint)} | {
        key: value
        for key, value in checkpoint.metadata.items()
        if key == FIM_ORDERS_KEY or key.startswith(copied) and key not in new
    }


def _types(
    checkpoint: Checkpoint, to: ExportFormat, quantize_to: str | None, dtype: str | None, weighted: bool
) -> dict[str, str]:
    """The type that each tensor gets."""
    if dtype and dtype.upper() not in ("BF16", "F16", "F32"):
        raise ValueError(f"dtype must be bf16, f16 or f32, got {dtype!r}")
    if quantize_to:
        return choose_types(quantize_to, checkpoint, weighted)
    if dtype:
        return dict.fromkeys(checkpoint.tensors, dtype.upper())
    return {
        name: "BF16" if to != "gguf" and tensor.type in QUANTISED else tensor.type
        for name, tensor in checkpoint.tensors.items()
    }


def _stamp(checkpoint: Checkpoint, quantize_to: str, importance: Importance | Path | None) -> str:
    """Everything that a quantised file depends on: an interrupted write resumes where it is the same."""
    paths, arrays = [checkpoint.path], importance or {}
    if isinstance(arrays, Path):
        paths, arrays = [checkpoint.path, arrays], {}
    files_of = [gguf_files.parts(path) if path.is_file() else sorted(path.rglob("*")) for path in paths]
    inputs = [file for files in files_of for file in files]
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in inputs]
    return repr([quantize_to, *stats, *((name, values.tobytes()) for name, values in arrays.items())])


def _with_type(
    name: str, tensor: Tensor, type: str, importance: Importance, squared_norms: dict[str, np.ndarray]
) -> Tensor:
    """The tensor in another type, computed when read; reading adds its squared norms to `squared_norms`."""
    if len(tensor.shape) == 1 or type == tensor.type:
        return tensor

    def converted(rows: Tensor) -> np.ndarray:
        with naming(f"tensor {name}"):
            if type in ELEMENTS:
                return _cast(rows, type)
            blocks, *error_and_weights = quantize_matrix(rows, type, importance.get(name))
        squared_norms[name] = squared_norms.get(name, 0.0) + np.array(error_and_weights)
        return blocks

    return LazyTensor.from_rows(type, tensor, converted)


def _cast(tensor: Tensor, type: str) -> np.ndarray:
    """A matrix as elements of an unquantised type. Raises ValueError on values that it cannot hold."""
    rows, columns = tensor.shape
    elements, step = np.empty(tensor.shape, ELEMENTS[type]), max(1, CHUNK // columns)
    for start in range(0, rows, step):
        values = dequantize(tensor.rows(start, min(rows, start + step)))
        if not np.isfinite(values).all() or type == "F16" and np.abs(values).max() > 65_504:
            rule = "holds NaN, infinite or (for f16) too large weights"
            raise ValueError(f"{rule}: choose bf16, or download the model again if it is damaged")
        elements[start : start + step] = from_float32(type, values)
    return elements


def _with_progress(tensors: Mapping[str, Tensor], progress: Progress | None) -> dict[str, Tensor]:
    """The same tensors, which report progress when they are read, and free the memory of earlier reads."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def reported(rows: Tensor) -> np.ndarray:
        nonlocal done
        files.drop_mapped_pages()
        done += rows.nbytes
        if progress:
            progress(done, total)
        return rows.data

    return {
        name: tensor if len(tensor.shape) == 1 else LazyTensor.from_rows(tensor.type, tensor, reported)
        for name, tensor in tensors.items()
    }


def _check_disk(target: Path, nbytes: int) -> None:
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    needed = nbytes * 1.02 + min(SPARE_BYTES, nbytes)
    if (free := shutil.disk_usage(parent).free) < needed:
        rule = f"but {parent} has {free / 1e9:.3f} GB free: make room, or choose another disk"
        raise ValueError(f"{target} takes {needed / 1e9:.3f} GB, {rule}")
