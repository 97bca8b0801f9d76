"""Preferences: pairs of answers to one prompt as rows, and the loss that prefers the chosen one (DPO).

The loss of a pair is -log sigmoid(beta m), where m is how much log p(chosen) - log p(rejected) has grown
since training began (arXiv 2305.18290); `likelihood` weighs the chosen answer's mean loss beside it
(arXiv 2404.19733). A pair's two answers are two segments of one row, each after its own copy of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codegemma import prompts
from codegemma.data.pack import fit, places, positions
from codegemma.tokenizer import Tokenizer
from codegemma.train import sft
from codegemma.train.loss import Losses
from codegemma.train.order import Pairs
from codegemma.train.settings import TrainingSettings

FORMS = 'a line needs "prompt", "chosen" and "rejected": lists of token ids, or with --chat texts or messages'
Ids = list[int]


class Pair(NamedTuple):
    """Two answers to a prompt, as ids, each with its stop token where it has one."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def read(path: Path, vocab: int, tokenizer: Tokenizer | None = None) -> tuple[list[Pair], Counter[str]]:
    """(the pairs of a JSON-lines file, how many lines were left out for each reason).

    A line is {"prompt", "chosen", "rejected"}: lists of token ids below `vocab`, taken as they are, so that
    control tokens travel as ids; with a `tokenizer`, texts or lists of messages, as TRL writes them. Raises
    ValueError where no pair is left.
    """
    parse = partial(_of_messages, tokenizer) if tokenizer else partial(_of_ids, vocab)
    return sft.parsed(path, parse, "pair", FORMS)


def _of_ids(vocab: int, line: Mapping[str, Any]) -> Pair:
    pair = Pair(*(line[name] for name in Pair._fields))
    for name, ids in zip(Pair._fields, pair, strict=True):
        if not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
            raise ValueError(f"{name} must be a list of token ids, got {ids!r:.40}")
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise sft.BadLine(f"a token that is not one of the model's {vocab:,}")
    return pair


def _of_messages(tokenizer: Tokenizer, line: Mapping[str, Any]) -> Pair:
    dialogues = [sft.messages({**line, "chosen": line[name]}) for name in ("chosen", "rejected")]
    chosen, rejected = (prompts.chat(tokenizer, dialogue, reply=False) for dialogue in dialogues)
    # the last spans are the answer and the newline after its turn
    (prompt, answer), (other_prompt, other) = (
        ([token for _, ids in chat.spans[:-2] for token in ids], chat.spans[-2][1])
        for chat in (chosen, rejected)
    )
    if prompt != other_prompt:
        raise sft.BadLine("answers to different prompts")
    return Pair(prompt, answer, other)


def rows(pairs: Sequence[Pair], length: int) -> tuple[list[dict[str, np.ndarray]], int]:
    """Rows of `length` tokens, and how many pairs were left out as their two segments do not fit one row.

    The k-th pair of a row, from 0, has the segments 2 k + 1 (chosen) and 2 k + 2 (rejected); the loss is on
    the answers. "reference" [P] has a place for as many pairs as any row holds: what `Session` puts there, or
    NaN where the row has fewer. Raises ValueError where all pairs are left out.
    """
    texts = [[(pair.prompt, answer) for answer in pair[1:]] for pair in pairs]
    sizes = [sum(len(prompt) + len(answer) for prompt, answer in two) for two in texts]
    fitting = [i for i, size in enumerate(sizes) if size <= length]
    if not fitting:
        fault = f"none of {len(pairs):,} pairs fits a row of {length:,} tokens"
        raise ValueError(f"{fault}, which holds the prompt twice: raise --length")
    sizes = [sizes[i] for i in fitting]
    packed = fit(sizes, length)
    max_pairs = max(map(len, packed))
    packed_rows = [
        {
            "tokens": np.zeros(length, np.int32),
            "loss": np.zeros(length, bool),
            "segments": np.zeros(length, np.uint16),
            "reference": np.full(max_pairs, np.nan, np.float32),
        }
        for _ in packed
    ]
    for number, segment, item, place in places(packed, sizes):
        row, start = packed_rows[number], place.start
        row["reference"][segment - 1] = 0
        for side, (prompt, answer) in enumerate(texts[fitting[item]]):
            end = start + len(prompt) + len(answer)
            row["tokens"][start:end] = prompt + answer
            row["loss"][start + len(prompt) : end] = True
            row["segments"][start:end] = 2 * segment - 1 + side
            start = end
    unfit = len(pairs) - len(fitting)
    return [row | {"positions": positions(row["segments"])} for row in packed_rows], unfit


def margins(nats_M: jax.Array, pairs: Pairs) -> jax.Array:
    """float32 [C * P]: log p(chosen) - log p(rejected) of each pair, from the loss of each target."""
    return -_sums(jnp.where(pairs.sign_CM.reshape(-1) == 0, 0, nats_M) * pairs.sign_CM.reshape(-1), pairs)


def loss(nats_M: jax.Array, pairs: Pairs, settings: TrainingSettings) -> tuple[jax.Array, Losses]:
    """The sum over the pairs, and for each pair its loss and whether its chosen answer has gained.

    It has gained if log p(chosen) - log p(rejected) is larger than before training.
    """
    reference_P = pairs.reference_CP.reshape(-1)
    is_pair_P, sign_M = jnp.isfinite(reference_P), pairs.sign_CM.reshape(-1)
    gained_P = jnp.where(is_pair_P, margins(nats_M, pairs) - reference_P, 0)
    losses_P = -jax.nn.log_sigmoid(settings.beta * gained_P)
    if settings.likelihood:
        chosen_M = sign_M > 0
        counts_P = _sums(chosen_M.astype(jnp.float32), pairs)
        losses_P += (
            settings.likelihood * _sums(jnp.where(chosen_M, nats_M, 0), pairs) / jnp.maximum(counts_P, 1)
        )
    return jnp.sum(jnp.where(is_pair_P, losses_P, 0)), Losses(losses_P, gained_P > 0)


def _sums(values_M: jax.Array, pairs: Pairs) -> jax.Array:
    """[C * P]: the sum of the values of each pair's targets."""
    C, P = pairs.reference_CP.shape
    pair_M = (pairs.pair_CM + P * jnp.arange(C, dtype=jnp.int32)[:, None]).reshape(-1)
    return jax.ops.segment_sum(values_M, pair_M, C * P)
