"""The forward pass of Gemma 1, 2 and 3 in JAX: what is computed, for training, GPU and TPU.

Users call `forward` (hidden states) and `unembed` (logits) on parameters that are a flat dict by our tensor names
(weights.py); a weight is an array, or `Blocks` that stay quantised. The law it keeps: the same logits as the native
engine and the golden files, whether a sequence stands alone, packed with others, or behind a cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.table import ELEMENTS, Tensor, places
from codegemma.config import ModelConfig
from codegemma.convert.quantize import rows_float32
from codegemma.native import xla
from codegemma.native.xla import Blocks

# XLA on a CPU fuses sums wrongly in jaxlib 0.10.2 and 0.11: wrong numbers, or a crash (jax-ml/jax#39103, #39257, #40412).
# Its products stay fused. JAX reads this when it first computes.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if "0.10.2" <= jax.__version__ < "0.12" and FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=-reduce".strip()

Weight = jax.Array | Blocks
Params = dict[str, Weight]
Pair = tuple[jax.Array, jax.Array]
Remat = Literal["none", "products", "layer"]
BATCH_AXES = ("data", "fsdp")  # of a mesh: what divides the batch
QUERIES, PARTS = 128, 8  # of attention: the fewest queries of a part, and the most parts
SAVED = ("q", "k", "v", "o", "gate", "up", "down", xla.LOW, xla.MIXED, xla.EASED)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """An adapter in training: `weights` holds "layers.0.q.a" [r, in], "layers.0.q.b" [out, r] and so on, and "rows"
    [R, D]: what stands in the tied embedding for the token `ids`, as input and as output."""

    weights: dict[str, jax.Array]
    scale: float = field(metadata={"static": True})
    ids: tuple[int, ...] = field(default=(), metadata={"static": True})


class Cache(NamedTuple):
    """Keys and values of all layers; slot s holds position s."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: matrices with variance 1 / in, norm factors 1."""

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        return (
            jnp.ones(shape)
            if name.endswith("norm")
            else jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
        )

    wanted = list(places(config, "hf"))
    return {
        place.name: draw(place.name, place.shape, k)
        for place, k in zip(wanted, jax.random.split(key, len(wanted)), strict=True)
    }


def params_of(
    checkpoint: Checkpoint, dtype: Any = None, blocks: Literal["none", "own", "floats"] = "none"
) -> Params:
    """A checkpoint's parameters. `blocks`: "own" leaves matrices in the file's own type, decoded layer by layer as they are
    used, for the engine's kernels; else they become `dtype` (None: the file's where it is unquantised, else bfloat16), and with
    "floats" the kernels read these. Norms are float32."""

    def convert(name: str, tensor: Any) -> Weight:
        if len(tensor.shape) == 1:
            return jnp.asarray(tensor.float32())
        if blocks == "own" or blocks == "floats" and tensor.type in ELEMENTS:
            return Blocks.of(tensor)
        if blocks == "floats":
            values = _floats(tensor, jnp.bfloat16)
            return Blocks(
                jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(tensor.shape[0], -1), "BF16"
            )
        if tensor.type == "BF16" and dtype in (None, jnp.bfloat16):
            return jnp.asarray(tensor.array().view(jnp.bfloat16))
        return _floats(tensor, dtype or ELEMENTS.get(tensor.type, jnp.bfloat16))  # type: ignore[arg-type]

    return {name: convert(name, tensor) for name, tensor in checkpoint.tensors.items()}


def _floats(tensor: Tensor, dtype: Any) -> jax.Array:
    """Decoded a few rows at a time: float32 of the whole embedding would be gigabytes."""
    step = max(1, (1 << 22) // tensor.shape[1])
    return jnp.concatenate(
        [
            jnp.asarray(rows_float32(tensor, at, min(at + step, tensor.shape[0]))).astype(dtype)
            for at in range(0, tensor.shape[0], step)
        ]
    )


def forward(
    params: Mapping[str, Weight],
    tokens_BT: jax.Array,
    config: ModelConfig,
    lora: Lora | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: Cache | None = None,
    remat: Remat = "none",
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] after the final norm, and the cache with the new tokens in it.

    A token sees the tokens before it in its segment, and with a cache the slots below its position too. `dtype` is that
    of the activations; norms, softmax and sums are float32. `remat` says what the backward pass computes again:
    nothing, all but the matrix products, or whole layers.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    x_BTD = _sharded(embed(params, tokens_BT, lora) * jnp.float32(config.embed_scale)).astype(dtype)
    sight = Sight(positions_BT, segments_BT, cache is not None)
    # behind a barrier: XLA would compute sines and cosines again for every head of every layer
    turns = jax.lax.optimization_barrier(
        [_rotation(config, is_global, positions_BT) for is_global in (False, True)]
    )
    kept = []
    for i in range(config.layers):

        def layer(
            x_BTD: jax.Array,
            own: Mapping[str, Weight],
            low: dict[str, jax.Array] | None,
            pair: Any,
            i: int = i,
        ) -> Any:
            return _layer(
                x_BTD,
                own,
                low,
                lora.scale if lora else 0.0,
                config,
                i,
                sight,
                turns[config.is_global(i)],
                pair,
            )

        if remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*(SAVED if remat == "products" else ()))
            layer = jax.checkpoint(layer, policy=policy)  # type: ignore[assignment]
        pair = (cache.k_LBSKH[i], cache.v_LBSKH[i]) if cache else None
        x_BTD, pair = layer(x_BTD, _own(params, i), _own(lora.weights, i) if lora else None, pair)
        x_BTD = _sharded(x_BTD)
        kept.append(pair)
    x_BTD = rms_norm(x_BTD, params["final_norm"], config.norm_eps)
    return x_BTD, Cache(*(jnp.stack(part) for part in zip(*kept, strict=True))) if cache else None


