"""What a step minimises, its gradient, and its cost in floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from codegemma.config import ModelConfig
from codegemma.jax.forward import LoraParams, Params, forward
from codegemma.train import horizon, preference
from codegemma.train.loss import Losses, cross_entropy
from codegemma.train.order import Microbatch, Sample
from codegemma.train.settings import TrainingSettings

Trainable = LoraParams | Params


def weights_of(trainable: Trainable) -> dict[str, Any]:
    """The trained arrays by name."""
    return trainable.weights if isinstance(trainable, LoraParams) else trainable


def with_weights(trainable: Trainable, weights: dict[str, Any]) -> Trainable:
    """`trainable` with other arrays."""
    return replace(trainable, weights=weights) if isinstance(trainable, LoraParams) else weights


@dataclass(frozen=True)
class Objective:
    """What a step minimises: next-token loss, in which a stop token counts `settings.stop_weight` times.

    With `settings.horizon` the loss of the horizon head is added to it, with that weight. For rows of pairs
    it minimises preference.loss instead.

    In all methods, `trainable` is an adapter or layers over the frozen `base`, or all parameters.
    """

    config: ModelConfig
    settings: TrainingSettings
    stop_ids: tuple[int, ...] = ()

    def loss(
        self, trainable: Trainable, base: Params | None, batch: Microbatch, sample: Sample | None = None
    ) -> tuple[jax.Array, Losses]:
        """The sum that is minimised, and the losses of the targets, unweighted, or of the pairs."""
        settings = self.settings
        hidden_MD, losses = self._losses(trainable, base, batch, sample)
        if batch.pairs is not None:
            return preference.loss(losses.nats_M, batch.pairs, settings)
        real_M = (jnp.arange(batch.index_CM.shape[1]) < batch.count_C[:, None]).reshape(-1)
        is_stop_M = jnp.isin(batch.targets_CM.reshape(-1), jnp.asarray(self.stop_ids, jnp.int32))
        total = jnp.sum(losses.nats_M * real_M * jnp.where(is_stop_M, settings.stop_weight, 1.0))
        if settings.horizon:
            head = weights_of(trainable)[horizon.HEAD]
            errors_M = horizon.errors(hidden_MD, batch.shares_CM.reshape(-1), head)
            total += settings.horizon * errors_M.sum()
            losses = losses._replace(share_errors_M=errors_M)
        return total, losses

    def gradient(
        self, trainable: Trainable, base: Params | None, batch: Microbatch, sample: Sample | None = None
    ) -> tuple[tuple[jax.Array, Losses], Trainable]:
        """(the result of `loss`, its gradient for `trainable`), in the settings' precision."""
        with jax.default_matmul_precision(self.settings.precision):
            return jax.value_and_grad(self.loss, has_aux=True)(trainable, base, batch, sample)

    def margins(self, trainable: Trainable, base: Params | None, batch: Microbatch) -> jax.Array:
        """float32 [C * P]: log p(chosen) - log p(rejected) of each pair, in the settings' precision."""
        assert batch.pairs is not None
        with jax.default_matmul_precision(self.settings.precision):
            return preference.margins(self._losses(trainable, base, batch, None)[1].nats_M, batch.pairs)

    def _losses(
        self, trainable: Trainable, base: Params | None, batch: Microbatch, sample: Sample | None
    ) -> tuple[jax.Array, Losses]:
        """(the hidden states before the targets [C * M, D], the losses of the targets)."""
        config, settings = self.config, self.settings
        lora = trainable if isinstance(trainable, LoraParams) else None
        params: Params = base if lora is not None else trainable  # type: ignore[assignment]
        remat: Any = settings.remat  # "auto" has been resolved by memory.choose_remat
        hidden_BTD, _ = forward(
            params,
            batch.tokens_BT,
            config,
            lora,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            remat=remat,
            dtype=jnp.dtype(settings.dtype),
        )
        C, M = batch.index_CM.shape
        hidden_CPD = hidden_BTD.reshape(C, -1, config.width)
        hidden_MD = jnp.take_along_axis(hidden_CPD, batch.index_CM[..., None], 1).reshape(C * M, -1)
        targets_M = batch.targets_CM.reshape(-1)
        losses = cross_entropy(
            hidden_MD,
            targets_M,
            params["embed"],
            lora,
            count=batch.count_C[0] if C == 1 else None,
            cap=config.final_softcap,
            z=settings.z,
            train_table=lora is None,
            sample=sample,
        )
        return hidden_MD, losses


def flops_of(config: ModelConfig, tokens: int, length: int, targets: int, trained: Trainable) -> float:
    """Floating-point operations that a step needs, without recomputation.

    With W weights in the layers, a token costs 2 W forward, and backward 2 W where they are frozen or 4 W
    where they are trained. N heads of width H that attend to `length` keys (at most the layer's window) cost
    half of 4 N H `length` per token and layer, as they are causal, and three times that with the gradient.
    With V rows of width D in the vocabulary, a target costs 4 V D, or 8 V D where the table is trained.
    """
    c, weights = config, weights_of(trained)
    layers, table = "layers.0.q" in weights, "embed" in weights
    layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_width + 3 * c.width * c.ffn_width
    visible = sum(min(length, c.layer_window(i) or length) for i in range(c.layers))
    attention = 2 * 3 * c.heads * c.head_width * visible
    head = targets * (8 if table else 4) * c.vocab * c.width
    return tokens * ((6 if layers else 4) * c.layers * layer + attention) + head
