"""A new adapter to train, and a trained one for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.adapters.adapter import LINEAR, Adapter
from codegemma.jax.forward import LoraParams, Params, embed


def new_lora(
    params: Params,
    rank: int,
    ids: Sequence[int] = (),
    alpha: float | None = None,
    seed: int = 0,
    start_from: Sequence[int] = (),
) -> LoraParams:
    """An adapter of all linear layers. `a` is drawn uniformly, as PyTorch initialises them, and `b` is 0.

    Its embedding rows for the tokens `ids` are copies of the rows of `start_from` (default: of `ids`).
    """
    weights: dict[str, jax.Array] = {}
    key = jax.random.key(seed)
    for number, (name, weight) in enumerate(sorted(params.items())):
        if name.split(".")[-1] in LINEAR:
            out, inputs = weight.shape
            limit, layer_key = inputs**-0.5, jax.random.fold_in(key, number)
            weights[f"{name}.a"] = jax.random.uniform(layer_key, (rank, inputs), jnp.float32, -limit, limit)
            weights[f"{name}.b"] = jnp.zeros((out, rank))
    if ids:
        weights["rows"] = embed(params, jnp.asarray(list(start_from) or list(ids)), None)
    return LoraParams(weights, (alpha or rank) / rank, tuple(ids))


def adapter_of(lora: LoraParams, name: str, card: dict[str, Any]) -> Adapter:
    """The trained adapter as the engine loads it."""
    arrays = {key: np.asarray(value, np.float32) for key, value in lora.weights.items()}
    a, b = ({key[:-2]: value for key, value in arrays.items() if key.endswith(end)} for end in (".a", ".b"))
    rank = max((value.shape[0] for value in a.values()), default=1)
    rows = {token: arrays["rows"][i] for i, token in enumerate(lora.ids)}
    return Adapter(name, rank, lora.scale * rank, a, b, rows, card)
