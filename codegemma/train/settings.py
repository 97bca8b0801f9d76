"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args, get_origin, get_type_hints

SAMPLED_VOCABULARY = 32_768  # for TrainingSettings.vocabulary, where the normaliser need not be exact
POSITIVE = (
    "learning_rate",
    "clip",
    "stop_weight",
    "micro_tokens",
    "evaluate_every",
    "save_every",
    "keep",
    "average",
)
NOT_NEGATIVE = ("weight_decay", "row_rate", "z", "horizon", "likelihood", "patience")
RULES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    ((*POSITIVE, "steps"), lambda value: value > 0, "be above 0"),
    (("beta",), lambda value: 0 < value < inf, "be finite and above 0"),
    (NOT_NEGATIVE, lambda value: 0 <= value < inf, "be finite and at least 0"),
    (("warmup", "floor"), lambda value: 0 <= value <= 1, "lie from 0 to 1"),
    (("vocabulary",), lambda value: value >= 2, "be at least 2 tokens, or None for all"),
)


@dataclass(frozen=True)
class TrainingSettings:
    """Rates, schedule, precision and intervals of a run. Raises ValueError on an invalid value."""

    learning_rate: float = 1e-3
    warmup: float = 0.03  # share of the steps
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1  # the rate at the end, as a share of its peak
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0  # of matrices; never of norm factors
    row_rate: float = 1 / 32  # the rate of trained embedding rows, as a share of the rate
    clip: float = 1.0  # largest norm of the gradient
    z: float = 0.0  # weight of the z-loss
    horizon: float = 0.0  # weight of the loss of horizon.py; the paper's is 0.1
    beta: float = 0.1  # of the loss of preference.py: how soon a preference is strong enough
    likelihood: float = 0.0  # weight of the chosen answer's mean loss, beside that of preference.py
    stop_weight: float = 1.0  # weight w of the loss at a stop token; it raises that logit by about log w
    vocabulary: int | None = None  # tokens that estimate the normaliser (order.Sample); None: all, exactly
    micro_tokens: int = 2048  # of a microbatch
    steps: int | None = None  # at most so many; the schedule ends there too
    evaluate_every: int = 50  # steps between measurements on held-out rows
    patience: int = 0  # evaluations without a better loss before the run stops; 0: never
    save_every: int = 20  # steps between checkpoints
    keep: int = 2  # how many of the newest checkpoints to keep
    average: int = 1  # the result is the mean of the weights at this many of the newest checkpoints
    seed: int = 0
    remat: Literal["auto", "none", "products", "layer"] = "none"  # auto: see memory.choose_remat
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of a matrix product's factors; see native/xla.py

    def __post_init__(self) -> None:
        for names, allows, rule in RULES:
            for name in names:
                if (value := getattr(self, name)) is not None and not allows(value):
                    raise ValueError(f"{name} must {rule}, got {value!r}")
        if self.average > self.keep + 1:
            fault = (
                f"average {self.average} needs {self.average - 1} older checkpoints, but {self.keep} are kept"
            )
            raise ValueError(f"{fault}: raise keep, or lower average")
        for name, hint in get_type_hints(TrainingSettings).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                raise ValueError(f"{name} must be {', '.join(get_args(hint))}, got {value!r}")
