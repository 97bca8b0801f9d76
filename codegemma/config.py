"""What a Gemma model is: its architecture as one frozen, checked dataclass, and the published members of the family.

Axis letters used in every name of this package: B batch, T new tokens, S visible tokens, D model width, N query heads,
K key/value heads, G = N // K, H head width, F feed-forward width, V vocabulary rows, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Architecture = Literal["gemma", "gemma2", "gemma3"]
Use = Literal["completion", "generation", "chat", "instructions"]

# Closed sets that the command line offers as choices; it must not import the modules that act on them.
Mode = Literal["auto", "psm", "spm", "prefix"]  # order of a prompt; auto: as it was trained
Trim = Literal["none", "line", "block"]  # how much of a completion is kept
LoadQuantization = Literal["q8_0", "q4_0"]  # of float weights, while loading
FloatType = Literal["bf16", "f16", "f32"]
ExportFormat = Literal["gguf", "safetensors", "orbax", "keras", "nemo", "gemma_pytorch"]  # of `convert`
Program = Literal["ollama", "lmstudio", "llamacpp", "transformers", "nemo"]  # `codegemma export`
DownloadSource = Literal["hf", "kaggle", "ngc", "url", "path"]  # `codegemma pull`
DataEngine = Literal["local", "ray"]  # `codegemma data build`

DEFAULT_MODEL = "gemma-3-270m"

# An absurd value in a file's header must not become an allocation: bounds far above any published Gemma.
LIMITS = {
    "layers": 512,
    "width": 65_536,
    "heads": 1_024,
    "kv_heads": 1_024,
    "head_width": 1_024,
    "ffn_width": 1_048_576,
    "vocab": 4_194_304,
    "context": 16_777_216,
}


@dataclass(frozen=True)
class ModelConfig:
    """One forward path serves Gemma 1, 2 and 3; these fields are all that differs between them.

    `window` is the number of tokens a local layer sees, the current one included; every `global_every`-th layer is
    global (1: all of them). Raises ValueError where the fields contradict each other.
    """

    architecture: Architecture
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocab: int
    context: int
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0  # global layers
    rope_base_local: float = 10_000.0  # layers with a window
    rope_scale: float = 1.0  # global positions are divided by this (Gemma 3 4B and larger: 8)
    window: int | None = None
    global_every: int = 1
    qk_norm: bool = False  # RMSNorm of each query and key head, before RoPE (Gemma 3)
    post_norms: bool = False  # RMSNorm of each block's output, before the residual sum (Gemma 2, 3)
    query_scale: float = 0.0  # factor on q; 0 stands for head_width ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        for field, most in LIMITS.items():
            value = getattr(self, field)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"model config: {field} must be a whole number from 1 to {most:,}, got {value!r}: "
                    "the file's header or config.json is damaged"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model config: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model config: head_width must be even for rotary positions, got {self.head_width}"
            )
        if not isinstance(self.global_every, int) or not isinstance(self.window, (int, type(None))):
            raise ValueError(
                f"model config: global_every ({self.global_every!r}) and window ({self.window!r}) must be "
                "whole numbers"
            )
        if self.global_every < 1 or (self.global_every > 1 and not self.window):
            raise ValueError(
                f"model config: local layers (global_every={self.global_every}) need a window, "
                f"got {self.window!r}"
            )
        positive = {
            "norm_eps": self.norm_eps,
            "rope_base": self.rope_base,
            "rope_base_local": self.rope_base_local,
            "rope_scale": self.rope_scale,
            "query_scale": self.query_scale or 1.0,
        }
        optional = {
            "window": self.window,
            "attention_softcap": self.attention_softcap,
            "final_softcap": self.final_softcap,
        }
        for field, number in (positive | {k: v for k, v in optional.items() if v is not None}).items():
            if not isinstance(number, (int, float)) or not 0 < number < 1e18:
                raise ValueError(f"model config: {field} must be a finite number above 0, got {number!r}")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_width**-0.5)

    @property
    def embed_scale(self) -> float:
        """Factor on the embedding, sqrt(D). The engine computes in float32, so it is not rounded to bfloat16."""
        return math.sqrt(self.width)

    def is_global(self, layer: int) -> bool:
        """True where the layer sees every earlier token (Gemma 2: odd layers; Gemma 3: every sixth)."""
        return (layer + 1) % self.global_every == 0

    def layer_window(self, layer: int) -> int | None:
        return None if self.is_global(layer) else self.window

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float16 keys and values that one token takes in all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_width


@dataclass(frozen=True)
class Preset:
    """A published member of the family and what its model card says that it is for."""

    name: str
    config: ModelConfig
    uses: tuple[Use, ...]
    hub: str  # repository on the Hugging Face Hub
    title: str
    licence: str = "Gemma Terms of Use"
    kaggle: str | None = None  # variation on Kaggle (Flax)
    fim: bool = True  # trained to fill in the middle


def _gemma1(layers: int, width: int, heads: int, kv_heads: int, ffn_width: int) -> ModelConfig:
    return ModelConfig(
        "gemma",
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=256,
        ffn_width=ffn_width,
        vocab=256_000,
        context=8_192,
    )


GEMMA_2B = _gemma1(18, 2048, 8, 1, 16_384)
GEMMA_7B = _gemma1(28, 3072, 16, 16, 24_576)
GEMMA2_2B = ModelConfig(
    "gemma2",
    layers=26,
    width=2304,
    heads=8,
    kv_heads=4,
    head_width=256,
    ffn_width=9216,
    vocab=256_000,
    context=8_192,
    window=4096,
    global_every=2,
    post_norms=True,
    attention_softcap=50.0,
    final_softcap=30.0,
)
GEMMA3_270M = ModelConfig(
    "gemma3",
    layers=18,
    width=640,
    heads=4,
    kv_heads=1,
    head_width=256,
    ffn_width=2048,
    vocab=262_144,
    context=32_768,
    rope_base=1e6,
    window=512,
    global_every=6,
    qk_norm=True,
    post_norms=True,
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("2b", GEMMA_2B, ("completion",), "google/codegemma-2b", "CodeGemma 2B", kaggle="2b-pt"),
        Preset(
            "1.1-2b",
            GEMMA_2B,
            ("completion",),
            "google/codegemma-1.1-2b",
            "CodeGemma 1.1 2B",
            kaggle="1.1-2b-pt",
        ),
        Preset(
            "7b",
            GEMMA_7B,
            ("completion", "generation"),
            "google/codegemma-7b",
            "CodeGemma 7B",
            kaggle="7b-pt",
        ),
        Preset(
            "7b-it",
            GEMMA_7B,
            ("generation", "chat", "instructions"),
            "google/codegemma-7b-it",
            "CodeGemma 7B IT",
            kaggle="7b-it",
        ),
        Preset(
            "1.1-7b-it",
            GEMMA_7B,
            ("generation", "chat", "instructions"),
            "google/codegemma-1.1-7b-it",
            "CodeGemma 1.1 7B IT",
            kaggle="1.1-7b-it",
        ),
        Preset(
            "gemma-3-270m",
            GEMMA3_270M,
            ("completion", "generation"),
            "google/gemma-3-270m",
            "Gemma 3 270M",
            fim=False,
        ),
    )
}
