"""How much memory a run will need, stated before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from codegemma.config import ModelConfig
from codegemma.train.loss import CHUNK_BYTES
from codegemma.train.settings import TrainingSettings

MAX_ACTIVATIONS = 3 << 30  # bytes kept for the backward pass; above, remat="auto" means "layer"
PROCESS_BYTES = 500_000_000  # Python, JAX and the compiled steps, about


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds at its peak, by what they hold; the activations are an estimate."""

    base: int  # frozen weights
    weights: int  # trained ones, in float32
    moments: int  # AdamW's, two for each trained weight
    gradients: int  # of a microbatch, the sum over those before it, and the changes made of them
    activations: int  # kept for the backward pass, and a chunk of logits
    checkpoints: int  # the copy that is being written and, for a mean of several, one that is read
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(self).items())
        return f"about {self.total / 1e9:.1f} GB of memory ({parts})"


def activation_bytes(config: ModelConfig, settings: TrainingSettings, length: int) -> int:
    """What a microbatch of rows of `length` tokens keeps for the backward pass.

    The estimate: a layer keeps 8 arrays as wide as the model, 4 as its heads together, 4 as its feed-forward.
    With remat "layer", that is one layer's, and the input of each.
    """
    c = config
    kept = 8 * c.width + 4 * c.heads * c.head_width + 4 * c.ffn_width
    floats = kept + c.layers * c.width if settings.remat == "layer" else c.layers * kept
    return 4 * floats * max(settings.micro_tokens, length)


def choose_remat(settings: TrainingSettings, config: ModelConfig, length: int) -> TrainingSettings:
    """Resolves remat "auto" for rows of `length` tokens: "layer" above MAX_ACTIVATIONS, else "none"."""
    if settings.remat != "auto":
        return settings
    too_many = activation_bytes(config, settings, length) > MAX_ACTIVATIONS
    return replace(settings, remat="layer" if too_many else "none")


def memory_of(
    config: ModelConfig, settings: TrainingSettings, length: int, base: int, trained: int, batch_tokens: int
) -> Memory:
    """The memory of a run whose frozen weights take `base` bytes, and that trains `trained` weights."""
    size, settings = 4 * trained, choose_remat(settings, config, length)
    gradients = 2 * size if batch_tokens <= settings.micro_tokens else 3 * size
    activations = activation_bytes(config, settings, length) + CHUNK_BYTES
    checkpoints = 3 * size if settings.average == 1 else 7 * size  # weights and moments; and the mean
    return Memory(base, size, 2 * size, gradients, activations, checkpoints)
