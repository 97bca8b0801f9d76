"""Products with a frozen weight inside JAX programs, for training adapters on a CPU: the weight stays in its blocks.

`product` is x W^T, and its derivative by x is dy W; the weight has none. Both exist twice: as the engine's own kernels,
which XLA calls through its foreign function interface and which decode a panel of blocks for all tokens at once, and
in JAX alone (`by="xla"`), for other devices and as their twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from codegemma.native import _native, usable_cpus
from codegemma.weights import BLOCKS, Tensor

By = Literal["native", "xla"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "first"], meta_fields=["rows", "type"])
@dataclass(frozen=True, eq=False)
class Blocks:
    """`rows` rows of a weight from row `first` on. Layers that are alike may share one `data`, and a chunk of a
    vocabulary is a part of its table: neither is ever copied."""

    data: Array                          # uint8 [all rows, row bytes]
    rows: int
    type: str
    first: int | Array = 0

    @classmethod
    def of(cls, *tensors: Tensor) -> Blocks:
        """The rows of all these tensors, one below the other. Raises ValueError where they differ in type or width."""
        kinds = {(tensor.type, tensor.data.shape[-1]) for tensor in tensors}
        if len(kinds) != 1:
            raise ValueError(f"stacked weights must be alike in type and row bytes, got {sorted(kinds)}: stack the others apart")
        data = tensors[0].data if len(tensors) == 1 else np.concatenate([tensor.data for tensor in tensors])
        return cls(jnp.asarray(data), len(data), tensors[0].type)

    @property
    def width(self) -> int:
        """Columns of the weight."""
        weights, size = BLOCKS[self.type]
        return self.data.shape[1] // size * weights

    def part(self, start: int | Array, rows: int) -> Blocks:
        """Rows start .. start + rows of these; `start` may be traced."""
        return replace(self, first=self.first + start, rows=rows)

    def float32(self) -> Array:
        """The decoded rows, in JAX alone."""
        return _decode(lax.dynamic_slice_in_dim(self.data, self.first, self.rows), self.type)


def configure(threads: int | None = None, level: str = "auto") -> None:
    """Chooses the threads and the SIMD level of all native products from now on; results do not depend on the threads."""
    handlers = _native.xla_handlers(level, threads or usable_cpus())
    if not _registered:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        _registered.update(handlers)


_registered: dict[str, object] = {}


def product(x: Array, weight: Blocks, by: By = "native") -> Array:
    """x W^T in float32 for x [..., width]: float32 [..., rows]. Differentiable in x, once, in reverse."""
    if x.shape[-1] != weight.width:
        raise ValueError(f"x has {x.shape[-1]} columns but the weight {weight.width}: they must be equal")
    y = _product(x.reshape(-1, weight.width).astype(jnp.float32), weight, by)
    return y.reshape(*x.shape[:-1], weight.rows)


def rows(ids: Array, weight: Blocks, by: By = "native") -> Array:
    """The rows of the weight with these ids, decoded: float32 [..., width]."""
    ids_n = weight.first + ids.reshape(-1)
    if by == "xla":
        values = _decode(weight.data[ids_n], weight.type)
    else:
        values = _call("codegemma_rows", (len(ids_n), weight.width), weight.type, ids_n.astype(jnp.int32), weight.data)
    return values.reshape(*ids.shape, weight.width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_TK: Array, weight: Blocks, by: By) -> Array:
    if by == "xla":
        return jnp.matmul(x_TK, weight.float32().T, precision="highest")
    return _call("codegemma_product", (len(x_TK), weight.rows), weight.type, x_TK, weight.data, jnp.int32(weight.first))


def _forward(x_TK: Array, weight: Blocks, by: By) -> tuple[Array, Blocks]:
    return _product(x_TK, weight, by), weight


def _backward(by: By, weight: Blocks, dy_TN: Array) -> tuple[Array, None]:
    if by == "xla":
        return jnp.matmul(dy_TN, weight.float32(), precision="highest"), None
    shape = len(dy_TN), weight.width
    return _call("codegemma_product_t", shape, weight.type, dy_TN, weight.data, jnp.int32(weight.first)), None


_product.defvjp(_forward, _backward)


def _call(name: str, shape: tuple[int, int], type: str, *operands: Array) -> Array:
    if not _registered:
        configure()
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(*operands, type=np.int32(_native.TYPES.index(type)))


def _decode(raw: Array, type: str) -> Array:
    """Rows of blocks (uint8 [n, row bytes]) as float32, as ggml defines them."""
    weights, size = BLOCKS[type]
    b = raw.reshape(len(raw), -1, size)
    floats = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
    if type in floats:
        return lax.bitcast_convert_type(b, floats[type]).astype(jnp.float32)

    def half(at: int) -> Array:
        return lax.bitcast_convert_type(b[..., at:at + 2], jnp.float16).astype(jnp.float32)[..., None]

    values = _decode_256(b, half, type) if weights == 256 else _decode_32(b, half, type)
    return values.reshape(len(raw), -1)


def _decode_32(b: Array, half: Callable[[int], Array], type: str) -> Array:
    if type == "Q8_0":
        return half(0) * lax.bitcast_convert_type(b[..., 2:], jnp.int8).astype(jnp.float32)
    nibbles = b[..., -16:]
    q = jnp.concatenate([nibbles & 15, nibbles >> 4], -1)
    if type.startswith("Q5"):
        bits = b[..., -20:-16, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
        q = q | bits.reshape(q.shape) << 4
    scaled = half(0) * q.astype(jnp.float32)
    return scaled + half(2) if type.endswith("1") else scaled - half(0) * (8.0 if type == "Q4_0" else 16.0)


def _decode_256(b: Array, half: Callable[[int], Array], type: str) -> Array:
    low_high = jnp.array([0, 4], jnp.uint8)[:, None]
    if type == "Q6_K":
        low = b[..., :128].reshape(*b.shape[:2], 2, 1, 64) >> low_high                # [half, nibble, 64]
        top = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> jnp.array([0, 2, 4, 6], jnp.uint8)[:, None]
        q = (low & 15).reshape(*b.shape[:2], 2, 4, 32) | (top & 3) << 4
        scales = lax.bitcast_convert_type(b[..., 192:208], jnp.int8).astype(jnp.float32)
        return half(208)[..., None] * scales[..., None] * (q.reshape(*b.shape[:2], 16, 16).astype(jnp.float32) - 32.0)
    p = b[..., 4:16]
    first, second, third = p[..., :4], p[..., 4:8], p[..., 8:]
    scales = jnp.concatenate([first & 63, third & 15 | first >> 6 << 4], -1).astype(jnp.float32)
    mins = jnp.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1).astype(jnp.float32)
    nibbles = b[..., -128:].reshape(*b.shape[:2], 4, 1, 32) >> low_high
    q = (nibbles & 15).reshape(*b.shape[:2], 8, 32)
    if type == "Q5_K":
        q = q | (b[..., None, 16:48] >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1) << 4
    return (half(0) * scales)[..., None] * q.astype(jnp.float32) - (half(2) * mins)[..., None]
