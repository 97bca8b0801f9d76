"""Tensors as files store them: floats, or quantised blocks as bytes, which native/ makes and decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BLOCKS: dict[str, tuple[int, int]] = {  # type: (weights per block, bytes per block), as in ggml
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "MXFP4": (32, 17),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "IQ4_XS": (256, 136),
}
ELEMENTS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # unquantised types as NumPy dtypes
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # their names in most frameworks
TYPES_BY_DTYPE = {dtype: type for type, dtype in DTYPES.items()}
PIECE = 1 << 24  # weights that are read or written at once
MAX_AXIS = 1 << 31


def row_bytes(type: str, width: int) -> int:
    """Bytes of one row of `width` weights. Raises ValueError where blocks do not fill the row."""
    weights, size = BLOCKS[type]
    if width % weights:
        raise ValueError(f"a row of {width} weights cannot be {type}: its blocks hold {weights} weights")
    return width // weights * size


def possible_shape(shape: Any) -> bool:
    """Whether a shape from an untrusted file consists of at least one whole number from 1 to MAX_AXIS."""
    return bool(shape) and all(type(size) is int and 1 <= size <= MAX_AXIS for size in shape)


def from_float32(type: str, values: np.ndarray) -> np.ndarray:
    """float32 values as elements of an unquantised type, rounded to nearest even; bfloat16 as uint16 bits."""
    if type == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, bits >> 16 | 0x40, bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.asarray(values, ELEMENTS[type])


class Tensor(Protocol):
    """A weight as its file stores it: `data` is uint8 [rows, bytes of a row], or [bytes] for a vector.

    `type` is a key of BLOCKS, and the last axis of `shape` runs along a row.
    """

    type: str
    shape: tuple[int, ...]
    data: np.ndarray
    by_rows: bool = True  # whether a few rows cost less than all

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop along the first axis; of a vector, elements."""
        step = len(self.data) // self.shape[0]  # 1, or the bytes of a vector's element
        return ArrayTensor(self.type, (stop - start, *self.shape[1:]), self.data[start * step : stop * step])

    def pieces(self) -> Iterator[Tensor]:
        """All rows, at most PIECE weights at a time, so that writing a large tensor takes little memory."""
        step = max(1, PIECE // max(1, math.prod(self.shape[1:])))
        if len(self.shape) == 1 or self.shape[0] <= step:
            yield self
            return
        source = self if self.by_rows else ArrayTensor(self.type, self.shape, self.data)
        for start in range(0, self.shape[0], step):
            yield source.rows(start, min(start + step, self.shape[0]))

    def write_to(self, file: Any) -> None:
        """Writes the stored bytes into a binary file, piece by piece."""
        for piece in self.pieces():
            file.write(np.ascontiguousarray(piece.data).reshape(-1).data)

    @property
    def nbytes(self) -> int:
        """Bytes of `data`, computed without reading it."""
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])

    def array(self) -> np.ndarray:
        """The elements of an unquantised tensor as stored, in its shape; bfloat16 as uint16."""
        return np.ascontiguousarray(self.data).view(ELEMENTS[self.type]).reshape(self.shape)

    def float32(self) -> np.ndarray:
        """The values of an unquantised tensor. Raises ValueError on blocks."""
        if self.type not in ELEMENTS:
            raise ValueError(f"a {self.type} tensor has no plain float32 view: decode its blocks")
        stored = self.data.view(ELEMENTS[self.type])
        if self.type == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class ArrayTensor(Tensor):
    """A tensor whose bytes are an array: in memory, or a view of a memory-mapped file."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def view(cls, type: str, shape: tuple[int, ...], raw: np.ndarray) -> ArrayTensor:
        """Lays a shape over flat bytes without copying them."""
        return cls(type, shape, raw.reshape(*shape[:-1], row_bytes(type, shape[-1])))

    @classmethod
    def of(cls, values: np.ndarray, type: str = "F32") -> ArrayTensor:
        """A tensor of an unquantised type from float32 values."""
        elements = np.ascontiguousarray(from_float32(type, np.asarray(values, np.float32)))
        return cls(type, elements.shape, elements.view(np.uint8))


@dataclass(frozen=True, eq=False)
class LazyTensor(Tensor):
    """A tensor that is read or computed each time it is used, so that large models need little memory.

    `read(start, stop)` returns rows in stored form (elements, or the bytes of blocks). Where `by_rows` is
    False it computes all rows for any of them, so `pieces` asks for all at once.
    """

    type: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    by_rows: bool = True

    @classmethod
    def computed(cls, type: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> LazyTensor:
        """A tensor whose rows can only be computed together."""
        return cls(type, shape, lambda start, stop: compute()[start:stop], by_rows=False)

    @classmethod
    def from_rows(cls, type: str, tensor: Tensor, compute: Callable[[Tensor], np.ndarray]) -> LazyTensor:
        """A tensor of the same shape, whose rows are computed from those of another tensor."""
        return cls(type, tensor.shape, lambda start, stop: compute(tensor.rows(start, stop)), tensor.by_rows)

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        return self.rows(0, self.shape[0]).data

    def rows(self, start: int, stop: int) -> Tensor:
        raw = np.ascontiguousarray(self.read(start, stop)).view(np.uint8).reshape(-1)
        return ArrayTensor.view(self.type, (stop - start, *self.shape[1:]), raw)