def embed(params: Mapping[str, Weight], tokens: jax.Array, lora: Lora | None) -> jax.Array:
    """Rows of the embedding, float32 [..., D], those of an adapter's own tokens in their place."""
    table_VD = params["embed"]
    x = (
        xla.decode_rows(table_VD, tokens)
        if isinstance(table_VD, Blocks)
        else table_VD[tokens].astype(jnp.float32)
    )
    if lora is None or not lora.ids:
        return x
    return own_rows(tokens, lora.ids, lora.weights["rows"], x)


def own_rows(tokens: jax.Array, ids: tuple[int, ...], rows_RD: jax.Array, else_: jax.Array) -> jax.Array:
    """An adapter's rows where a token is one of its `ids`."""
    own = among(tokens, ids).astype(rows_RD.dtype)
    return jnp.where(own.any(-1, keepdims=True), own @ rows_RD, else_)


def among(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """[..., R]: whether a token is the r-th of `ids`."""
    return jnp.expand_dims(tokens, -1) == jnp.array(ids, jnp.int32).reshape((1,) * tokens.ndim + (-1,))


def unembed(
    params: Mapping[str, Weight], hidden: jax.Array, config: ModelConfig, lora: Lora | None = None
) -> jax.Array:
    """Logits, float32 [..., V]."""
    logits = product(hidden, params["embed"], jnp.float32)
    if lora is not None and lora.ids:
        own = product(hidden, lora.weights["rows"], jnp.float32)
        logits = logits.at[..., jnp.array(lora.ids)].set(own)
    return softcap(logits, config.final_softcap)


def product(x: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """x [..., in] times W [out, in] transposed: sums in float32, result in x's type or `dtype`."""
    if isinstance(weight, Blocks):
        return xla.product(x, weight).astype(dtype or x.dtype)
    y = jax.lax.dot_general(
        x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y.astype(dtype or x.dtype)


def adapted(x: jax.Array, weight: Weight, a_RI: jax.Array, b_OR: jax.Array) -> jax.Array:
    """x [..., in] times W + b a [out, in], transposed, in x's type."""
    if isinstance(weight, Blocks):
        return xla.adapted(x, weight, a_RI, b_OR).astype(x.dtype)
    return product(x, weight) + product(product(x, a_RI), b_OR)


def rms_norm(x: jax.Array, factor: Any, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    factor = factor.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * factor).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


class Sight(NamedTuple):
    """Who sees whom."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    cached: bool

    def mask_BTS(self, queries: slice, keys: slice, window: int | None) -> jax.Array:
        """Of these queries and these keys."""
        q = self.positions_BT[:, queries, None]
        k = jnp.arange(keys.start, keys.stop)[None, None] if self.cached else self.positions_BT[:, None, keys]
        seen = (k <= q) & (q - k < (window or 1 << 30))
        if self.segments_BT is not None and not self.cached:
            seen &= self.segments_BT[:, queries, None] == self.segments_BT[:, None, keys]
        return seen


def _layer(
    x_BTD: jax.Array,
    w: Mapping[str, Any],
    low: dict[str, jax.Array] | None,
    scale: float,
    config: ModelConfig,
    i: int,
    sight: Sight,
    turn: Pair,
    pair: Pair | None,
) -> tuple[jax.Array, Any]:
    B, T, _ = x_BTD.shape
    H, eps = config.head_width, config.norm_eps

    def linear(x: jax.Array, name: str) -> jax.Array:
        y = (
            adapted(x, w[name], low[f"{name}.a"], scale * low[f"{name}.b"])
            if low and f"{name}.a" in low
            else product(x, w[name])
        )
        return checkpoint_name(y, name)

    a_BTD = rms_norm(x_BTD, w["attn_norm"], eps)
    q_BTNH, k_BTKH, v_BTKH = (linear(a_BTD, name).reshape(B, T, -1, H) for name in "qkv")
    if config.qk_norm:
        q_BTNH, k_BTKH = rms_norm(q_BTNH, w["q_norm"], eps), rms_norm(k_BTKH, w["k_norm"], eps)
    q_BTNH, k_BTKH = rope(q_BTNH, *turn) * jnp.asarray(config.query_scale, x_BTD.dtype), rope(k_BTKH, *turn)
    if pair is not None:
        at = (jnp.arange(B)[:, None], sight.positions_BT)
        pair = (
            pair[0].at[at].set(k_BTKH.astype(pair[0].dtype)),
            pair[1].at[at].set(v_BTKH.astype(pair[1].dtype)),
        )
        k_BTKH, v_BTKH = pair[0].astype(x_BTD.dtype), pair[1].astype(x_BTD.dtype)
    looking = q_BTNH, k_BTKH, v_BTKH, sight, config.layer_window(i), config.attention_softcap
    mixed_BTO = kernel_attend(*looking) if isinstance(w["q"], Blocks) and pair is None else attend(*looking)
    y_BTD = linear(mixed_BTO, "o")
    x_BTD = x_BTD + (rms_norm(y_BTD, w["post_attn_norm"], eps) if config.post_norms else y_BTD)
    a_BTD = rms_norm(x_BTD, w["ffn_norm"], eps)
    y_BTD = linear(jax.nn.gelu(linear(a_BTD, "gate"), approximate=True) * linear(a_BTD, "up"), "down")
    return x_BTD + (rms_norm(y_BTD, w["post_ffn_norm"], eps) if config.post_norms else y_BTD), pair


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sight: Sight,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """Causal attention within segments, [B, T, N * H]. Without a cache, positions rise with the index within a segment, and keys
    that a part of the queries cannot see, behind it or before its window, are left out of its products."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if sight.cached:
        return _attend(q_BTNH, k_BSKH, v_BSKH, sight.mask_BTS(slice(0, T), slice(0, S), window), cap)
    parts, size = [], max(QUERIES, -(-T // PARTS // 16) * 16)  # whole vectors, as of the keys
    for start in range(0, T, size):
        stop = min(start + size, T)
        keys = slice(max(0, (start + 1 - window) // 16 * 16) if window else 0, stop)
        mask_BQS = sight.mask_BTS(slice(start, stop), keys, window)
        parts.append(_attend(q_BTNH[:, start:stop], k_BSKH[:, keys], v_BSKH[:, keys], mask_BQS, cap))
    return checkpoint_name(jnp.concatenate(parts, 1), xla.MIXED)


def kernel_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    sight: Sight,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """`attend` without a cache, by the engine's kernels where there is a CPU for them, and no mesh that divides the batch."""
    if not xla.kernels() or not jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTNH, k_BTKH, v_BTKH, sight, window, cap)
    segments_BT = jnp.ones_like(sight.positions_BT) if sight.segments_BT is None else sight.segments_BT
    mixed_BTNH = xla.attention(q_BTNH, k_BTKH, v_BTKH, sight.positions_BT, segments_BT, window, cap)
    return mixed_BTNH.reshape(*q_BTNH.shape[:2], -1).astype(q_BTNH.dtype)


def _attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, cap: float | None
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    scores = jax.lax.dot_general(
        q_BKGTH,
        k_BSKH.transpose(0, 2, 1, 3),
        (((3,), (3,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    ).reshape(B, K, N // K, T, S)
    scores = jnp.where(mask_BTS[:, None, None], softcap(scores, cap), -1e30)
    weights = jax.nn.softmax(scores, -1).astype(v_BSKH.dtype).reshape(B, K, N // K * T, S)
    mixed = jax.lax.dot_general(
        weights,
        v_BSKH.transpose(0, 2, 1, 3),
        (((3,), (2,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    ).astype(q_BTNH.dtype)
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)


def rope(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotates the pair (j, j + H/2) of each head."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h], -1).astype(
        x_BTNH.dtype
    )


def _rotation(config: ModelConfig, is_global: bool, positions_BT: jax.Array) -> Pair:
    half = config.head_width // 2
    base, scale = (config.rope_base, config.rope_scale) if is_global else (config.rope_base_local, 1.0)
    rates_h = np.exp(-math.log(base) * np.arange(half) / half).astype(np.float32)
    angles = (positions_BT.astype(jnp.float32) / scale)[:, :, None, None] * rates_h[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _own(params: Mapping[str, Any], i: int) -> dict[str, Any]:
    start = f"layers.{i}."
    return {name[len(start) :]: value for name, value in params.items() if name.startswith(start)}


def _sharded(x_BTD: jax.Array) -> jax.Array:
    """Activations are divided by the batch alone where a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x_BTD
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    return jax.lax.with_sharding_constraint(x_BTD, PartitionSpec(axes, None, None))
