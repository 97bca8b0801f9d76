"""GGUF, llama.cpp's file format (versions 2 and 3, little endian): read by memory map, written by tensor.

Layout as in ggml's docs/gguf.md: magic, version, counts, typed key-values, tensor infos, then aligned tensor
data. Every size in the header is checked against the file's length before it is used, and no array is
copied, even from a file that was cut into pieces. gguf_model.py interprets the entries.
"""

from __future__ import annotations

import glob
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codegemma.checkpoints.table import format_table
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, Tensor, possible_shape, row_bytes
from codegemma.checkpoints.untrusted import REMEDY, refusing
from codegemma.config import LIMITS
from codegemma.files import atomic_write, map_files, resumable_write

GGML_TYPES: list[str] = format_table("gguf")["ggml_types"]
TYPES = {code: name for code, name in enumerate(GGML_TYPES) if name in BLOCKS}
# Value types of the header, as letters of `struct` and NumPy.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9
_CODES = {np.dtype("<" + letter): code for code, letter in SCALARS.items()}
_STRUCTS = {code: struct.Struct("<" + letter) for code, letter in SCALARS.items()}
_U32, _U64 = _STRUCTS[4], _STRUCTS[10]

ALIGNMENT = 32
MAX_ENTRIES = 65_536  # key-values, and tensors
MAX_STRINGS = LIMITS["vocab"]  # in all arrays of a header
MAX_STRING = 1 << 24  # bytes; the longest real one is a chat template


class Strings(Sequence[str]):
    """An array of strings that is decoded when it is first used (a vocabulary holds 262,144 of them)."""

    def __init__(self, name: str, raw: memoryview, count: int) -> None:
        self.name, self.raw, self._count = name, raw, count  # each string follows its length (u64)

    @cached_property
    def _items(self) -> list[str]:
        raw, offset, items, length = bytes(self.raw), 0, [], _U64.unpack_from
        with refusing(f"{self.name} is not UTF-8", UnicodeDecodeError):
            for _ in range(self._count):
                end = offset + 8 + length(raw, offset)[0]
                items.append(raw[offset + 8 : end].decode())
                offset = end
        return items

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


class Contents(NamedTuple):
    """The header of a file, and its tensors under the file's names as views of the memory map."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Header:
    """A cursor over the header. Each step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset, self.strings_read = path, data, 0, 0

    def fault(self, problem: str, remedy: str = REMEDY) -> ValueError:
        return ValueError(f"{self.path}: {problem}: {remedy}")

    def number(self, kind: struct.Struct) -> Any:
        if self.offset + kind.size > len(self.data):
            raise self.fault(f"ends inside its header, at byte {len(self.data):,}")
        value = kind.unpack_from(self.data, self.offset)[0]
        self.offset += kind.size
        return value

    def count(self, counted: str, maximum: int, kind: struct.Struct = _U64) -> int:
        value: int = self.number(kind)
        if value > maximum:
            raise self.fault(f"claims {value:,} {counted}, but at most {maximum:,} make sense")
        return value

    def skip(self, size: int, label: str) -> int:
        """Skips `size` bytes and returns the offset where they began."""
        start = self.offset
        if size > len(self.data) - start:
            raise self.fault(f"{label} reaches beyond the end of the file ({len(self.data):,} bytes)")
        self.offset += size
        return start

    def string(self, label: str, max_bytes: int = MAX_STRING) -> str:
        size = self.count(f"bytes in {label}", max_bytes)
        start = self.skip(size, label)
        with refusing(f"{self.path}: {label} is not UTF-8", UnicodeDecodeError):
            return self.data[start : start + size].decode()

    def value(self, key: str) -> Any:
        code = self.number(_U32)
        if code == STRING:
            return self.string(f"the value of {key}")
        if code == ARRAY:
            return self.array(key)
        if code not in _STRUCTS:
            raise self.fault(f"{key} has the unknown value type {code}")
        number = self.number(_STRUCTS[code])
        return float(str(np.float32(number))) if code == FLOAT32 else number  # 1e-6, not 9.99999997e-07

    def array(self, key: str) -> np.ndarray | Strings:
        code, count = self.number(_U32), self.number(_U64)
        if code == STRING:
            return self.strings(key, count)
        if code not in SCALARS:
            raise self.fault(f"{key} is an array of the value type {code}, not of numbers or strings")
        dtype = np.dtype("<" + SCALARS[code])
        start = self.skip(count * dtype.itemsize, f"the array {key} of {count:,} items")
        raw = np.frombuffer(self.data, np.uint8, count * dtype.itemsize, start)
        return raw != 0 if code == BOOL else raw.view(dtype)

    def strings(self, key: str, count: int) -> Strings:
        self.strings_read += count
        if self.strings_read > MAX_STRINGS:
            raise self.fault(f"{key} claims {count:,} strings, but at most {MAX_STRINGS:,} in all make sense")
        data, end, length = self.data, self.offset, _U64.unpack_from
        try:
            for _ in range(count):
                end += 8 + length(data, end)[0]
        except (struct.error, OverflowError):
            end = len(data) + 1
        start = self.skip(end - self.offset, f"the array {key} of {count:,} strings")
        return Strings(f"{self.path}: {key}", memoryview(data)[start:end], count)


