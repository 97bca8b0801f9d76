"""Next-token loss against a vocabulary of 256,000 rows without ever holding its logits.

`cross_entropy` is what training and evaluation call. One pass over chunks of the vocabulary keeps a running
maximum and sum, as FlashAttention does over keys. The same pass sums the gradient of the hidden states, as
attention sums its values: here the values are the table's rows. So it needs the memory of one chunk of
logits, and with a frozen table only two matrix products per chunk. The law it keeps: loss and gradients equal
those of the dense logits; with a `Sample` of the vocabulary, they estimate them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.jax.forward import LoraParams, Weight, one_hot, product, replace_rows, softcap, table_rows
from codegemma.native import xla
from codegemma.native.xla import SoftmaxSums, StoredMatrix
from codegemma.train.order import Sample

CHUNK_BYTES = 32 << 20  # of float32 logits held at once
BLOCK = 256  # targets that share one pass over the table


class Losses(NamedTuple):
    """Each target's negative log-probability in nats (plus z-loss), and whether it was the likeliest.

    `share_errors_M` are those of the horizon head, where there is one (horizon.errors). Of pairs of answers,
    `preference.loss` gives each pair's loss here, and whether its chosen answer has gained.
    """

    nats_M: jax.Array
    is_top_M: jax.Array
    share_errors_M: jax.Array | None = None


class LossOptions(NamedTuple):
    """The static options of a loss; see `cross_entropy`."""

    ids: tuple[int, ...]  # tokens whose rows of the table an adapter replaces
    cap: float | None
    z: float
    train_table: bool


class LossInputs(NamedTuple):
    """The arrays of a loss; see `cross_entropy`."""

    hidden_MD: jax.Array
    table_VD: Weight
    rows_RD: jax.Array  # the adapter's rows for LossOptions.ids
    targets_M: jax.Array
    real_count: jax.Array | None  # how many of the targets are real; None: all
    sample: Sample | None


class BlockLoss(NamedTuple):
    """The loss of a block of targets, and what its gradients need."""

    nats_M: jax.Array
    is_top_M: jax.Array
    gradient_MD: jax.Array  # of the nats, with respect to the hidden states
    lse_M: jax.Array  # log sum exp of the logits
    lse_gradient_M: jax.Array  # of the nats, with respect to lse_M
    row_logits_MR: jax.Array  # of the adapter's rows


def cross_entropy(
    hidden_MD: jax.Array,
    targets_M: jax.Array,
    table_VD: Weight,
    lora: LoraParams | None = None,
    *,
    count: jax.Array | None = None,
    cap: float | None = None,
    z: float = 0.0,
    train_table: bool = False,
    sample: Sample | None = None,
) -> Losses:
    """The loss of `targets` after `hidden` states.

    With `count`, only the first `count` targets are real; the results of the others are undefined. `cap` is
    the model's soft cap on logits; `z` weighs the squared log of the normaliser (PaLM, section 5). With
    `train_table` the table has a gradient too, at the cost of two more products. With `sample` the normaliser
    is estimated from its tokens. Raises ValueError where both `train_table` and `sample` are set.
    """
    if train_table and sample is not None:
        raise ValueError(
            "a sample of the vocabulary is for a frozen table: train all parameters with the whole vocabulary"
        )
    ids = lora.ids if lora else ()
    rows_RD = lora.weights["rows"] if lora and ids else jnp.zeros((0, hidden_MD.shape[1]), jnp.float32)
    count = None if len(targets_M) % BLOCK else count  # padding is skipped by full blocks, or not at all
    inputs = LossInputs(hidden_MD.astype(jnp.float32), table_VD, rows_RD, targets_M, count, sample)
    return _cross_entropy(LossOptions(ids, cap, z, train_table), inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options: LossOptions, inputs: LossInputs) -> Losses:
    return _forward(options, inputs)[0]


def _forward(options: LossOptions, inputs: LossInputs) -> tuple[Losses, tuple[BlockLoss, LossInputs]]:
    h_MD, table_VD, _, targets_M, count, sample = inputs
    summed_UD = table_VD if sample is None else jax.tree.map(lambda x: x[sample.tokens_U], table_VD)
    if count is None or isinstance(summed_UD, StoredMatrix) and xla.has_kernels():
        result = _block(options, summed_UD, inputs)
    else:

        def part(start: jax.Array | int) -> BlockLoss:
            h_BD, targets_B = (jax.lax.dynamic_slice_in_dim(x, start, BLOCK) for x in (h_MD, targets_M))
            return _block(options, summed_UD, inputs._replace(hidden_MD=h_BD, targets_M=targets_B))

        def write(i: jax.Array, result: BlockLoss) -> BlockLoss:
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * BLOCK, axis=0)
            return jax.tree.map(put, result, part(i * BLOCK))

        shapes = jax.eval_shape(part, 0)
        empty = jax.tree.map(lambda x: jnp.zeros((len(targets_M), *x.shape[1:]), x.dtype), shapes)
        result = jax.lax.fori_loop(0, -(-count // BLOCK), write, empty)
    return Losses(result.nats_M, result.is_top_M), (result, inputs)


def _block(options: LossOptions, summed_UD: Weight, inputs: LossInputs) -> BlockLoss:
    """The loss of a block of targets; the normaliser sums over `summed_UD`: the table, or a sample of it."""
    ids, cap, z, _ = options
    h_MD, table_VD, rows_RD, targets_M, _, _ = inputs
    if isinstance(summed_UD, StoredMatrix) and xla.has_kernels():
        sums = _sums_by_kernels(options, summed_UD, inputs)
    else:
        sums = _sums_by_chunks(options, summed_UD, inputs)
    row_logits_MR = softcap(product(h_MD, rows_RD), cap)
    target_MD = table_rows(table_VD, targets_M)
    if ids:
        sums = _add(sums, row_logits_MR, jnp.array(ids, jnp.int32), 1.0, rows_RD, cap)
        target_MD = replace_rows(targets_M, ids, rows_RD, target_MD)
    logit_M = softcap(jnp.sum(h_MD * target_MD, -1), cap)
    lse_M = sums.max_M + jnp.log(sums.sum_M)
    lse_gradient_M = 1 + 2 * z * lse_M
    gradient_MD = sums.weighted_MD * (lse_gradient_M / sums.sum_M)[:, None]
    gradient_MD -= target_MD * _slope(logit_M, cap)[:, None]
    nats_M, is_top_M = lse_M - logit_M + z * lse_M**2, sums.best_M == targets_M
    return BlockLoss(nats_M, is_top_M, gradient_MD, lse_M, lse_gradient_M, row_logits_MR)


def _add(
    sums: SoftmaxSums,
    logits_MC: jax.Array,
    tokens_C: jax.Array,
    counts_C: jax.Array | float,
    rows_CD: jax.Array,
    cap: float | None,
) -> SoftmaxSums:
    """Adds the logits of C more tokens, and their rows, to the sums; each token counts `counts_C` times."""
    max_M = jnp.maximum(sums.max_M, logits_MC.max(-1))
    best_M = jnp.where(max_M > sums.max_M, tokens_C[logits_MC.argmax(-1)], sums.best_M)
    weights_MC, shrink_M = counts_C * jnp.exp(logits_MC - max_M[:, None]), jnp.exp(sums.max_M - max_M)
    sum_M = sums.sum_M * shrink_M + weights_MC.sum(-1)
    weighted_MD = sums.weighted_MD * shrink_M[:, None] + (weights_MC * _slope(logits_MC, cap)) @ rows_CD
    return SoftmaxSums(max_M, best_M, sum_M, weighted_MD)


def _sums_by_chunks(options: LossOptions, summed_UD: Weight, inputs: LossInputs) -> SoftmaxSums:
    """Softmax sums over the rows of `summed_UD`, except tokens whose rows the adapter replaces."""
    ids, cap, _, _ = options
    h_MD, sample = inputs.hidden_MD, inputs.sample
    M, D = h_MD.shape

    def chunk(sums: SoftmaxSums, start: jax.Array, size: int) -> SoftmaxSums:
        if sample is None:
            tokens_C, counts_C = start + jnp.arange(size, dtype=jnp.int32), jnp.ones(())
        else:
            tokens_C, counts_C = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in sample)
        rows_CD = _chunk_rows(summed_UD, start, size)
        logits_MC = _replace_columns(ids, softcap(product(h_MD, rows_CD), cap), tokens_C, -jnp.inf)
        return _add(sums, logits_MC, tokens_C, counts_C, rows_CD, cap)

    empty = SoftmaxSums(jnp.full(M, -jnp.inf), jnp.zeros(M, jnp.int32), jnp.zeros(M), jnp.zeros((M, D)))
    return _over_chunks(summed_UD.shape[0], M, chunk, empty)


def _sums_by_kernels(options: LossOptions, summed_UD: StoredMatrix, inputs: LossInputs) -> SoftmaxSums:
    """The sums of `_sums_by_chunks` for the real targets, by the engine's kernels."""
    rows, count = summed_UD.shape[0], inputs.real_count
    tokens_U, counts_U = inputs.sample or (jnp.arange(rows, dtype=jnp.int32), jnp.ones(rows))
    counts_U = jnp.where(one_hot(tokens_U, options.ids).any(-1), 0.0, counts_U)
    used = len(inputs.hidden_MD) if count is None else count
    sums = xla.vocabulary_softmax(inputs.hidden_MD, summed_UD, counts_U, options.cap, used)
    return sums._replace(best_M=tokens_U[sums.best_M])


