"""Products with a frozen weight inside JAX programs, for training adapters on a CPU: the weight stays in its blocks.

`product` is x W^T, and its derivative by x is dy W; the weight has none. `adapted` has a LoRA beside the weight, which has
gradients. `attention` is what such layers have between their products, `vocabulary` what a loss has behind them; their twins
are `model.attend` and loss.py's own pass. The others exist twice: as the engine's own kernels, which XLA calls through its
foreign function interface and which decode a panel of blocks for all tokens at once, and in JAX alone (`by="xla"`), for other
devices and as their twin. Traced within `jax.default_matmul_precision("bfloat16")`, factors are rounded to bfloat16: by the
kernels where the CPU multiplies it (AVX-512 BF16, twice as many a second), by JAX always. Sums are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from codegemma.checkpoints.table import BLOCKS, Tensor
from codegemma.native import _native, usable_cpus

By = Literal["native", "xla"]


class How(NamedTuple):
    """How a product and its gradients are computed: by whom, and with factors rounded to bfloat16 or not."""

    by: By
    paired: bool


LOW, MIXED, EASED = (
    "low",
    "mixed",
    "eased",
)  # x a^T, and attention's result and logarithms of sums, as policies of remat name them


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["type"])
@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight [rows, width] in its blocks. A part of it (a chunk of a vocabulary, one of many like layers below each other)
    is named by `start` and `count` in the calls, where `start` may be traced: it is never copied."""

    data: Array  # uint8 [rows, row bytes]
    type: str

    @classmethod
    def of(cls, tensor: Tensor) -> Blocks:
        return cls(jnp.asarray(tensor.data), tensor.type)

    @property
    def shape(self) -> tuple[int, int]:
        weights, size = BLOCKS[self.type]
        return self.data.shape[0], self.data.shape[1] // size * weights

    def float32(self, start: int | Array = 0, count: int | None = None) -> Array:
        """Decoded rows, in JAX alone."""
        return _decode(
            lax.dynamic_slice_in_dim(self.data, start, self.shape[0] if count is None else count), self.type
        )


def configure(threads: int | None = None, level: str = "auto") -> None:
    """Chooses the threads and the SIMD level of all native products from now on; results do not depend on the threads."""
    handlers = _native.xla_handlers(level, threads or usable_cpus())
    if not _registered:
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        _registered.update(handlers)


_registered: dict[str, object] = {}


def product(
    x: Array, weight: Blocks, start: int | Array = 0, count: int | None = None, by: By | None = None
) -> Array:
    """x W^T in float32 for x [..., width] and rows start .. start + count: float32 [..., count]. Differentiable in x, once,
    in reverse."""
    count = _fits("x", x, weight.shape[1], weight, count)
    y = _product(count, _how(by), _flat(x), weight, jnp.int32(start))
    return y.reshape(*x.shape[:-1], count)


def product_t(
    dy: Array, weight: Blocks, start: int | Array = 0, count: int | None = None, by: By | None = None
) -> Array:
    """dy W in float32 for dy [..., count]: float32 [..., width]. Not differentiable."""
    count = _fits("dy", dy, weight.shape[0] if count is None else count, weight, count)
    return _backward(count, _how(by), (weight, jnp.int32(start)), _flat(dy))[0].reshape(*dy.shape[:-1], -1)


def adapted(x: Array, weight: Blocks, a_RK: Array, b_NR: Array, by: By | None = None) -> Array:
    """x (W + b a)^T in float32 for x [..., width]: float32 [..., rows]. Differentiable in x, a and b, once, in reverse."""
    _fits("x", x, weight.shape[1], weight, None)
    return _adapted(_how(by), _flat(x), weight, a_RK, b_NR)[0].reshape(*x.shape[:-1], -1)


def attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions_BT: Array,
    segments_BT: Array,
    window: int | None,
    cap: float | None,
) -> Array:
    """Causal attention within segments, float32 [B, T, N, H]: a token sees those of its segment whose position is not above its
    own and less than `window` below. Positions rise with the index within a segment. `cap`: the soft cap of scores. By the
    kernels alone, on a CPU; differentiable in q, k and v, once, in reverse. No [T, T] is kept: see `EASED`."""
    sight = positions_BT.astype(jnp.int32), segments_BT.astype(jnp.int32)
    told = np.int32(window or 0), np.float32(cap or 0)
    return _attention(
        How("native", _how(None).paired),
        *told,
        *(x.astype(jnp.float32) for x in (q_BTNH, k_BTKH, v_BTKH)),
        *sight,
    )


