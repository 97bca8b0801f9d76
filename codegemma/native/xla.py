"""C++ kernels as JAX operations, for training on a CPU: products with frozen weights, attention, the loss.

- `product`: x W^T, with a gradient for x (dy W) and none for the weight;
- `adapted`: the same plus a LoRA, whose a and b get gradients;
- `dense`: x W^T with a gradient for x and for W, where the weight itself is trained;
- `attention`: causal attention within segments, in memory linear in the tokens;
- `vocabulary_softmax`: the sums over all rows of an embedding table that the loss's softmax needs;
- `decode_rows`: rows of a table as float32.

The products and `decode_rows` exist twice. On a CPU they are C++ kernels, called through XLA's foreign
function interface; a product decodes a panel of blocks once for all tokens. On other devices they are written
in JAX alone, and tests compare the kernels with that. `attention` and `vocabulary_softmax` have kernels only;
their reference implementations are `jax.forward.attend` and the loss's pass by chunks. Sums are float32. With
`jax.default_matmul_precision("bfloat16")`, factors are rounded to bfloat16: always by JAX, but by the kernels
only where the CPU multiplies bfloat16 (AVX-512 BF16, which is twice as fast, or the tiles of AMX).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from codegemma.checkpoints.tensors import BLOCKS, Tensor
from codegemma.native import _native, usable_cpus

# Names of intermediates, which rematerialisation policies may keep for the backward pass: x a^T, attention's
# result, and the log sum exp of its scores.
LOW_RANK, ATTENDED, LOG_SUM_EXP = "low_rank", "attended", "log_sum_exp"
# What the 4 bits of IQ4_NL and IQ4_XS, and of MXFP4, stand for (those of MXFP4 doubled).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Method(NamedTuple):
    """How an operation is computed: by C++ kernels or by JAX alone, and whether with bfloat16 factors.

    Chosen once, when the operation is traced, and kept for its gradients: these may be traced later, under
    other settings.
    """

    kernels: bool
    bfloat16: bool


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["type"])
@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A weight [rows, width] as stored: `data` is uint8 [rows, bytes of a row], `type` a GGUF type.

    Operations can use a part of the rows (a chunk of a vocabulary, one of several stacked layers) without
    copying the weight: `count` rows from `start`, which may be a traced value.
    """

    data: Array
    type: str

    @classmethod
    def of(cls, tensor: Tensor) -> StoredMatrix:
        """A stored matrix as a JAX value."""
        return cls(jnp.asarray(tensor.data), tensor.type)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width), where width counts weights, not bytes."""
        weights, size = BLOCKS[self.type]
        return self.data.shape[0], self.data.shape[1] // size * weights

    def float32(self, start: int | Array = 0, count: int | None = None) -> Array:
        """float32 [count, width]: rows from `start`, by default all, decoded by JAX alone."""
        count = self.shape[0] if count is None else count
        return _decode(lax.dynamic_slice_in_dim(self.data, start, count), self.type)


_registered: dict[str, object] = {}  # the handlers that XLA knows


def configure(threads: int | None = None, level: str | None = None) -> None:
    """Sets the number of threads (default: all usable CPUs) and the SIMD level of all kernels from now on.

    The level is `level`, else the environment variable CODEGEMMA_SIMD, else the CPU's best. Results do not
    depend on the threads. Raises ValueError on fewer than 1 thread and on a SIMD level that this CPU lacks.
    """
    level = level or os.environ.get("CODEGEMMA_SIMD") or "auto"
    handlers = _native.xla_handlers(level, threads or usable_cpus())
    if not _registered:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        _registered.update(handlers)


def product(x: Array, weight: StoredMatrix, start: int | Array = 0, count: int | None = None) -> Array:
    """float32 [..., count]: x [..., width] times the transpose of a weight's `count` rows from `start`.

    Differentiable in x (first order, reverse mode). Raises ValueError where the widths differ.
    """
    x_TK, count = _flat("x", x, weight.shape[1]), weight.shape[0] if count is None else count
    return _product(count, _method(), x_TK, weight, jnp.int32(start)).reshape(*x.shape[:-1], count)


def product_t(dy: Array, weight: StoredMatrix, start: int | Array = 0, count: int | None = None) -> Array:
    """float32 [..., width]: dy [..., count] times a weight's `count` rows from `start`.

    Not differentiable. Raises ValueError where dy does not have `count` columns.
    """
    dy_TN = _flat("dy", dy, weight.shape[0] if count is None else count)
    return _product_t(_method(), dy_TN, weight, jnp.int32(start)).reshape(*dy.shape[:-1], -1)


def adapted(x: Array, weight: StoredMatrix, a_RK: Array, b_NR: Array) -> Array:
    """float32 [..., rows]: x (W + b a)^T. Differentiable in x, a and b (first order, reverse mode).

    Raises ValueError where x is not as wide as the weight.
    """
    x_TK = _flat("x", x, weight.shape[1])
    return _adapted(_method(), x_TK, weight, a_RK, b_NR)[0].reshape(*x.shape[:-1], -1)


def dense(x: Array, weight_NK: Array) -> Array:
    """float32 [..., N]: x W^T for a float32 weight that is trained (first order, reverse mode).

    Raises ValueError where x is not as wide as the weight.
    """
    x_TK = _flat("x", x, weight_NK.shape[1])
    return _dense(_method(), x_TK, weight_NK).reshape(*x.shape[:-1], -1)


def attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions_BT: Array,
    segments_BT: Array,
    window: int | None,
    cap: float | None,
) -> Array:
    """Causal attention within segments: float32 [B, T, N, H].

    A token sees itself and those of its segment that are before it and less than `window` positions away
    (None: all before it). Within a segment, positions must rise with the index. `cap` is the soft cap of
    scores. On a CPU only.

    Differentiable in q, k and v (first order, reverse mode). For the gradient it does not keep the scores,
    only their log sum exp [B, T, N].
    """
    qkv = (x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH))
    mask = positions_BT.astype(jnp.int32), segments_BT.astype(jnp.int32)
    return _attention(_method(), np.int32(window or 0), np.float32(cap or 0), *qkv, *mask)


class SoftmaxSums(NamedTuple):
    """What a softmax over the rows of a vocabulary needs, for each of M hidden states.

    In order: the largest logit; its row; the sum of exp(logit - max) over the rows; and the sum of
    exp(logit - max) * (slope of the soft cap) * row.
    """

    max_M: Array
    best_M: Array
    sum_M: Array
    weighted_MD: Array


def vocabulary_softmax(
    hidden_MD: Array, table: StoredMatrix, counts_V: Array, cap: float | None, used: Array | int
) -> SoftmaxSums:
    """The softmax sums over all rows of a table, for the first `used` hidden states.

    In the sums, row v counts `counts_V[v]` times; where that is 0, its logit cannot be the largest either.
    States from `used` on get max 0, best 0, sum 1 and weighted 0. On a CPU only; not differentiable.
    """
    M, D = hidden_MD.shape
    results = _float32(M, D), _float32(M), jax.ShapeDtypeStruct((M,), jnp.int32), _float32(M)
    operands = hidden_MD.astype(jnp.float32), table, counts_V.astype(jnp.float32), jnp.int32(used)
    sums = _call(_method(), "vocabulary_softmax", results, *operands, cap=np.float32(cap or 0))
    weighted_MD, max_M, best_M, sum_M = sums
    return SoftmaxSums(max_M, best_M, sum_M, weighted_MD)


def decode_rows(weight: StoredMatrix, ids: Array) -> Array:
    """float32 [..., width]: for each of the ids [...], that row of a weight."""
    method, flat_ids = _method(), ids.reshape(-1).astype(jnp.int32)
    if method.kernels:
        values = _call(method, "rows", _float32(ids.size, weight.shape[1]), flat_ids, weight)
    else:
        values = _decode(weight.data[flat_ids], weight.type)
    return values.reshape(*ids.shape, -1)


def has_kernels() -> bool:
    """Whether JAX computes on a CPU, where the C++ kernels run."""
    return jax.default_backend() == "cpu"


def _method() -> Method:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # created by its name
    return Method(has_kernels(), precision == "bfloat16")


def _flat(name: str, x: Array, columns: int) -> Array:
    """float32 [T, columns] of x [..., columns]."""
    if x.shape[-1] != columns:
        raise ValueError(
            f"{name} has {x.shape[-1]} columns, but the weight's shape demands {columns}: pass as many"
        )
    return x.reshape(-1, columns).astype(jnp.float32)


def _product_t(method: Method, dy_TN: Array, weight: StoredMatrix, start: Array) -> Array:
    if not method.kernels:
        return _matmul(method, dy_TN, weight.float32(start, dy_TN.shape[1]))
    return _call(method, "product_t", _float32(len(dy_TN), weight.shape[1]), dy_TN, weight, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(count: int, method: Method, x_TK: Array, weight: StoredMatrix, start: Array) -> Array:
    if not method.kernels:
        return _matmul(method, x_TK, weight.float32(start, count).T)
    return _call(method, "product", _float32(len(x_TK), count), x_TK, weight, start)


def _product_forward(count: int, method: Method, x_TK: Array, weight: StoredMatrix, start: Array) -> Any:
    return _product(count, method, x_TK, weight, start), (weight, start)


def _product_backward(count: int, method: Method, saved: Any, dy_TN: Array) -> tuple[Array, None, None]:
    return _product_t(method, dy_TN, *saved), None, None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(
    method: Method, x_TK: Array, weight: StoredMatrix, a_RK: Array, b_NR: Array
) -> tuple[Array, Array]:
    """The result of the adapted layer, and x a^T, which its gradients need."""
    T, N, R = len(x_TK), weight.shape[0], len(a_RK)
    if not method.kernels:
        u_TR = _matmul(method, x_TK, a_RK.T)
        return _product(N, method, x_TK, weight, jnp.int32(0)) + _matmul(method, u_TR, b_NR.T), u_TR
    return _call(method, "adapted", (_float32(T, N), _float32(T, R)), x_TK, weight, a_RK, b_NR)


def _adapted_forward(method: Method, x_TK: Array, weight: StoredMatrix, a_RK: Array, b_NR: Array) -> Any:
    y_TN, u_TR = _adapted(method, x_TK, weight, a_RK, b_NR)
    return (y_TN, u_TR), (x_TK, checkpoint_name(u_TR, LOW_RANK), weight, a_RK, b_NR)


def _adapted_backward(method: Method, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    x_TK, u_TR, weight, a_RK, b_NR = saved
    dy_TN, _ = cotangents  # nothing else reads the second result, x a^T, so it has no gradient
    if not method.kernels:
        du_TR = _matmul(method, dy_TN, b_NR)
        dx_TK = _product_t(method, dy_TN, weight, jnp.int32(0)) + _matmul(method, du_TR, a_RK)
        return dx_TK, None, _matmul(method, du_TR.T, x_TK), _matmul(method, dy_TN.T, u_TR)
    results = tuple(_float32(*x.shape) for x in (x_TK, a_RK, b_NR))
    dx_TK, da_RK, db_NR = _call(method, "adapted_back", results, dy_TN, x_TK, u_TR, weight, a_RK, b_NR)
    return dx_TK, None, da_RK, db_NR


_adapted.defvjp(_adapted_forward, _adapted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(method: Method, x_TK: Array, weight_NK: Array) -> Array:
    if not method.kernels:
        return _matmul(method, x_TK, weight_NK.T)
    return _call(method, "dense", _float32(len(x_TK), len(weight_NK)), x_TK, weight_NK)


def _dense_forward(method: Method, x_TK: Array, weight_NK: Array) -> Any:
    return _dense(method, x_TK, weight_NK), (x_TK, weight_NK)


def _dense_backward(method: Method, saved: tuple[Array, Array], dy_TN: Array) -> tuple[Array, Array]:
    x_TK, weight_NK = saved
    if not method.kernels:
        return _matmul(method, dy_TN, weight_NK), _matmul(method, dy_TN.T, x_TK)
    results = _float32(*x_TK.shape), _float32(*weight_NK.shape)
    dx_TK, dw_NK = _call(method, "dense_back", results, dy_TN, x_TK, weight_NK)
    return dx_TK, dw_NK


_dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(method: Method, window: np.int32, cap: np.float32, *qkv_and_mask: Array) -> Array:
    return _attention_forward(method, window, cap, *qkv_and_mask)[0]


def _attention_forward(method: Method, window: np.int32, cap: np.float32, *qkv_and_mask: Array) -> Any:
    shape_BTNH = qkv_and_mask[0].shape
    results = _float32(*shape_BTNH), _float32(*shape_BTNH[:3])
    out_BTNH, sums_BTN = _call(method, "attention", results, *qkv_and_mask, window=window, cap=cap)
    out_BTNH, sums_BTN = checkpoint_name(out_BTNH, ATTENDED), checkpoint_name(sums_BTN, LOG_SUM_EXP)
    return out_BTNH, (sums_BTN, *qkv_and_mask)


def _attention_backward(method: Method, window: np.int32, cap: np.float32, saved: Any, d_out: Array) -> Any:
    results = tuple(_float32(*x.shape) for x in saved[1:4])
    return *_call(method, "attention_back", results, d_out, *saved, window=window, cap=cap), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(method: Method, name: str, results: Any, *operands: Array | StoredMatrix, **attributes: Any) -> Any:
    """Calls a kernel. For an operand of StoredMatrix, it gets the data and, as an attribute, the type.

    `results` is the shape and type of the kernel's result, or a tuple of these.
    """
    if not _registered:
        configure()
    arrays = []
    for operand in operands:
        if isinstance(operand, StoredMatrix):
            attributes["type"] = np.int32(_native.TYPES.index(operand.type))
        arrays.append(operand.data if isinstance(operand, StoredMatrix) else operand)
    call = jax.ffi.ffi_call(f"codegemma_{name}", results, vmap_method="sequential")
    return call(*arrays, bfloat16=np.int32(method.bfloat16), **attributes)


def _matmul(method: Method, a: Array, b: Array) -> Array:
    """a b with float32 sums, in JAX alone."""
    if method.bfloat16:
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b, precision="highest")


def _decode(raw: Array, type: str) -> Array:
    """Rows of blocks (uint8 [n, row bytes]) as float32, as ggml defines them."""
    weights, size = BLOCKS[type]
    b = raw.reshape(len(raw), -1, size)
    floats = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
    if type in floats:
        return lax.bitcast_convert_type(b, floats[type]).astype(jnp.float32)

    return (_decode_256(b, type) if weights == 256 else _decode_32(b, type)).reshape(len(raw), -1)


def _half(b: Array, offset: int) -> Array:
    """float32 [..., 1]: the float16 at an offset of each block."""
    scales = lax.bitcast_convert_type(b[..., offset : offset + 2], jnp.float16)
    return scales.astype(jnp.float32)[..., None]


def _decode_32(b: Array, type: str) -> Array:
    """The types with blocks of 32 weights.

    A block has a scale and, in Q4_1 and Q5_1, an offset. The four bits of IQ4_NL and MXFP4 are an index into
    a table of values.
    """
    if type == "Q8_0":
        return _half(b, 0) * lax.bitcast_convert_type(b[..., 2:], jnp.int8).astype(jnp.float32)
    nibbles = b[..., -16:]
    q = jnp.concatenate([nibbles & 15, nibbles >> 4], -1)
    if type == "IQ4_NL":
        return _half(b, 0) * jnp.array(IQ4_VALUES, jnp.float32)[q]
    if type == "MXFP4":  # half of 2^(e - 127), as the values are doubled
        e = b[..., :1].astype(jnp.uint32)
        bits = jnp.where(e < 2, jnp.uint32(0x00200000) << e, e - 1 << 23)
        return lax.bitcast_convert_type(bits, jnp.float32) * jnp.array(MXFP4_VALUES, jnp.float32)[q]
    if type.startswith("Q5"):
        bits = b[..., -20:-16, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
        q = q | bits.reshape(q.shape) << 4
    scaled = _half(b, 0) * q.astype(jnp.float32)
    return (
        scaled + _half(b, 2)
        if type.endswith("1")
        else scaled - _half(b, 0) * (8.0 if type == "Q4_0" else 16.0)
    )


def _decode_256(b: Array, type: str) -> Array:
    """The types with blocks of 256 weights.

    Q3_K, Q6_K and IQ4_XS have scales only; Q2_K has scales and minima of 4 bits each; Q4_K and Q5_K have
    eight scales and eight minima of 6 bits each.
    """
    low_high = jnp.array([0, 4], jnp.uint8)[:, None]
    pairs = jnp.array([0, 2, 4, 6], jnp.uint8)[:, None]
    if type == "IQ4_XS":
        low = (b[..., 4:8, None] >> low_high[:, 0] & 15).reshape(*b.shape[:2], 8)
        high = (b[..., 2:4, None] >> pairs[:, 0] & 3).reshape(*b.shape[:2], 8)
        scales = (low | high << 4).astype(jnp.float32) - 32.0
        q = (b[..., 8:].reshape(*b.shape[:2], 8, 1, 16) >> low_high & 15).reshape(*b.shape[:2], 8, 32)
        return (_half(b, 0) * scales)[..., None] * jnp.array(IQ4_VALUES, jnp.float32)[q]
    if type in ("Q2_K", "Q3_K"):
        start = 16 if type == "Q2_K" else 32
        q = b[..., start : start + 64].reshape(*b.shape[:2], 2, 1, 32) >> pairs & 3  # [half, 2 bits, 32]
        q = q.reshape(*b.shape[:2], 16, 16).astype(jnp.float32)
        if type == "Q2_K":
            scales, mins = (field.astype(jnp.float32) for field in (b[..., :16] & 15, b[..., :16] >> 4))
            return (_half(b, 80) * scales)[..., None] * q - (_half(b, 82) * mins)[..., None]
        high = (b[..., None, :32] >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1).reshape(
            *b.shape[:2], 16, 16
        )
        low = (b[..., None, 96:104] >> low_high & 15).reshape(*b.shape[:2], 16)
        top = (b[..., None, 104:108] >> pairs & 3).reshape(*b.shape[:2], 16)
        scales = (low | top << 4).astype(jnp.float32) - 32.0
        return (_half(b, 108) * scales)[..., None] * (q + 4.0 * high.astype(jnp.float32) - 4.0)
    if type == "Q6_K":
        low = b[..., :128].reshape(*b.shape[:2], 2, 1, 64) >> low_high  # [half, nibble, 64]
        top = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> pairs
        q = (low & 15).reshape(*b.shape[:2], 2, 4, 32) | (top & 3) << 4
        scales = lax.bitcast_convert_type(b[..., 192:208], jnp.int8).astype(jnp.float32)
        quants = q.reshape(*b.shape[:2], 16, 16).astype(jnp.float32) - 32.0
        return _half(b, 208)[..., None] * scales[..., None] * quants
    p = b[..., 4:16]
    first, second, third = p[..., :4], p[..., 4:8], p[..., 8:]
    scales = jnp.concatenate([first & 63, third & 15 | first >> 6 << 4], -1).astype(jnp.float32)
    mins = jnp.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1).astype(jnp.float32)
    nibbles = b[..., -128:].reshape(*b.shape[:2], 4, 1, 32) >> low_high
    q = (nibbles & 15).reshape(*b.shape[:2], 8, 32)
    if type == "Q5_K":
        q = q | (b[..., None, 16:48] >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1) << 4
    return (_half(b, 0) * scales)[..., None] * q.astype(jnp.float32) - (_half(b, 2) * mins)[..., None]
