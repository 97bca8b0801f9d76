"""A second loss for fill-in-the-middle: how much of the middle is still to come? (arXiv 2410.03103)

From the hidden state of each token of a middle, a head (a linear map and a sigmoid) predicts the share of the
middle that follows. The model learns to plan its way to the suffix; the head is dropped when the result is
written.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HEAD = "horizon"  # its name among the trained arrays: [D + 1], the weights and the bias
NO_SHARE = -1.0  # of a target that follows no token of a middle


class Middles(NamedTuple):
    """A middle lies between the token `start` and the next of the tokens `ends`, in one segment."""

    start: int
    ends: tuple[int, ...]


def shares(tokens_T: np.ndarray, segments_T: np.ndarray, middles: Middles) -> np.ndarray:
    """float32 [T]: for each target, the share of its middle that comes after the token before it.

    The first token of a middle follows none of its own, so it has NO_SHARE, as have targets outside; the end
    has 0.
    """
    shares_T = np.full(len(tokens_T), NO_SHARE, np.float32)
    ends_at = np.flatnonzero(np.isin(tokens_T, middles.ends))
    for start in np.flatnonzero(tokens_T == middles.start):
        end = next((end for end in ends_at[np.searchsorted(ends_at, start, "right") :]), None)
        if end is not None and segments_T[end] == segments_T[start]:
            size = end - start - 1
            shares_T[start + 2 : end + 1] = np.arange(size)[::-1] / size
    return shares_T


def new_head(width: int) -> jax.Array:
    """A head for hidden states of `width`, which predicts one half."""
    return jnp.zeros(width + 1)


def errors(hidden_MD: jax.Array, shares_M: jax.Array, head: jax.Array) -> jax.Array:
    """float32 [M]: how far the head's predictions lie from the shares; 0 where there is none."""
    logits_M = hidden_MD.astype(jnp.float32) @ head[:-1] + head[-1]
    return jnp.where(shares_M < 0, 0.0, jnp.abs(jax.nn.sigmoid(logits_M) - shares_M))