def _backward(
    options: LossOptions, saved: tuple[BlockLoss, LossInputs], cotangents: Losses
) -> tuple[LossInputs]:
    block, inputs = saved
    ids, cap = options.ids, options.cap
    g_M = cotangents.nats_M[:, None]
    logits_MR, h_MD = block.row_logits_MR, inputs.hidden_MD
    logit_gradient_MR = jnp.exp(logits_MR - block.lse_M[:, None]) * block.lse_gradient_M[:, None]
    logit_gradient_MR -= one_hot(inputs.targets_M, ids).astype(jnp.float32)
    rows_gradient_RD = (g_M * logit_gradient_MR * _slope(logits_MR, cap)).T @ h_MD
    zeros = jax.tree.map(_no_gradient, inputs)
    gradients = zeros._replace(hidden_MD=g_M * block.gradient_MD, rows_RD=rows_gradient_RD)
    if options.train_table:
        gradients = gradients._replace(table_VD=_table_gradient(options, block, inputs, g_M))
    return (gradients,)


_cross_entropy.defvjp(_forward, _backward)


def _table_gradient(options: LossOptions, block: BlockLoss, inputs: LossInputs, g_M: jax.Array) -> jax.Array:
    """[V, D]: the gradient of the table, from that of the nats [M, 1]; the logits are computed once more."""
    ids, cap = options.ids, options.cap
    h_MD, table_VD = inputs.hidden_MD, inputs.table_VD

    def chunk(gradient_VD: jax.Array, start: jax.Array, size: int) -> jax.Array:
        tokens_C = start + jnp.arange(size, dtype=jnp.int32)
        logits_MC = softcap(product(h_MD, _chunk_rows(table_VD, start, size)), cap)
        counted_MC = _replace_columns(ids, logits_MC, tokens_C, -jnp.inf)
        logit_gradient_MC = jnp.exp(counted_MC - block.lse_M[:, None]) * block.lse_gradient_M[:, None]
        logit_gradient_MC -= (inputs.targets_M[:, None] == tokens_C[None]).astype(jnp.float32)
        logit_gradient_MC *= _slope(logits_MC, cap) * g_M
        logit_gradient_MC = _replace_columns(ids, logit_gradient_MC, tokens_C, 0.0)
        gradient_CD = (logit_gradient_MC.T @ h_MD).astype(gradient_VD.dtype)
        return jax.lax.dynamic_update_slice(gradient_VD, gradient_CD, (start, 0))

    empty = jnp.zeros(table_VD.shape, table_VD.dtype)  # type: ignore[union-attr]
    return _over_chunks(table_VD.shape[0], len(h_MD), chunk, empty)


