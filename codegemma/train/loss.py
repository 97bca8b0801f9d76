"""Next-token loss against a vocabulary of 256,000 rows without ever holding its logits.

`cross_entropy` is what training and evaluation call. One pass over chunks of the vocabulary keeps a running maximum and
sum, as attention does over keys, and sums the gradient of the hidden states beside them (there the rows of the table
are the values), so a chunk of logits is all the memory it takes, and with a frozen table all the work: two products.
The law it keeps: loss and gradients of the dense logits; with a `Sample` of the vocabulary, their estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.jax.forward import Lora, Weight, among, own_rows, product, softcap
from codegemma.native import xla
from codegemma.native.xla import Blocks, Sums
from codegemma.train.order import Sample

CHUNK_BYTES = 32 << 20  # of float32 logits held at once
BLOCK = 256  # targets that share one pass over the table


class Losses(NamedTuple):
    """Of each target: nats of its negative log-probability (the z-loss on top), and whether it was the likeliest."""

    nats_M: jax.Array
    right_M: jax.Array


def cross_entropy(
    hidden_MD: jax.Array,
    targets_M: jax.Array,
    table_VD: Weight,
    lora: Lora | None = None,
    *,
    count: jax.Array | None = None,
    cap: float | None = None,
    z: float = 0.0,
    train_table: bool = False,
    sample: Sample | None = None,
) -> Losses:
    """Loss of `targets` after `hidden` states. `count`: only so many of them count (what the others give
    means nothing). `cap` is the model's soft cap on logits; `z` weighs the squared log of the normaliser (PaLM,
    section 5). `train_table`: the table has a gradient too, at the price of two more products. `sample`: the normaliser from
    these tokens alone. Raises ValueError where both are wanted."""
    if train_table and sample is not None:
        raise ValueError(
            "a sample of the vocabulary is for a frozen table: train all parameters with the whole vocabulary"
        )
    ids = lora.ids if lora else ()
    rows_RD = lora.weights["rows"] if lora and ids else jnp.zeros((0, hidden_MD.shape[1]), jnp.float32)
    if count is None or len(targets_M) % BLOCK:
        count = None
    return Losses(
        *_cross_entropy(
            ids,
            cap,
            z,
            train_table,
            hidden_MD.astype(jnp.float32),
            table_VD,
            rows_RD,
            targets_M,
            count,
            sample,
        )
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _cross_entropy(ids, cap, z, train_table, hidden_MD, table_VD, rows_RD, targets_M, count, sample):  # type: ignore[no-untyped-def]
    return _ahead(ids, cap, z, train_table, hidden_MD, table_VD, rows_RD, targets_M, count, sample)[0]


def _ahead(ids, cap, z, train_table, h_MD, table_VD, rows_RD, targets_M, count, sample):  # type: ignore[no-untyped-def]
    summed_SD = table_VD if sample is None else jax.tree.map(lambda x: x[sample.numbers_S], table_VD)
    block = partial(_block, ids, cap, z, table_VD, rows_RD, sample, summed_SD)
    if isinstance(summed_SD, Blocks) and xla.kernels():
        made = block(len(h_MD) if count is None else count, h_MD, targets_M)
    elif count is None:
        made = block(None, h_MD, targets_M)
    else:

        def one(i: jax.Array, made: _Block) -> _Block:
            cut = [jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK) for x in (h_MD, targets_M)]
            return jax.tree.map(
                lambda all, x: jax.lax.dynamic_update_slice_in_dim(all, x, i * BLOCK, 0),
                made,
                block(None, *cut),
            )

        empty = jax.tree.map(
            lambda x: jnp.zeros((len(targets_M), *x.shape[1:]), x.dtype),
            jax.eval_shape(block, None, h_MD[:BLOCK], targets_M[:BLOCK]),
        )
        made = jax.lax.fori_loop(0, -(-count // BLOCK), one, empty)
    return (made.nats_M, made.right_M), (made, h_MD, table_VD, rows_RD, targets_M, count, sample)


class _Block(NamedTuple):
    """What a block of targets gives, and what its gradients need."""

    nats_M: jax.Array
    right_M: jax.Array
    gradient_MD: jax.Array  # of the nats, with respect to the hidden states
    lse_M: jax.Array
    pull_M: jax.Array
    own_MR: jax.Array  # logits of the adapter's own tokens


def _block(
    ids: tuple[int, ...],
    cap: float | None,
    z: float,
    table_VD: Weight,
    rows_RD: jax.Array,
    sample: Sample | None,
    summed_SD: Weight,
    used: jax.Array | int | None,
    h_MD: jax.Array,
    targets_M: jax.Array,
) -> _Block:
    """`summed_SD` has the rows that the normaliser sums over: the table's, or those of the sample. `used`: the kernels are to sum,
    for so many targets."""
    M, D = h_MD.shape

    def add(
        sums: Sums,
        logits_MC: jax.Array,
        numbers_C: jax.Array,
        back: Callable[[jax.Array], jax.Array],
        counts_C: jax.Array | float,
    ) -> Sums:
        """`back` multiplies [M, C] by the rows behind the logits."""
        most_M = jnp.maximum(sums.most_M, logits_MC.max(-1))
        best_M = jnp.where(most_M > sums.most_M, numbers_C[logits_MC.argmax(-1)], sums.best_M)
        weights_MC, shrink_M = counts_C * jnp.exp(logits_MC - most_M[:, None]), jnp.exp(sums.most_M - most_M)
        return Sums(
            most_M,
            best_M,
            sums.sum_M * shrink_M + weights_MC.sum(-1),
            sums.mean_MD * shrink_M[:, None] + back(weights_MC * _slope(logits_MC, cap)),
        )

    def chunk(sums: Sums, start: jax.Array, size: int) -> Sums:
        if sample is None:
            numbers_C, counts_C = start + jnp.arange(size, dtype=jnp.int32), jnp.ones(())
        else:
            numbers_C, counts_C = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in sample)
        forward, back = _rows(summed_SD, start, size)
        logits_MC = _without(ids, softcap(forward(h_MD), cap), numbers_C)
        return add(sums, logits_MC, numbers_C, back, counts_C)

    if used is not None and isinstance(summed_SD, Blocks):
        sums = _by_kernels(ids, cap, sample, summed_SD, used, h_MD)
    else:
        sums = Sums(jnp.full(M, -jnp.inf), jnp.zeros(M, jnp.int32), jnp.zeros(M), jnp.zeros((M, D)))
        sums = _over_chunks(summed_SD.shape[0], M, chunk, sums)
    own_MR = softcap(product(h_MD, rows_RD), cap)
    if ids:
        sums = add(sums, own_MR, jnp.array(ids, jnp.int32), lambda w: w @ rows_RD, 1.0)
    target_MD = _target_rows(ids, table_VD, rows_RD, targets_M)
    logit_M = softcap(jnp.sum(h_MD * target_MD, -1), cap)
    lse_M = sums.most_M + jnp.log(sums.sum_M)
    pull_M = 1 + 2 * z * lse_M
    gradient_MD = sums.mean_MD * (pull_M / sums.sum_M)[:, None] - target_MD * _slope(logit_M, cap)[:, None]
    return _Block(
        lse_M - logit_M + z * lse_M**2, sums.best_M == targets_M, gradient_MD, lse_M, pull_M, own_MR
    )


def _behind(ids, cap, z, train_table, kept, cotangents):  # type: ignore[no-untyped-def]
    (_, _, gradient_MD, lse_M, pull_M, own_MR), h_MD, table_VD, rows_RD, targets_M, count, sample = kept
    g_M = cotangents[0]
    push_MR = jnp.exp(own_MR - lse_M[:, None]) * pull_M[:, None] - among(targets_M, ids).astype(jnp.float32)
    rows_gradient_RD = (g_M[:, None] * push_MR * _slope(own_MR, cap)).T @ h_MD
    table_gradient = jax.tree.map(_no_gradient, table_VD)
    if train_table:

        def chunk(gradient_VD: jax.Array, start: jax.Array, size: int) -> jax.Array:
            numbers_C = start + jnp.arange(size, dtype=jnp.int32)
            logits_MC = softcap(_rows(table_VD, start, size)[0](h_MD), cap)
            push_MC = jnp.exp(_without(ids, logits_MC, numbers_C) - lse_M[:, None]) * pull_M[:, None]
            push_MC -= (targets_M[:, None] == numbers_C[None]).astype(jnp.float32)
            push_MC *= _slope(logits_MC, cap) * g_M[:, None]
            if ids:
                push_MC = _without(ids, push_MC, numbers_C, 0.0)
            return jax.lax.dynamic_update_slice(
                gradient_VD, (push_MC.T @ h_MD).astype(gradient_VD.dtype), (start, 0)
            )

        table_gradient = _over_chunks(
            table_VD.shape[0], len(h_MD), chunk, jnp.zeros(table_VD.shape, table_VD.dtype)
        )
    return (
        g_M[:, None] * gradient_MD,
        table_gradient,
        rows_gradient_RD,
        *jax.tree.map(_no_gradient, (targets_M, count, sample)),
    )


_cross_entropy.defvjp(_ahead, _behind)


def _slope(logits: jax.Array, cap: float | None) -> jax.Array:
    """Derivative of the soft cap, from its result; 0 where a column does not count."""
    return jnp.ones_like(logits) if cap is None else 1 - jnp.minimum((logits / cap) ** 2, 1)


def _without(
    ids: tuple[int, ...], logits_MC: jax.Array, numbers_C: jax.Array, value: float = -jnp.inf
) -> jax.Array:
    """Columns of the tokens whose rows an adapter replaces do not count."""
    return (
        jnp.where(jnp.isin(numbers_C, jnp.array(ids, jnp.int32))[None], value, logits_MC)
        if ids
        else logits_MC
    )


def _over_chunks(V, M, chunk, carry):  # type: ignore[no-untyped-def]
    """Folds `chunk(carry, start, size)` over the vocabulary: whole chunks in a loop, then what is left."""
    size = min(V, max(512, CHUNK_BYTES // (4 * M) // 512 * 512))
    whole = V // size
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: chunk(carry, i * size, size), carry)
    return chunk(carry, whole * size, V - whole * size) if V % size else carry


def _by_kernels(
    ids: tuple[int, ...],
    cap: float | None,
    sample: Sample | None,
    summed_SD: Blocks,
    used: jax.Array | int,
    h_MD: jax.Array,
) -> Sums:
    numbers_S, counts_S = sample or (
        jnp.arange(summed_SD.shape[0], dtype=jnp.int32),
        jnp.ones(summed_SD.shape[0]),
    )
    sums = xla.vocabulary(h_MD, summed_SD, jnp.where(among(numbers_S, ids).any(-1), 0.0, counts_S), cap, used)
    return sums._replace(best_M=numbers_S[sums.best_M])


def _rows(table_VD: Weight, start: jax.Array, size: int):  # type: ignore[no-untyped-def]
    """Products with `size` rows of the table from `start`: [M, D] -> [M, C], and back."""
    if isinstance(table_VD, Blocks):
        return tuple(
            partial(do, weight=table_VD, start=start, count=size) for do in (xla.product, xla.product_t)
        )
    rows_CD = jax.lax.dynamic_slice(table_VD, (start, 0), (size, table_VD.shape[1])).astype(jnp.float32)
    return (lambda h_MD: product(h_MD, rows_CD)), (lambda w_MC: w_MC @ rows_CD)


def _target_rows(
    ids: tuple[int, ...], table_VD: Weight, rows_RD: jax.Array, targets_M: jax.Array
) -> jax.Array:
    rows_MD = (
        xla.decode_rows(table_VD, targets_M)
        if isinstance(table_VD, Blocks)
        else table_VD[targets_M].astype(jnp.float32)
    )
    return own_rows(targets_M, ids, rows_RD, rows_MD) if ids else rows_MD


def _no_gradient(x: jax.Array) -> jax.Array | np.ndarray:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    return np.zeros(x.shape, jax.dtypes.float0)
