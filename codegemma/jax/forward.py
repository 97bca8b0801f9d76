"""The forward pass of Gemma 1, 2 and 3 in JAX, for training and for GPU and TPU.

`forward` gives hidden states and `unembed` logits. Parameters are a flat dict by the names of
checkpoints/table.py; a weight is an array, or a `StoredMatrix` that stays quantised. The law it keeps: the
same logits as the native engine and the golden files, whether a sequence stands alone, is packed with others,
or follows a cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.tensors import ELEMENTS, Tensor
from codegemma.config import ModelConfig
from codegemma.native import LowRank, dequantize, xla
from codegemma.native.xla import StoredMatrix

Weight = jax.Array | StoredMatrix
Params = dict[str, Weight]
Pair = tuple[jax.Array, jax.Array]
Remat = Literal["none", "products", "layer"]
Matrices = Literal["arrays", "stored", "stored_floats"]  # see params_of
BATCH_AXES = ("data", "fsdp")  # axes of a mesh that divide the batch
# Attention runs in parts of at least MIN_QUERIES queries, but no more than MAX_PARTS of them.
MIN_QUERIES, MAX_PARTS = 128, 8
# The names of what remat="products" keeps for the backward pass.
SAVED = ("q", "k", "v", "o", "gate", "up", "down", xla.LOW_RANK, xla.ATTENDED, xla.LOG_SUM_EXP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraParams:
    """What is trained over a frozen base, as JAX arrays: an adapter, or the weights of all layers.

    `weights` holds "layers.0.q.a" [r, in], "layers.0.q.b" [out, r] and so on, and "rows" [R, D]: the rows
    that replace those of the tied embedding for the tokens `ids`, as input and as output. `scale` multiplies
    b a. A float32 array under a parameter's own name, such as "layers.0.q" or "final_norm", takes the place
    of the base's, which may lack it.
    """

    weights: dict[str, jax.Array]
    scale: float = field(metadata={"static": True})
    ids: tuple[int, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, adapter: LowRank, dtype: Any = jnp.float32) -> LoraParams:
        """A loaded adapter with matrices of `dtype`; its embedding rows stay float32."""
        ids = tuple(sorted(adapter.rows))
        weights = {f"{name}.a": jnp.asarray(value, dtype) for name, value in adapter.a.items()}
        weights |= {f"{name}.b": jnp.asarray(value, dtype) for name, value in adapter.b.items()}
        if ids:
            weights["rows"] = jnp.asarray(np.stack([adapter.rows[token] for token in ids]))
        return cls(weights, adapter.scale, ids)


class Cache(NamedTuple):
    """Keys and values of all layers; slot s holds position s."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array