def _slope(logits: jax.Array, cap: float | None) -> jax.Array:
    """The soft cap's derivative, from its result; 0 for a logit of -inf."""
    return jnp.ones_like(logits) if cap is None else 1 - jnp.minimum((logits / cap) ** 2, 1)


def _replace_columns(
    ids: tuple[int, ...], values_MC: jax.Array, tokens_C: jax.Array, value: float
) -> jax.Array:
    """The values, with `value` in the columns of tokens whose rows an adapter replaces."""
    return jnp.where(one_hot(tokens_C, ids).any(-1)[None], value, values_MC)


def _over_chunks(V: int, M: int, chunk: Callable[..., Any], carry: Any) -> Any:
    """Folds `chunk(carry, start, size)` over the vocabulary: full chunks in a loop, then the rest."""
    size = min(V, max(512, CHUNK_BYTES // (4 * M) // 512 * 512))
    full = V // size
    carry = jax.lax.fori_loop(0, full, lambda i, carry: chunk(carry, i * size, size), carry)
    return chunk(carry, full * size, V - full * size) if V % size else carry


def _chunk_rows(table_VD: Weight, start: jax.Array, size: int) -> jax.Array:
    """float32 [C, D]: `size` rows of the table from `start`."""
    if isinstance(table_VD, StoredMatrix):
        return table_VD.float32(start, size)
    return jax.lax.dynamic_slice(table_VD, (start, 0), (size, table_VD.shape[1])).astype(jnp.float32)


def _no_gradient(x: jax.Array) -> jax.Array | np.ndarray:
    """A gradient of 0 for `x`, which for integers JAX wants as float0."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    return np.zeros(x.shape, jax.dtypes.float0)