def pieces(path: Path) -> list[Path]:
    """The files that make one GGUF when joined (NAME.gguf.part00, .part01, ...), in order; else `path` alone.

    Raises ValueError where a piece before the last one present is missing. That later ones are missing is
    found by the reader: the file is then shorter than its header says.
    """
    match = re.fullmatch(r"(.+\.gguf\.part)(\d+)", path.name, re.I)
    if match is None:
        return [path]
    beside = path.parent.glob(f"{glob.escape(match[1])}*")
    count = sum(bool(re.fullmatch(r"\d+", file.name[len(match[1]) :])) for file in beside)
    files = [path.with_name(f"{match[1]}{number:0{len(match[2])}}") for number in range(count)]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{path}: {missing[0]} is not beside it: download it too")
    return files or [path]


def read_general(path: Path) -> dict[str, Any]:
    """The entries general.* (architecture, type, name) that begin a header. Raises as `read` does."""
    header, entries = _start(path), {}
    header.count("tensors", MAX_ENTRIES)
    for _ in range(header.count("header entries", MAX_ENTRIES)):
        key = header.string("a key", 65_535)
        if not key.startswith("general."):
            break
        entries[key] = header.value(key)
    return entries


def _start(path: Path) -> _Header:
    """The header of a file, read up to the end of its magic number and version."""
    header = _Header(path, map_files(pieces(path)))
    if header.data[:4] != b"GGUF":
        raise header.fault("is not a GGUF file: it does not begin with GGUF", "check the path")
    header.offset = 4
    version = header.number(_U32)
    if version & 0xFFFF == 0:
        raise header.fault("is a big-endian GGUF", "convert it for little-endian machines")
    if version not in (2, 3):
        raise header.fault(f"is GGUF version {version}, but only 2 and 3 are known")
    return header


def read(path: Path) -> Contents:
    """Reads header and tensor infos. Raises ValueError on a damaged file, OSError where it cannot be read."""
    header = _start(path)
    tensor_count = header.count("tensors", MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("header entries", MAX_ENTRIES)):
        key = header.string("a key", 65_535)
        if key in metadata:
            raise header.fault(f"the key {key} appears twice in its header")
        metadata[key] = header.value(key)
    return Contents(metadata, _tensors(header, tensor_count, metadata.get("general.alignment", ALIGNMENT)))


