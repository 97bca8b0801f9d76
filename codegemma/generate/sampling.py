"""Chooses a token from logits: the likeliest, or one drawn by a hash of the seed and the token's index.

Callers use `choose` on one row. Because a draw depends only on (seed, index) and no generator has a state,
a seed gives the same text alone or batched, with speculation or without, on any number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LIMITS = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. temperature 0 is greedy (ties: the lowest id).

    The order is penalties, temperature, top_k, top_p, min_p, as in transformers and vLLM; top_k 0, top_p 1
    and min_p 0 are off. `repeat_penalty` above 1 lowers the logit of every token in the context (Keskar et
    al. 2019); Gemma's card advises 1. OpenAI's penalties lower the logits of generated tokens only:
    `presence_penalty` is subtracted once, `frequency_penalty` once for each occurrence. `bias` has pairs
    (id, value): the value is added to the id's logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"sampling: {name} must be from {low} to {high}, got {value}")
        penalty = self.repeat_penalty
        if not (penalty > 0 and math.isfinite(penalty)):
            raise ValueError(f"sampling: repeat_penalty must be above 0, got {penalty}: 1 switches it off")
        for token, value in self.bias:
            if not -100 <= value <= 100:
                raise ValueError(f"sampling: bias must be from -100 to 100, got {value} for token {token}")

    @property
    def needs_logits(self) -> bool:
        """False where the token is always the argmax."""
        penalties = self.repeat_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(self.temperature or penalties or self.bias)


def choose(sampling: Sampling, logits_V: np.ndarray, argmax: int, context: Sequence[int], index: int) -> int:
    """The token after `context`, whose last `index` tokens were generated. Does not change `logits_V`."""
    if not sampling.needs_logits:
        return argmax
    logits_V = logits_V.astype(np.float64)
    if sampling.repeat_penalty != 1:
        tokens = np.unique(np.asarray(context, np.int64))
        values, penalty = logits_V[tokens], sampling.repeat_penalty
        logits_V[tokens] = np.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        generated = np.asarray(context[len(context) - index :], np.int64)
        tokens, counts = np.unique(generated, return_counts=True)
        logits_V[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token, value in sampling.bias:
        if token < len(logits_V):
            logits_V[token] += value
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return _draw(sampling, logits_V / sampling.temperature, _uniform(sampling.seed, index))


def _draw(sampling: Sampling, logits_V: np.ndarray, uniform: float) -> int:
    """Draws a token: `uniform`, in [0, 1), picks from the filtered tokens' cumulative distribution."""
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        weights_V = np.exp(logits_V - logits_V.max())
        return _inverse(np.cumsum(weights_V), uniform * weights_V.sum())
    order, weights, total = _likeliest(sampling, logits_V)
    keep = len(order)
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p * total)) + 1
    if sampling.min_p:
        keep = min(keep, int((weights >= sampling.min_p).sum()))
    cumulative = np.cumsum(weights[: max(keep, 1)])
    return int(order[_inverse(cumulative, uniform * cumulative[-1])])


def _inverse(cumulative: np.ndarray, value: float) -> int:
    """The first index whose cumulative weight is above `value`."""
    return int(np.searchsorted(cumulative, value, "right").clip(0, len(cumulative) - 1))


def _likeliest(sampling: Sampling, logits_V: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """At least the tokens that the filters keep, likeliest first; their weights; the total for `top_p`.

    Sorting the whole vocabulary would take longer than the model's forward pass.
    """
    if sampling.top_k:
        order = top(logits_V, sampling.top_k)
        weights = np.exp(logits_V[order] - logits_V[order[0]])
        return order, weights, float(weights.sum())
    weights_V = np.exp(logits_V - logits_V.max())
    total, size = float(weights_V.sum()), 256
    while True:
        order = top(logits_V, size)
        weights = weights_V[order]
        if size >= len(logits_V) or weights.sum() > sampling.top_p * total or weights[-1] < sampling.min_p:
            return order, weights, total
        size *= 16


def log_sum_exp(values_V: np.ndarray) -> float:
    """log(sum(exp(values_V))), without overflow."""
    highest = float(values_V.max())
    return highest + math.log(float(np.exp(values_V.astype(np.float64) - highest).sum()))


def top(values_V: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest values, largest first; equal values by ascending id."""
    if k < len(values_V):
        bound = np.partition(values_V, len(values_V) - k)[len(values_V) - k]
        ids = np.flatnonzero(values_V >= bound)
    else:
        ids = np.arange(len(values_V))
    return ids[np.lexsort((ids, -values_V[ids]))][:k]


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1), from 53 bits of a hash of (seed, index)."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
