"""What a Gemma model is (`ModelConfig`), and the published models: name, repository, uses (`PRESETS`).

The name of an array ends in a letter for each axis, as in `logits_BTV`: B batch, T tokens (in a batch, the
new ones), S visible tokens, D model width, N query heads, K key/value heads, G = N // K, H head width, F
feed-forward width, V vocabulary rows, L layers. A file may add letters for axes of its own, such as R for
rows; a digit is an axis of that fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Architecture = Literal["gemma", "gemma2", "gemma3"]
Use = Literal["completion", "generation", "chat", "instructions"]

# The choices of command line options. They are defined here, in a module that is quick to import, so that
# `--help` need not load the modules that use them.
# Layout of an Infill's prompt; auto: spm if the model was trained in it, else psm if in that, else prefix.
Mode = Literal["auto", "psm", "spm", "prefix"]
Trim = Literal["auto", "none", "line", "block"]  # where an Infill's answer ends
LoadQuantization = Literal["q8_0", "q4_0"]  # of float weights while loading
FloatType = Literal["bf16", "f16", "f32"]
ExportFormat = Literal["gguf", "safetensors", "orbax", "keras", "nemo", "gemma_pytorch"]  # of `convert`
Program = Literal["ollama", "lmstudio", "llamacpp", "transformers", "nemo"]  # of `export`
DownloadSource = Literal["hf", "kaggle", "ngc", "url", "path"]  # of `pull`
DataEngine = Literal["local", "ray"]  # of `data build`

DEFAULT_MODEL = "gemma-3-270m"

# The largest sizes that are accepted: far above every published Gemma, but small enough that a damaged header
# cannot cause a huge allocation.
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
    """The architecture of a model: everything that differs between Gemma 1, 2 and 3.

    A global layer sees all earlier tokens, a local layer the last `window`, including the current one. Every
    `global_every`-th layer is global (1: all of them). Raises ValueError on fields that are invalid or
    contradict each other.
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
        for problem in self._problems():
            raise ValueError(f"model config: {problem}")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_width**-0.5)

    def _problems(self) -> Iterator[str]:
        for field, maximum in LIMITS.items():
            value = getattr(self, field)
            if not isinstance(value, int) or not 1 <= value <= maximum:
                yield (
                    f"{field} must be a whole number from 1 to {maximum:,}, got {value!r}: "
                    "the file's header or config.json is damaged"
                )
        if self.heads % self.kv_heads:
            yield f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
        if self.head_width % 2:
            yield f"head_width must be even for rotary positions, got {self.head_width}"
        every, window = self.global_every, self.window
        if not isinstance(every, int) or every < 1:
            yield f"global_every must be a whole number above 0 (1: all layers are global), got {every!r}"
        if not isinstance(window, (int, type(None))):
            yield f"window must be a whole number of tokens, or None, got {window!r}"
        if every > 1 and not window:
            rule = f"global_every is {every}, so some layers are local and need a window, got {window!r}"
            yield f"{rule}: set window, or global_every to 1"
        optional = ("window", "attention_softcap", "final_softcap")
        for name in (*optional, "query_scale", "norm_eps", "rope_base", "rope_base_local", "rope_scale"):
            number = getattr(self, name)
            if (name in optional and number is None) or (name == "query_scale" and not number):
                continue
            if not isinstance(number, (int, float)) or not 0 < number < 1e18:
                yield f"{name} must be a finite number above 0, got {number!r}"

    @property
    def embed_scale(self) -> float:
        """Factor on the embedding, sqrt(D), not rounded to bfloat16: the engine computes in float32."""
        return math.sqrt(self.width)

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees every earlier token (Gemma 2: layers 1, 3, ...; Gemma 3: 5, 11, ...)."""
        return (layer + 1) % self.global_every == 0

    def layer_window(self, layer: int) -> int | None:
        """How many tokens a layer sees, including the current one; None for all."""
        return None if self.is_global(layer) else self.window

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the 16-bit keys and values of one token in all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_width


@dataclass(frozen=True)
class Preset:
    """A published member of the family, with the uses that its model card names."""

    name: str
    config: ModelConfig
    uses: tuple[Use, ...]
    hub: str  # repository on the Hugging Face Hub
    title: str
    licence: str = "Gemma Terms of Use"
    kaggle: str | None = None  # name of its Flax variation on Kaggle, where it has one
    fim: bool = True  # whether it was trained to fill in the middle


GEMMA_2B = ModelConfig(
    "gemma",
    layers=18,
    width=2048,
    heads=8,
    kv_heads=1,
    head_width=256,
    ffn_width=16_384,
    vocab=256_000,
    context=8_192,
)
GEMMA_7B = replace(GEMMA_2B, layers=28, width=3072, heads=16, kv_heads=16, ffn_width=24_576)
GEMMA2_2B = replace(
    GEMMA_2B,
    architecture="gemma2",
    layers=26,
    width=2304,
    kv_heads=4,
    ffn_width=9216,
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


def _codegemma(name: str, config: ModelConfig, *uses: Use) -> Preset:
    title = f"CodeGemma {name.upper().replace('-', ' ')}"
    kaggle = name if name.endswith("-it") else f"{name}-pt"
    return Preset(name, config, uses, f"google/codegemma-{name}", title, kaggle=kaggle)


_PRESETS = (
    _codegemma("2b", GEMMA_2B, "completion"),
    _codegemma("1.1-2b", GEMMA_2B, "completion"),
    _codegemma("7b", GEMMA_7B, "completion", "generation"),
    _codegemma("7b-it", GEMMA_7B, "generation", "chat", "instructions"),
    _codegemma("1.1-7b-it", GEMMA_7B, "generation", "chat", "instructions"),
    Preset(
        "gemma-3-270m",
        GEMMA3_270M,
        ("completion", "generation"),
        "google/gemma-3-270m",
        "Gemma 3 270M",
        fim=False,
    ),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
