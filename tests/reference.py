"""The slow twin: the forward pass of Gemma 1, 2 and 3 in float64 NumPy, one line per equation of the papers.

Nothing here is shared with the package but `ModelConfig`. Names and shapes of the parameters:

    embed [V, D]   final_norm [D]
    layers.{i}.{q [N*H, D]  k, v [K*H, D]  o [D, N*H]  gate, up [F, D]  down [D, F]}
    layers.{i}.{attn_norm, ffn_norm, post_attn_norm, post_ffn_norm} [D]   layers.{i}.{q_norm, k_norm} [H]

A norm's weight is the factor itself: checkpoints that store it minus one have had the one added.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from codegemma.config import ModelConfig

Array = np.ndarray
Dot = Callable[[Array, Array], Array]
FLOAT32 = 2.0**-24  # unit roundoff


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model."""
    D, F, H = config.width, config.ffn_width, config.head_width
    q, kv = config.heads * H, config.kv_heads * H
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,),
        "q": (q, D),
        "k": (kv, D),
        "v": (kv, D),
        "o": (D, q),
        "ffn_norm": (D,),
        "gate": (F, D),
        "up": (F, D),
        "down": (D, F),
    }
    if config.qk_norm:
        layer |= {"q_norm": (H,), "k_norm": (H,)}
    if config.post_norms:
        layer |= {"post_attn_norm": (D,), "post_ffn_norm": (D,)}
    layers = {f"layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}
    return {"embed": (config.vocab, D), "final_norm": (D,), **layers}


def random_params(config: ModelConfig, seed: int) -> dict[str, Array]:
    """Float32 parameters from the seed and each tensor's name alone, so that golden files need not hold them.

    Rows keep the variance of what they multiply, norms lie in [0.5, 2), where subtracting one is exact in
    float32, and the attention projections are doubled so that the softmax is neither flat nor one-hot.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(shape) == 1:
            return rng.uniform(0.5, 1.9375, shape).astype(np.float32)
        gain = 2.0 if name.endswith((".q", ".k")) else 1.0
        return (rng.standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes(config).items()}


def golden(kind: str) -> tuple[ModelConfig, dict[str, Array], Array, Array]:
    """Config, float32 parameters, ids [T] and transformers' logits [T, V], from tools/make_golden.py."""
    file = np.load(Path(__file__).parent / "golden" / f"{kind}.npz")
    config = ModelConfig(**json.loads(str(file["config"])))
    return config, random_params(config, int(file["seed"])), file["ids"], file["logits"]


def dot(x: Array, w: Array) -> Array:
    """x [..., T, n] times w [..., m, n]: [..., T, m]."""
    return x @ w.swapaxes(-1, -2)


def logits(
    config: ModelConfig,
    params: Mapping[str, Array],
    ids: ArrayLike,
    dot: Dot = dot,
    trace: dict[str, Array] | None = None,
) -> Array:
    """Float64 logits [T, V]. `trace`, if given, receives the activations by name (`layers.0.q_TNH`, ...)."""
    trace = {} if trace is None else trace
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x_TD = trace["embed_TD"] = p["embed"][np.asarray(ids)] * config.embed_scale
    for i in range(config.layers):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
        act: dict[str, Array] = {}
        out_TD = attention(config, i, layer, rms_norm(x_TD, layer["attn_norm"], config), dot, act)
        x_TD = x_TD + (rms_norm(out_TD, layer["post_attn_norm"], config) if config.post_norms else out_TD)
        out_TD = ffn(layer, rms_norm(x_TD, layer["ffn_norm"], config), dot)
        x_TD = x_TD + (rms_norm(out_TD, layer["post_ffn_norm"], config) if config.post_norms else out_TD)
        trace |= {f"layers.{i}.{name}": value for name, value in (act | {"out_TD": x_TD}).items()}
    return softcap(dot(rms_norm(x_TD, p["final_norm"], config), p["embed"]), config.final_softcap)


def attention(
    config: ModelConfig, i: int, p: Mapping[str, Array], x_TD: Array, dot: Dot, act: dict[str, Array]
) -> Array:
    T, N, K, H = len(x_TD), config.heads, config.kv_heads, config.head_width
    q_TNH, k_TKH, v_TKH = (dot(x_TD, p[name]).reshape(T, -1, H) for name in "qkv")
    if config.qk_norm:
        q_TNH, k_TKH = rms_norm(q_TNH, p["q_norm"], config), rms_norm(k_TKH, p["k_norm"], config)
    q_TNH, k_TKH = rope(config, i, q_TNH) * config.query_scale, rope(config, i, k_TKH)
    q_KGTH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
    k_K1SH, v_K1HS = k_TKH.transpose(1, 0, 2)[:, None], v_TKH.transpose(1, 2, 0)[:, None]
    back = np.arange(T)[:, None] - np.arange(T)
    visible_TS = (back >= 0) & (back < (config.layer_window(i) or T))
    scores_KGTS = np.where(visible_TS, softcap(dot(q_KGTH, k_K1SH), config.attention_softcap), -np.inf)
    e_KGTS = np.exp(scores_KGTS - scores_KGTS.max(-1, keepdims=True))
    mix_TNH = dot(e_KGTS / e_KGTS.sum(-1, keepdims=True), v_K1HS).transpose(2, 0, 1, 3).reshape(T, N, H)
    act |= {"q_TNH": q_TNH, "k_TKH": k_TKH, "v_TKH": v_TKH, "mix_TNH": mix_TNH}
    return dot(mix_TNH.reshape(T, -1), p["o"])


def ffn(p: Mapping[str, Array], x_TD: Array, dot: Dot) -> Array:
    gate_TF = dot(x_TD, p["gate"])
    gelu_TF = gate_TF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate_TF + 0.044715 * gate_TF**3)))
    return dot(gelu_TF * dot(x_TD, p["up"]), p["down"])


def rms_norm(x: Array, weight: Array, config: ModelConfig) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm_eps) * weight


def rope(config: ModelConfig, i: int, x_TNH: Array) -> Array:
    """Rotates the pair (j, j + H/2) of each head by position * base ** (-2j / H)."""
    T, half = len(x_TNH), config.head_width // 2
    base, scale = (
        (config.rope_base, config.rope_scale) if config.is_global(i) else (config.rope_base_local, 1.0)
    )
    angle_T1h = (np.arange(T) / scale)[:, None, None] * base ** (-np.arange(half) / half)
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    cos, sin = np.cos(angle_T1h), np.sin(angle_T1h)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def tolerance(
    config: ModelConfig,
    params: Mapping[str, Array],
    ids: ArrayLike,
    roundoff: float = FLOAT32,
    draws: int = 3,
) -> float:
    """How far logits may lie from this twin's when dot products have the given unit roundoff.

    A sum of n rounded products errs with a standard deviation below roundoff * |x| * |w|. That error is put
    on each dot product of the twin, which carries it to the logits with the model's own conditioning (a
    norm-wise bound would grow with |W| at every layer); the result is 4 times the largest difference in a few
    draws.
    """
    exact = logits(config, params, ids)

    def rounded(rng: np.random.Generator) -> Dot:
        def noisy(x: Array, w: Array) -> Array:
            norms = dot(np.linalg.norm(x, axis=-1, keepdims=True), np.linalg.norm(w, axis=-1, keepdims=True))
            return dot(x, w) + roundoff * norms * rng.standard_normal(norms.shape)

        return noisy

    return 4 * max(
        float(np.abs(logits(config, params, ids, rounded(np.random.default_rng(draw))) - exact).max())
        for draw in range(draws)
    )