class Sums(NamedTuple):
    """Over the rows of a vocabulary, of each hidden state: its largest logit so far, whose it is, and of exp(logit - most) the sum
    and the products with the logit's slope (its soft cap's) and the row behind it."""

    most_M: Array
    best_M: Array
    sum_M: Array
    mean_MD: Array


def vocabulary(
    hidden_MD: Array, table: Blocks, counts_V: Array, cap: float | None, used: Array | int
) -> Sums:
    """Of the first `used` hidden states, over all rows of a table, each as often as `counts_V` says; where it is 0, the row is
    out. Rows beyond `used` give 0, 0, 1 and 0. By the kernels alone, on a CPU; not differentiable."""
    M, D = hidden_MD.shape
    shapes = (M, D), (M,), jax.ShapeDtypeStruct((M,), jnp.int32), (M,)
    given = _flat(hidden_MD), table.data, counts_V.astype(jnp.float32), jnp.int32(used)
    mean_MD, most_M, best_M, sum_M = _call(
        How("native", _how(None).paired),
        "codegemma_vocabulary",
        shapes,
        table,
        *given,
        cap=np.float32(cap or 0),
    )
    return Sums(most_M, best_M, sum_M, mean_MD)


def decode_rows(weight: Blocks, ids: Array, by: By | None = None) -> Array:
    """The rows with these ids: float32 [..., width]."""
    how = _how(by)
    if how.by == "xla":
        values = _decode(weight.data[ids.reshape(-1)], weight.type)
    else:
        values = _call(
            how,
            "codegemma_rows",
            (ids.size, weight.shape[1]),
            weight,
            ids.reshape(-1).astype(jnp.int32),
            weight.data,
        )
    return values.reshape(*ids.shape, -1)


def kernels() -> bool:
    """Whether there is a CPU for them."""
    return jax.default_backend() == "cpu"


def _how(by: By | None) -> How:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made of its name
    return How(by or ("native" if kernels() else "xla"), precision == "bfloat16")


def _fits(name: str, x: Array, wanted: int, weight: Blocks, count: int | None) -> int:
    if x.shape[-1] != wanted:
        raise ValueError(f"{name} has {x.shape[-1]} columns but the weight {wanted}: they must be equal")
    return weight.shape[0] if count is None else count


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(count: int, how: How, x_TK: Array, weight: Blocks, start: Array) -> Array:
    if how.by == "xla":
        return _matmul(how, x_TK, weight.float32(start, count).T)
    return _call(how, "codegemma_product", (len(x_TK), count), weight, x_TK, weight.data, start)


def _forward(
    count: int, how: How, x_TK: Array, weight: Blocks, start: Array
) -> tuple[Array, tuple[Blocks, Array]]:
    return _product(count, how, x_TK, weight, start), (weight, start)


def _backward(count: int, how: How, kept: tuple[Blocks, Array], dy_TN: Array) -> tuple[Array, None, None]:
    weight, start = kept
    if how.by == "xla":
        return _matmul(how, dy_TN, weight.float32(start, count)), None, None
    return (
        _call(how, "codegemma_product_t", (len(dy_TN), weight.shape[1]), weight, dy_TN, weight.data, start),
        None,
        None,
    )


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted(how: How, x_TK: Array, weight: Blocks, a_RK: Array, b_NR: Array) -> tuple[Array, Array]:
    """The layer's result, and x a^T, which its gradients need."""
    T, N, R = len(x_TK), weight.shape[0], len(a_RK)
    if how.by == "xla":
        u_TR = _matmul(how, x_TK, a_RK.T)
        return _product(N, how, x_TK, weight, jnp.int32(0)) + _matmul(how, u_TR, b_NR.T), u_TR
    return _call(how, "codegemma_adapted", ((T, N), (T, R)), weight, x_TK, weight.data, a_RK, b_NR)


def _adapted_forward(how: How, x_TK: Array, weight: Blocks, a_RK: Array, b_NR: Array) -> Any:
    y_TN, u_TR = _adapted(how, x_TK, weight, a_RK, b_NR)
    return (y_TN, u_TR), (x_TK, checkpoint_name(u_TR, LOW), weight, a_RK, b_NR)