class AttentionMask(NamedTuple):
    """Which keys a query sees: those of its segment, up to its position, within the layer's window.

    With `cached`, the key in slot s is that of position s, and segments are ignored.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    cached: bool
    window: int | None = None

    def mask_BTS(self, queries: slice, keys: slice) -> jax.Array:
        """bool [B, queries, keys]: whether the query sees the key."""
        q = self.positions_BT[:, queries, None]
        k = jnp.arange(keys.start, keys.stop)[None, None] if self.cached else self.positions_BT[:, None, keys]
        visible = (k <= q) & (q - k < (self.window or 1 << 30))
        if self.segments_BT is not None and not self.cached:
            visible &= self.segments_BT[:, queries, None] == self.segments_BT[:, None, keys]
        return visible


def params_of(checkpoint: Checkpoint, dtype: Any = None, matrices: Matrices = "arrays") -> Params:
    """A checkpoint's parameters; norms are float32.

    `matrices` says how they are held. "arrays": as arrays of `dtype` (default: the file's float type,
    bfloat16 where it is quantised). "stored": as a `StoredMatrix` of the file's type, which the kernels
    decode as they multiply. "stored_floats": as a `StoredMatrix` too, but where the file is quantised, of
    bfloat16.
    """

    def convert(tensor: Any) -> Weight:
        if len(tensor.shape) == 1:
            return jnp.asarray(tensor.float32())
        if matrices == "stored" or matrices == "stored_floats" and tensor.type in ELEMENTS:
            return StoredMatrix.of(tensor)
        if matrices == "stored_floats":
            raw = jax.lax.bitcast_convert_type(_decoded(tensor, jnp.bfloat16), jnp.uint8)
            return StoredMatrix(raw.reshape(tensor.shape[0], -1), "BF16")
        if tensor.type == "BF16" and dtype in (None, jnp.bfloat16):
            return jnp.asarray(tensor.array().view(jnp.bfloat16))
        return _decoded(tensor, dtype or ELEMENTS.get(tensor.type, jnp.bfloat16))  # type: ignore[arg-type]

    return {name: convert(tensor) for name, tensor in checkpoint.tensors.items()}


def _decoded(tensor: Tensor, dtype: Any) -> jax.Array:
    """A matrix in `dtype`, decoded a few rows at a time: the embedding in float32 would be gigabytes."""
    rows, columns = tensor.shape
    step = max(1, (1 << 22) // columns)
    parts = (dequantize(tensor.rows(start, min(start + step, rows))) for start in range(0, rows, step))
    return jnp.concatenate([jnp.asarray(part).astype(dtype) for part in parts])


def forward(
    params: Mapping[str, Weight],
    tokens_BT: jax.Array,
    config: ModelConfig,
    lora: LoraParams | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    remat: Remat = "none",
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] after the final norm, and the cache with the new tokens in it.

    A token sees itself and the tokens before it in its segment; with a cache, all slots up to its position,
    and segments are ignored. `dtype` is that of the activations; norms, softmax and sums are float32. `remat`
    says what the backward pass recomputes: nothing, all but the matrix products, or whole layers.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    x_BTD = _sharded(embed(params, tokens_BT, lora) * jnp.float32(config.embed_scale)).astype(dtype)
    # behind a barrier: XLA would compute sines and cosines again for every head of every layer
    rotations = jax.lax.optimization_barrier(
        [_rotation(config, is_global, positions_BT) for is_global in (False, True)]
    )
    policy = jax.checkpoint_policies.save_only_these_names(*(SAVED if remat == "products" else ()))
    lora_weights, scale = (lora.weights, lora.scale) if lora else ({}, 0.0)
    kv_L = []
    for i in range(config.layers):
        mask = AttentionMask(positions_BT, segments_BT, cache is not None, config.layer_window(i))
        rotation = rotations[config.is_global(i)]
        layer: Any = partial(_layer, config=config, mask=mask, rotation=rotation, scale=scale)
        if remat != "none":
            layer = jax.checkpoint(layer, policy=policy)
        kv = (cache.k_LBSKH[i], cache.v_LBSKH[i]) if cache else None
        x_BTD, kv = layer(x_BTD, _of_layer(params, i), _of_layer(lora_weights, i), kv)
        x_BTD = _sharded(x_BTD)
        kv_L.append(kv)
    x_BTD = rms_norm(x_BTD, {**params, **lora_weights}["final_norm"], config.norm_eps)
    return x_BTD, Cache(*(jnp.stack(part) for part in zip(*kv_L, strict=True))) if cache else None


def embed(params: Mapping[str, Weight], tokens: jax.Array, lora: LoraParams | None) -> jax.Array:
    """float32 [..., D]: rows of the embedding, with an adapter's rows in the place of those it replaces."""
    x = table_rows(params["embed"], tokens)
    return x if lora is None or not lora.ids else replace_rows(tokens, lora.ids, lora.weights["rows"], x)


def table_rows(table_VD: Weight, tokens: jax.Array) -> jax.Array:
    """float32 [..., D]: the tokens' rows of a table."""
    if isinstance(table_VD, StoredMatrix):
        return xla.decode_rows(table_VD, tokens)
    return table_VD[tokens].astype(jnp.float32)


def replace_rows(tokens: jax.Array, ids: tuple[int, ...], rows_RD: jax.Array, x: jax.Array) -> jax.Array:
    """`x` [..., D] with the r-th of `rows_RD` where a token is the r-th of `ids`."""
    matches = one_hot(tokens, ids).astype(rows_RD.dtype)
    return jnp.where(matches.any(-1, keepdims=True), matches @ rows_RD, x)


