"""The learning rate's schedule, and the update rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax

from codegemma.train.horizon import HEAD
from codegemma.train.settings import TrainingSettings


def schedule(settings: TrainingSettings, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ...: a linear warm-up, then the decay down to the floor."""
    warm = max(1, round(settings.warmup * steps))
    peak, rest = settings.learning_rate, max(1, steps - warm)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.floor),
        "linear": optax.linear_schedule(peak, peak * settings.floor, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.decay]
    return optax.join_schedules([lambda i: peak * (i + 1) / warm, after], [warm])


def optimizer(settings: TrainingSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, after the gradient has been clipped by its norm.

    Embedding rows and the horizon head have a lower rate: a logit is a sum over the width, and Adam's first
    steps move all its terms at once. The default model's last hidden states have an L1 norm of about 2,000,
    so at a rate of 1e-3 a logit would move by two nats per step.
    """
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    rows = partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key in ("rows", HEAD))
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, *settings.betas, weight_decay=settings.weight_decay, mask=matrices),
        optax.masked(optax.scale(settings.row_rate), rows),
    )


def update(
    rule: optax.GradientTransformation, trainable: Any, moments: Any, gradients: Any, count: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """New parameters, new moments, and the gradient's norm; `gradients` are sums over `count` targets."""
    gradients = jax.tree.map(lambda g: g / count, gradients)
    changes, moments = rule.update(gradients, moments, trainable)
    return optax.apply_updates(trainable, changes), moments, optax.tree.norm(gradients)