def _adapted_backward(
    how: How, kept: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, None, Array, Array]:
    x_TK, u_TR, weight, a_RK, b_NR = kept
    dy_TN, _ = cotangents  # nothing but these gradients reads x a^T
    if how.by == "xla":
        du_TR = _matmul(how, dy_TN, b_NR)
        dx_TK = _backward(len(b_NR), how, (weight, jnp.int32(0)), dy_TN)[0] + _matmul(how, du_TR, a_RK)
        return dx_TK, None, _matmul(how, du_TR.T, x_TK), _matmul(how, dy_TN.T, u_TR)
    dx_TK, da_RK, db_NR = _call(
        how,
        "codegemma_adapted_back",
        (x_TK.shape, a_RK.shape, b_NR.shape),
        weight,
        dy_TN,
        x_TK,
        u_TR,
        weight.data,
        a_RK,
        b_NR,
    )
    return dx_TK, None, da_RK, db_NR


_adapted.defvjp(_adapted_forward, _adapted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(how: How, window: np.int32, cap: np.float32, *qkv_and_sight: Array) -> Array:
    return _attention_forward(how, window, cap, *qkv_and_sight)[0]


def _attention_forward(how: How, window: np.int32, cap: np.float32, *qkv_and_sight: Array) -> Any:
    shape_BTNH = qkv_and_sight[0].shape
    out_BTNH, sums_BTN = _ffi(
        how, "codegemma_attention", (shape_BTNH, shape_BTNH[:3]), *qkv_and_sight, window=window, cap=cap
    )
    out_BTNH, sums_BTN = checkpoint_name(out_BTNH, MIXED), checkpoint_name(sums_BTN, EASED)
    return out_BTNH, (sums_BTN, *qkv_and_sight)


def _attention_backward(how: How, window: np.int32, cap: np.float32, kept: Any, d_out_BTNH: Array) -> Any:
    shapes = tuple(x.shape for x in kept[1:4])
    return (
        *_ffi(how, "codegemma_attention_back", shapes, d_out_BTNH, *kept, window=window, cap=cap),
        None,
        None,
    )


_attention.defvjp(_attention_forward, _attention_backward)


def _call(how: How, name: str, shapes: tuple[Any, ...], weight: Blocks, *operands: Array, **told: Any) -> Any:
    return _ffi(how, name, shapes, *operands, type=np.int32(_native.TYPES.index(weight.type)), **told)


def _ffi(how: How, name: str, shapes: tuple[Any, ...], *operands: Array, **told: Any) -> Any:
    """Float32 results of these shapes, or the one of this shape, where no type is told."""
    if not _registered:
        configure()
    results = jax.tree.map(
        lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct) or isinstance(x[0], int),
    )
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return call(*operands, paired=np.int32(how.paired), **told)


def _matmul(how: How, a: Array, b: Array) -> Array:
    if how.paired:
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.matmul(a, b, precision="highest")


def _decode(raw: Array, type: str) -> Array:
    """Rows of blocks (uint8 [n, row bytes]) as float32, as ggml defines them."""
    weights, size = BLOCKS[type]
    b = raw.reshape(len(raw), -1, size)
    floats = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
    if type in floats:
        return lax.bitcast_convert_type(b, floats[type]).astype(jnp.float32)

    def half(at: int) -> Array:
        return lax.bitcast_convert_type(b[..., at : at + 2], jnp.float16).astype(jnp.float32)[..., None]

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
        low = b[..., :128].reshape(*b.shape[:2], 2, 1, 64) >> low_high  # [half, nibble, 64]
        top = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> jnp.array([0, 2, 4, 6], jnp.uint8)[:, None]
        q = (low & 15).reshape(*b.shape[:2], 2, 4, 32) | (top & 3) << 4
        scales = lax.bitcast_convert_type(b[..., 192:208], jnp.int8).astype(jnp.float32)
        return (
            half(208)[..., None]
            * scales[..., None]
            * (q.reshape(*b.shape[:2], 16, 16).astype(jnp.float32) - 32.0)
        )
    p = b[..., 4:16]
    first, second, third = p[..., :4], p[..., 4:8], p[..., 8:]
    scales = jnp.concatenate([first & 63, third & 15 | first >> 6 << 4], -1).astype(jnp.float32)
    mins = jnp.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1).astype(jnp.float32)
    nibbles = b[..., -128:].reshape(*b.shape[:2], 4, 1, 32) >> low_high
    q = (nibbles & 15).reshape(*b.shape[:2], 8, 32)
    if type == "Q5_K":
        q = q | (b[..., None, 16:48] >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1) << 4
    return (half(0) * scales)[..., None] * q.astype(jnp.float32) - (half(2) * mins)[..., None]
