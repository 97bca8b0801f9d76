"""How to train: the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

SAMPLED_VOCABULARY = 32_768  # for TrainingSettings.vocabulary, where the normaliser need not be exact
POSITIVE = ("learning_rate", "clip", "end_weight", "micro_tokens", "evaluate_every", "save_every", "keep")
NOT_NEGATIVE = ("weight_decay", "row_rate", "z", "patience")
SHARES = ("warmup", "floor")


@dataclass(frozen=True)
class TrainingSettings:
    """Rates, schedule, precision and intervals of a run. Raises ValueError on a value that cannot be."""

    learning_rate: float = 1e-3
    warmup: float = 0.03  # share of the steps
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1  # of the rate at the end, as a share of its peak
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0  # of matrices; never of norm factors
    row_rate: float = 1 / 32  # of an adapter's embedding rows, as a share of the rate
    clip: float = 1.0  # largest norm of the gradient
    z: float = 0.0  # weight of the z-loss
    end_weight: float = 1.0  # of a terminator's loss; its logarithm biases the terminator's logit
    vocabulary: int | None = None  # tokens that estimate the normaliser (order.Sample); None: all, exactly
    micro_tokens: int = 2048  # computed at once
    steps: int | None = None  # stop there; the schedule ends there too
    evaluate_every: int = 50
    patience: int = 0  # evaluations without a better loss before the run stops; 0: never
    save_every: int = 20
    keep: int = 2  # checkpoints
    seed: int = 0
    remat: Literal["auto", "none", "products", "layer"] = "none"  # auto: see session.choose_remat
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the factors of products; see native/xla.py

    def __post_init__(self) -> None:
        for name in (*POSITIVE, "steps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        for name in NOT_NEGATIVE:
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
        for name in SHARES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must lie from 0 to 1, got {value!r}")
        for name, hint in get_type_hints(TrainingSettings).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise ValueError(f"{name} must be {', '.join(get_args(hint))}, got {value!r}")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(
                f"vocabulary must be at least 2 tokens, or None for all, got {self.vocabulary!r}"
            )