def one_hot(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """bool [..., R]: whether a token is the r-th of `ids`."""
    return jnp.expand_dims(tokens, -1) == jnp.array(ids, jnp.int32).reshape((1,) * tokens.ndim + (-1,))


def unembed(
    params: Mapping[str, Weight], hidden: jax.Array, config: ModelConfig, lora: LoraParams | None = None
) -> jax.Array:
    """Logits, float32 [..., V]."""
    logits = product(hidden, params["embed"], jnp.float32)
    if lora is not None and lora.ids:
        adapted_logits = product(hidden, lora.weights["rows"], jnp.float32)
        logits = logits.at[..., jnp.array(lora.ids)].set(adapted_logits)
    return softcap(logits, config.final_softcap)


def product(x: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """x [..., in] times W [out, in] transposed; sums in float32, the result in x's type or `dtype`."""
    if isinstance(weight, StoredMatrix):
        return xla.product(x, weight).astype(dtype or x.dtype)
    axes = ((x.ndim - 1,), (1,)), ((), ())
    y = jax.lax.dot_general(x, weight.astype(x.dtype), axes, preferred_element_type=jnp.float32)
    return y.astype(dtype or x.dtype)


def adapted(x: jax.Array, weight: Weight, a_RI: jax.Array, b_OR: jax.Array) -> jax.Array:
    """x [..., in] times (W + b a) [out, in] transposed, in x's type."""
    if isinstance(weight, StoredMatrix):
        return xla.adapted(x, weight, a_RI, b_OR).astype(x.dtype)
    return product(x, weight) + product(product(x, a_RI), b_OR)


def trained_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` with a float32 weight that is trained, by the engine's kernels; on a mesh by JAX alone."""
    if not jax.sharding.get_abstract_mesh().empty:
        return product(x, weight)
    return xla.dense(x, weight).astype(x.dtype)


def rms_norm(x: jax.Array, factor: Any, eps: float) -> jax.Array:
    """x [..., D] over its root mean square (plus `eps` under the root), times `factor` [D]; in float32."""
    wide = x.astype(jnp.float32)
    factor = factor.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * factor).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Gemma 2's soft cap, cap * tanh(x / cap)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _layer(
    x_BTD: jax.Array,
    weights: Mapping[str, Any],
    lora: Mapping[str, jax.Array],
    kv: Pair | None,
    *,
    config: ModelConfig,
    mask: AttentionMask,
    rotation: Pair,
    scale: float,
) -> tuple[jax.Array, Pair | None]:
    """A layer's output, and its cached keys and values [B, S, K, H] with the new tokens in them."""
    B, T, _ = x_BTD.shape
    eps, dtype = config.norm_eps, x_BTD.dtype
    weights = {**weights, **lora}

    def linear(x: jax.Array, name: str) -> jax.Array:
        if f"{name}.a" in lora:
            y = adapted(x, weights[name], lora[f"{name}.a"], scale * lora[f"{name}.b"])
        elif name in lora:
            y = trained_product(x, lora[name])
        else:
            y = product(x, weights[name])
        return checkpoint_name(y, name)

    a_BTD = rms_norm(x_BTD, weights["attn_norm"], eps)
    q_BTNH, k_BTKH, v_BTKH = (linear(a_BTD, name).reshape(B, T, -1, config.head_width) for name in "qkv")
    if config.qk_norm:
        q_BTNH, k_BTKH = rms_norm(q_BTNH, weights["q_norm"], eps), rms_norm(k_BTKH, weights["k_norm"], eps)
    q_BTNH, k_BTKH = rope(q_BTNH, *rotation) * jnp.asarray(config.query_scale, dtype), rope(k_BTKH, *rotation)
    if kv is not None:
        slots = (jnp.arange(B)[:, None], mask.positions_BT)
        kv = tuple(
            old.at[slots].set(new.astype(old.dtype)) for old, new in zip(kv, (k_BTKH, v_BTKH), strict=True)
        )  # type: ignore[assignment]
        k_BTKH, v_BTKH = (x.astype(dtype) for x in kv)  # type: ignore[union-attr]
    by_kernels = kv is None and (isinstance(weights["q"], StoredMatrix) or "q" in lora)
    attention = kernel_attend if by_kernels else attend
    y_BTD = linear(attention(q_BTNH, k_BTKH, v_BTKH, mask, config.attention_softcap), "o")
    x_BTD = x_BTD + (rms_norm(y_BTD, weights["post_attn_norm"], eps) if config.post_norms else y_BTD)
    a_BTD = rms_norm(x_BTD, weights["ffn_norm"], eps)
    y_BTD = linear(jax.nn.gelu(linear(a_BTD, "gate"), approximate=True) * linear(a_BTD, "up"), "down")
    return x_BTD + (rms_norm(y_BTD, weights["post_ffn_norm"], eps) if config.post_norms else y_BTD), kv


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask, cap: float | None
) -> jax.Array:
    """Causal attention within segments, [B, T, N * H]; `cap` is the soft cap of scores.

    Without a cache, positions rise with the index within a segment. So each part of the queries is multiplied
    by the keys from the start of its window to its own end; it can see no others.
    """
    T, S, window = q_BTNH.shape[1], k_BSKH.shape[1], mask.window
    if mask.cached:
        return attend_at_once(q_BTNH, k_BSKH, v_BSKH, mask.mask_BTS(slice(0, T), slice(0, S)), cap)
    parts, size = [], max(MIN_QUERIES, -(-T // MAX_PARTS // 16) * 16)  # multiples of a vector's 16 floats
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        keys = slice(max(0, (start + 1 - window) // 16 * 16) if window else 0, queries.stop)
        mask_BQS = mask.mask_BTS(queries, keys)
        parts.append(attend_at_once(q_BTNH[:, queries], k_BSKH[:, keys], v_BSKH[:, keys], mask_BQS, cap))
    return checkpoint_name(jnp.concatenate(parts, 1), xla.ATTENDED)


def kernel_attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: AttentionMask, cap: float | None
) -> jax.Array:
    """`attend` without a cache, by the engine's kernels; on a mesh, or without kernels, by JAX alone."""
    if not xla.has_kernels() or not jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTNH, k_BTKH, v_BTKH, mask, cap)
    positions_BT, segments_BT = mask.positions_BT, mask.segments_BT
    segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
    mixed_BTNH = xla.attention(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, mask.window, cap)
    return mixed_BTNH.reshape(*q_BTNH.shape[:2], -1).astype(q_BTNH.dtype)


def attend_at_once(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, cap: float | None
) -> jax.Array:
    """Attention of all queries to all keys, [B, T, N * H]; the mask says which keys count."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    q_BKQH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores_BKQS = dot(q_BKQH, k_BSKH.transpose(0, 2, 1, 3), (((3,), (3,)), ((0, 1), (0, 1))))
    scores_BKGTS = softcap(scores_BKQS.reshape(B, K, G, T, S), cap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -1e30)
    weights_BKQS = jax.nn.softmax(scores_BKGTS, -1).astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    mixed_BKQH = dot(weights_BKQS, v_BSKH.transpose(0, 2, 1, 3), (((3,), (2,)), ((0, 1), (0, 1))))
    mixed_BKGTH = mixed_BKQH.astype(q_BTNH.dtype).reshape(B, K, G, T, H)
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)


def rope(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotary position embedding: rotates the pair (j, j + H/2) of each head."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h], -1)
    return rotated.astype(x_BTNH.dtype)


def _rotation(config: ModelConfig, is_global: bool, positions_BT: jax.Array) -> Pair:
    """Cosines and sines, [B, T, 1, H/2], of a global or a local layer."""
    half = config.head_width // 2
    base, scale = (config.rope_base, config.rope_scale) if is_global else (config.rope_base_local, 1.0)
    rates_h = np.exp(-math.log(base) * np.arange(half) / half).astype(np.float32)
    angles = (positions_BT.astype(jnp.float32) / scale)[:, :, None, None] * rates_h[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _of_layer(params: Mapping[str, Any], i: int) -> dict[str, Any]:
    """One layer's parameters by their short names ("q", "attn_norm", ...)."""
    start = f"layers.{i}."
    return {name[len(start) :]: value for name, value in params.items() if name.startswith(start)}


def _sharded(x_BTD: jax.Array) -> jax.Array:
    """Divides activations over the batch axes of the mesh, where one is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x_BTD
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    return jax.lax.with_sharding_constraint(x_BTD, PartitionSpec(axes, None, None))