def _tensors(header: _Header, count: int, alignment: Any) -> dict[str, Tensor]:
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 1 << 20:
        raise header.fault(f"general.alignment must be a multiple of 8, got {alignment!r}")
    infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = header.string("a tensor name", 1024)
        if name in infos:
            raise header.fault(f"the tensor {name} appears twice in its header")
        infos[name] = _info(header, name)
    start = -(-header.offset // alignment) * alignment
    raw = np.frombuffer(header.data, np.uint8)
    tensors: dict[str, Tensor] = {}
    previous, end = "", 0
    for name, (type, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        size = math.prod(shape[:-1]) * row_bytes(type, shape[-1])
        if offset % alignment:
            raise header.fault(f"tensor {name} has offset {offset}, which is no multiple of {alignment}")
        if offset < end:
            raise header.fault(f"tensors {previous} and {name} overlap")
        previous, end = name, offset + size
        if start + end > len(raw):
            raise header.fault(f"tensor {name} needs {start + end:,} bytes of file, of {len(raw):,}")
        tensors[name] = ArrayTensor.view(type, shape, raw[start + offset : start + end])
    return {name: tensors[name] for name in infos}


def _info(header: _Header, name: str) -> tuple[str, tuple[int, ...], int]:
    """Type, shape (rows first; the file lists the innermost axis first) and offset from the data's start."""
    axes = header.count(f"axes in tensor {name}", 4, _U32)
    shape = tuple(header.number(_U64) for _ in range(axes))[::-1]
    code, offset = header.number(_U32), header.number(_U64)
    if not possible_shape(shape):
        raise header.fault(f"tensor {name} has the impossible shape {list(shape)}")
    if code not in TYPES:
        has_name = code < len(GGML_TYPES) and GGML_TYPES[code] != "-"
        type = GGML_TYPES[code] if has_name else f"of the unknown type {code}"
        rule = f"this program computes with {', '.join(BLOCKS)}"
        remedy = "choose another file of the model, such as Q4_K_M, Q3_K_M or IQ4_XS"
        raise header.fault(f"tensor {name} is {type}, but {rule}", remedy)
    with refusing(f"{header.path}: tensor {name} has an impossible row", ValueError):
        row_bytes(TYPES[code], shape[-1])
    return TYPES[code], shape, offset


def _value_bytes(value: Any) -> bytes:
    """A value with its type code. Python numbers get the types that llama.cpp expects: u32, f32, bool."""
    if isinstance(value, str):
        return _U32.pack(STRING) + _string_bytes(value)
    if isinstance(value, Strings) or (
        isinstance(value, (list, tuple)) and value and isinstance(value[0], str)
    ):
        head = _U32.pack(ARRAY) + _U32.pack(STRING) + _U64.pack(len(value))
        return head + b"".join(map(_string_bytes, value))
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.array(value, "<u4" if 0 <= value < 1 << 32 else "<i8" if value < 1 << 63 else "<u8")
    array = np.asarray(value)
    if isinstance(value, (float, list, tuple)) and array.dtype in (np.float64, np.int64):
        array = array.astype("<f4" if array.dtype == np.float64 else "<i4")
    code = _U32.pack(_CODES[array.dtype.newbyteorder("<")])
    head = _U32.pack(ARRAY) + code + _U64.pack(array.size) if array.ndim else code
    return head + array.tobytes()


def _string_bytes(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stamp: str | None = None,
    replace: bool = True,
) -> None:
    """Writes a file tensor by tensor, in pieces; `path` appears only when complete.

    With a `stamp`, which must name everything that the file depends on, an interrupted write resumes: tensors
    that are in the file already are not read again. Raises ValueError where a tensor's data do not fit, and
    FileExistsError where `path` is taken by the end and `replace` is False.
    """
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    codes = {name: code for code, name in TYPES.items()}
    entries = [_string_bytes(key) + _value_bytes(value) for key, value in metadata.items()]
    spans, end = [], 0
    for name, tensor in tensors.items():
        axes = b"".join(map(_U64.pack, tensor.shape[::-1]))
        kind = _U32.pack(codes[tensor.type]) + _U64.pack(end)
        entries.append(_string_bytes(name) + _U32.pack(len(tensor.shape)) + axes + kind)
        spans.append((end, end + tensor.nbytes))
        end = -(-spans[-1][1] // alignment) * alignment
    head = b"GGUF" + _U32.pack(3) + _U64.pack(len(tensors)) + _U64.pack(len(metadata)) + b"".join(entries)
    head += bytes(-len(head) % alignment)
    open_to_write: Any = atomic_write if stamp is None else partial(resumable_write, stamp=stamp)
    with open_to_write(path, replace=replace) as file:
        complete = 0 if stamp is None or file.read(len(head)) != head else file.seek(0, 2)
        file.seek(0)
        file.write(head)
        for (name, tensor), (start, stop) in zip(tensors.items(), spans, strict=True):
            if len(head) + stop > complete:
                file.truncate(file.seek(len(head) + start))
                tensor.write_to(file)
                if (size := file.tell() - len(head) - start) != stop - start:
                    expected = f"its type and shape make {stop - start:,}"
                    raise ValueError(f"{path}: tensor {name} has {size:,} bytes, but {expected}")
        file.truncate(len(head) + end)
