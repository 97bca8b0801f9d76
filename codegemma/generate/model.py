"""A model on this machine: what `codegemma.load` gives, and the CLI, the server and the evaluation call."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from codegemma import hub
from codegemma.adapters.adapter import Adapter
from codegemma.adapters.load import load as load_adapter
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.config import Mode, Preset, Trim, Use
from codegemma.generate.engine import Completion, Engine
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.resolve import resolve
from codegemma.generate.sampling import Sampling
from codegemma.generate.trim import trimmed
from codegemma.native import CHUNK, PAGE, Cancel, Native, Slice, measure
from codegemma.prompts import File, Message
from codegemma.tokenizer import Tokenizer

ADAPTERS = (
    Path(__file__).parent.parent / "adapters"
)  # shipped with the package: {preset}-fim completes in the middle


class Model:
    """A loaded model. One request runs at a time; `engine.Batch` runs many together."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        cache_bytes: int = 1 << 30,
        strict: bool = False,
        backend: Literal["native", "jax"] = "native",
    ) -> None:
        self.path, self.config = checkpoint.path, checkpoint.config
        self._checkpoint, self._strict, self._warned = checkpoint, strict, set[str]()
        self._adapters: dict[str, Adapter] = {}
        self.backend = _backend(backend, checkpoint, threads)
        self.engine = Engine(self.backend, checkpoint.tokenizer, identity(checkpoint), cache_bytes)
        self.preset = _preset_of(checkpoint)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the checkpoint came without one: ids work, text does not."""
        if self.engine.tokenizer is None:
            raise ValueError(
                f"{self.path} has no tokenizer, so text cannot be read or written: use ids, or put its "
                "tokenizer.model beside it"
            )
        return self.engine.tokenizer

    @property
    def adapters(self) -> list[str]:
        """Their names; the packaged one from its first use on."""
        return sorted(self._adapters)

    def add_adapter(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Makes an adapter (or the one at a path: PEFT's folder, or NeMo's archive) known to `adapter=` by a name.

        Several may serve at once; the base weights stay as they are. Raises ValueError where it does not fit the model.
        """
        if name in ("", "auto", "none"):
            raise ValueError(f"an adapter cannot be called {name!r}: choose another name")
        made = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
        self.engine.add_adapter(name, made)
        self._adapters[name] = made

    def adapter_at(self, path: str | os.PathLike[str]) -> str:
        """The name of the adapter at a path, added under that of its folder; "auto" is the completing one, "none" the
        base."""
        if path in ("auto", "none"):
            return self.completing_adapter(str(path))
        place = Path(path).resolve()
        name = place.name if place.is_dir() else place.stem
        self.add_adapter(name, place)
        return name

    @cached_property
    def _completing_adapter(self) -> str:
        """The adapter that the package has for this model, or "none", until `prefer` names another."""
        name = f"{self.preset.name}-fim" if self.preset else ""
        can_adapt = hasattr(self.backend, "add_adapter") and self._checkpoint.fim_orders is None
        if not name or not (ADAPTERS / name).is_dir() or not can_adapt:
            return "none"
        packaged = load_adapter(ADAPTERS / name)
        try:
            packaged.check(self.config)
        except ValueError:  # another model's shapes under this one's name
            return "none"
        self.add_adapter(name, packaged)
        return name

    def prefer(self, path: str | os.PathLike[str]) -> None:
        """Makes the adapter at a path the one that "auto" names from now on; see `adapter_at`."""
        self._completing_adapter = self.adapter_at(path)

    def completing_adapter(self, adapter: str = "auto") -> str:
        """The adapter of an Infill: for "auto" the preferred one, else the one that the package has for this model, else
        "none"."""
        return self._completing_adapter if adapter == "auto" else adapter

    def adapter(self, name: str) -> Adapter:
        """One of `adapters`."""
        return self._adapters[name]

    def fim_orders(self, adapter: str = "auto") -> frozenset[str]:
        """The orders, of "psm" and "spm", that it was trained to fill in the middle in: as the adapter's card says, or the
        checkpoint's own mark, else PSM where the preset says so or the vocabulary names the FIM tokens."""
        used = self._adapters.get(self.completing_adapter(adapter))
        if used is not None and (
            orders := frozenset(order for order in ("psm", "spm") if used.trained(order))
        ):
            return orders
        if self._checkpoint.fim_orders:
            return self._checkpoint.fim_orders
        named = self.engine.tokenizer is not None and self.engine.tokenizer.control.fim == "named"
        return frozenset({"psm"}) if (self.preset.fim if self.preset else named) else frozenset()

    @property
    def fim_trained(self) -> bool:
        """Whether it was trained to fill in the middle, its packaged adapter counted in."""
        return bool(self.fim_orders())

    def run(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """Answers a request of any kind. Setting `cancel` in another thread stops the work.

        Raises ValueError on bad input, at once.
        """
        resolved = self.resolve(request)
        return trimmed(self.engine.generate(resolved, cancel), request, resolved.layout)

    def resolve(self, request: Request) -> Request:
        """The request as the engine takes it: token ids, with the adapter, the layout and the stop ids of its kind.

        Warns once (an error if the model is `strict`) where the model was not made for it.
        """
        prompt = request.prompt
        if isinstance(prompt, Infill | Chat) or (
            isinstance(prompt, TextPrompt) and isinstance(prompt.prompt, str)
        ):
            self.tokenizer  # noqa: B018  raises where there is none
        infill = isinstance(prompt, Infill)
        if isinstance(prompt, Infill | Chat):
            self.expect("completion" if infill else "chat")
        adapter = request.adapter
        if adapter == "auto":
            adapter = self.completing_adapter() if infill else "none"
        orders = self.fim_orders(adapter) if infill else frozenset[str]()
        if self._strict and infill and not orders:
            raise ValueError(
                f"{self.preset.title if self.preset else self.path} was made for text that goes on, not trained to "
                "fill in the middle: choose another model (see `codegemma models`) or drop --strict"
            )
        return resolve(self.engine, replace(request, adapter=adapter), orders)

    def complete(
        self,
        prefix: str,
        suffix: str = "",
        path: str | None = None,
        context: Sequence[File | tuple[str, str]] = (),
        *,
        trim: Trim = "none",
        mode: Mode = "auto",
        max_tokens: int = 128,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        time_budget: float | None = None,
        cancel: Cancel | None = None,
        speculate: bool = True,
        top: int = 0,
        adapter: str = "auto",
    ) -> Completion:
        """What belongs between `prefix` and `suffix`. `context` are other files (path, text) that it may draw on.

        `adapter` is "auto" for the one that the package has for this model, "none" for the base, or a name that was
        added. `time_budget` is in seconds, to the first token. Without FIM training, mode "auto" continues the prefix
        and drops what repeats the suffix. Raises ValueError on bad input, at once.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        files = tuple(file if isinstance(file, File) else File(*file) for file in context)
        infill = Infill(prefix, suffix, path, files, mode, trim)
        request = Request(
            infill, max_tokens, sampling, (), stop, top, speculate, adapter, prompt_seconds=time_budget
        )
        return self.run(request, cancel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        raw: bool = False,
        truncate: Literal["left"] | None = None,
        cancel: Cancel | None = None,
        speculate: bool = True,
        top: int = 0,
        adapter: str = "auto",
    ) -> Completion:
        """Continues a text (<bos> is put in front) or ids (taken as they are). `raw` reads control tokens spelled in the
        text. truncate="left" drops the oldest tokens, <bos> excepted, where the prompt is too long."""
        self.expect("generation")
        if truncate not in (None, "left"):
            raise ValueError(f'truncate must be None or "left", got {truncate!r}')
        text = TextPrompt(prompt, raw, truncate is not None)
        return self.run(Request(text, max_tokens, sampling, (), stop, top, speculate, adapter), cancel)

    def chat(
        self,
        messages: Sequence[Message | tuple[str, str] | dict[str, str]],
        *,
        max_tokens: int = 1024,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        cancel: Cancel | None = None,
        speculate: bool = True,
        top: int = 0,
        adapter: str = "auto",
    ) -> Completion:
        """The next turn after `messages`: Message, (role, text), or {"role", "content"}; the last one is the user's.

        Each turn's prompt begins with the one before it, so the cache holds all but the new text.
        """
        conversation = Chat([_message(message) for message in messages])
        request = Request(conversation, max_tokens, sampling, (), stop, top, speculate, adapter)
        return self.run(request, cancel)

    def logits(self, ids: Sequence[int], adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t is the prediction after ids[:t + 1]."""
        return self.engine.logits(ids, adapter=adapter)

    def benchmark(
        self, prompt_tokens: int = 512, decode_tokens: int = 32, repeats: int = 3, adapter: str = "none"
    ) -> dict[str, Any]:
        """Medians of prefill and decode speed, and their share of what this machine's memory and multipliers can do.

        Prefill counts the vocabulary product for the last token only. The limits are measured in the same minutes.
        """
        if not 1 <= prompt_tokens <= self.config.context - decode_tokens or decode_tokens < 1:
            raise ValueError(
                f"benchmark: prompt_tokens + decode_tokens must lie in the context of {self.config.context:,}, "
                f"got {prompt_tokens} + {decode_tokens}"
            )
        if not isinstance(self.backend, Native):
            raise ValueError('benchmark measures the native engine: load the model without backend="jax"')
        ids = [int(token) for token in np.random.default_rng(0).integers(0, self.config.vocab, prompt_tokens)]
        self.backend.use_huge_pages()
        prefills, decodes, limits = [], [], []
        for _ in range(repeats):
            with self.engine.lock:
                limits.append(measure(self.backend.threads, self.backend.level))
                read, decoded = self._timed(ids, decode_tokens, self.engine.adapters[adapter] or None)
            prefills.append(prompt_tokens / read)
            decodes.append(decode_tokens / decoded)
        bandwidth, peak = (float(np.median([limit[i] for limit in limits])) for i in range(2))
        prefill, decode = float(np.median(prefills)), float(np.median(decodes))
        layer_weights = sum(
            float(np.prod(t.shape))
            for name, t in self._checkpoint.tensors.items()
            if name.startswith("layers.") and len(t.shape) == 2
        )
        read_bytes = sum(t.data.nbytes for t in self._checkpoint.tensors.values())
        return {
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "prefill_share_of_peak": 2 * layer_weights * prefill / peak,
            "decode_share_of_bandwidth": read_bytes * decode / bandwidth,
            "bandwidth_bytes_per_second": bandwidth,
            "int8_operations_per_second": peak,
            "threads": self.backend.threads,
            "simd": self.backend.level,
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
        }

    def _timed(self, ids: list[int], decode_tokens: int, adapter: str | None) -> tuple[float, float]:
        """Seconds to read a prompt with nothing cached, and to decode after it."""
        pages = [self.backend.new_page() for _ in range(-(-(len(ids) + decode_tokens) // PAGE))]
        started = time.perf_counter()
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK]
            self.backend.run([Slice(part, at, pages, int(at + len(part) == len(ids)), adapter)])
        read = time.perf_counter()
        for i in range(decode_tokens):
            self.backend.run([Slice([ids[i % len(ids)]], len(ids) + i, pages, 1, adapter)])
        return read - started, time.perf_counter() - read

    def expect(self, use: Use) -> None:
        """Warns once (an error if `strict`) where the model was not made for a use, as its card says."""
        if self.preset is None or use in self.preset.uses or use in self._warned:
            return
        made_for = ", ".join(self.preset.uses)
        text = f"{self.preset.title} was made for {made_for}, not for {use}"
        if self._strict:
            raise ValueError(f"{text}: choose another model (see `codegemma models`) or drop --strict")
        self._warned.add(use)
        warnings.warn(text, stacklevel=3)


def load(
    model: str | os.PathLike[str] = hub.DEFAULT,
    *,
    threads: int | None = None,
    quantize: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int = 1 << 30,
    strict: bool = False,
    backend: Literal["native", "jax"] = "native",
) -> Model:
    """A model by name (`codegemma models` lists them) or path (.gguf, .safetensors, Hugging Face directory).

    `quantize` ("q8_0", "q4_0") turns float weights into blocks while loading; `cache` is a prefix cache saved before.
    `backend`: "native" computes on the CPU, from the file's own blocks; "jax" on a GPU or TPU, with decoded weights.
    Raises ValueError naming what is wrong and what to do.
    """
    checkpoint = open_checkpoint(hub.resolve(os.fspath(model)))
    if quantize is not None:
        from codegemma.convert.quantize import quantize_checkpoint

        checkpoint = quantize_checkpoint(checkpoint, quantize)
    loaded = Model(checkpoint, threads, cache_bytes, strict, backend)
    if cache is not None:
        loaded.engine.cache.load(cache)
    return loaded


def _backend(name: str, checkpoint: Checkpoint, threads: int | None) -> Any:
    if name == "native":
        return Native(checkpoint, threads)
    if name != "jax":
        raise ValueError(f"backend must be native or jax, got {name!r}")
    from codegemma.jax.backend import Jax

    return Jax(checkpoint)


def _message(message: Message | tuple[str, str] | dict[str, str]) -> Message:
    if isinstance(message, Message):
        return message
    pair = (message.get("role"), message.get("content")) if isinstance(message, dict) else message
    role, text = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
    if role == "model":
        role = "assistant"
    if role not in ("system", "user", "assistant") or not isinstance(text, str):
        raise ValueError(f"a chat message needs a role (system, user, assistant) and a text, got {message!r}")
    return Message(role, text)  # type: ignore[arg-type]


def _preset_of(checkpoint: Checkpoint) -> Preset | None:
    """The member of the family that a file is, by its own name or its path; None where nothing tells."""
    names = [
        str(checkpoint.metadata.get(key, "")) for key in ("general.name", "general.basename", "_name_or_path")
    ]
    names += [checkpoint.path.name, checkpoint.path.parent.name]
    return next((found for name in names if (found := hub.preset_in(name, checkpoint.config))), None)


def identity(checkpoint: Checkpoint) -> str:
    """A hash that changes with the model: config, tensor types, and a sample of every tensor's bytes."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name, tensor in checkpoint.tensors.items():
        raw = tensor.data.reshape(-1)
        digest.update(
            f"{name} {tensor.type} {tensor.shape}".encode() + raw[:256].tobytes() + raw[-256:].tobytes()
        )
        digest.update(raw[:: max(1, len(raw) // 64)][:64].tobytes())
    return digest.hexdigest()
