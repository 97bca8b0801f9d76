"""A model on this machine: what `codegemma.load` returns, and the command line, server and evaluation use."""

from __future__ import annotations

import os
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
from codegemma.native import Cancel, Native
from codegemma.prompts import File, Message
from codegemma.tokenizer import Tokenizer

# Shipped with the package: the folder {preset}-fim completes in the middle.
ADAPTERS = Path(__file__).parent.parent / "adapters"


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
        self.checkpoint, self.path, self.config = checkpoint, checkpoint.path, checkpoint.config
        self._strict, self._warned = strict, set[str]()
        self._adapters: dict[str, Adapter] = {}
        self.backend = _backend(backend, checkpoint, threads)
        self.engine = Engine(self.backend, checkpoint.tokenizer, checkpoint.identity, cache_bytes)
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
        """The names that were added; the packaged adapter's from its first use on."""
        return sorted(self._adapters)

    def adapter(self, name: str) -> Adapter:
        """One of `adapters`."""
        return self._adapters[name]

    def add_adapter(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Makes an adapter (or the one at a path: PEFT's folder, or NeMo's archive) known to `adapter=` by a
        name.

        Several may serve at once; the base weights stay as they are. Raises ValueError where it does not fit
        the model.
        """
        if name in ("", "auto", "none"):
            raise ValueError(f"an adapter cannot be called {name!r}: choose another name")
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
        self.engine.add_adapter(name, loaded)
        self._adapters[name] = loaded

    def adapter_at(self, path: str | os.PathLike[str]) -> str:
        """The name of the adapter at a path, added under that of its folder. "auto" is the completing
        adapter, "none" the base."""
        if path in ("auto", "none"):
            return self.completing_adapter(str(path))
        folder = Path(path).resolve()
        name = folder.name if folder.is_dir() else folder.stem
        self.add_adapter(name, folder)
        return name

    def prefer(self, path: str | os.PathLike[str]) -> None:
        """Makes the adapter at a path the one that "auto" names from now on; see `adapter_at`."""
        self._completing_adapter = self.adapter_at(path)

    def completing_adapter(self, adapter: str = "auto") -> str:
        """The adapter of an Infill: for "auto" the preferred one, else the packaged one, else "none"."""
        return self._completing_adapter if adapter == "auto" else adapter

    @cached_property
    def _completing_adapter(self) -> str:
        """The packaged adapter of this model, or "none", until `prefer` names another."""
        name = f"{self.preset.name}-fim" if self.preset else ""
        can_adapt = hasattr(self.backend, "add_adapter") and self.checkpoint.fim_orders is None
        if not name or not (ADAPTERS / name).is_dir() or not can_adapt:
            return "none"
        packaged = load_adapter(ADAPTERS / name)
        try:
            packaged.check(self.config)
        except ValueError:  # another model's shapes under this one's name
            return "none"
        self.add_adapter(name, packaged)
        return name

    def fim_orders(self, adapter: str = "auto") -> frozenset[str]:
        """The FIM orders, of "psm" and "spm", that it was trained in: as the adapter's card says, or the
        checkpoint's own mark, else PSM where the preset says so or the vocabulary names the FIM tokens."""
        applied = self._adapters.get(self.completing_adapter(adapter))
        if applied and (orders := frozenset(order for order in ("psm", "spm") if applied.trained(order))):
            return orders
        if self.checkpoint.fim_orders:
            return self.checkpoint.fim_orders
        is_named = self.engine.tokenizer is not None and self.engine.tokenizer.control.fim == "named"
        return frozenset({"psm"}) if (self.preset.fim if self.preset else is_named) else frozenset()

    @property
    def fim_trained(self) -> bool:
        """Whether it, or its completing adapter, was trained to fill in the middle."""
        return bool(self.fim_orders())

    def run(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """Answers a request of any kind. Setting `cancel` in another thread stops the work.

        Raises ValueError on bad input, at once.
        """
        resolved = self.resolve(request)
        return trimmed(self.engine.generate(resolved, cancel), request, resolved.layout)

    def resolve(self, request: Request) -> Request:
        """The request as the engine takes it: token ids, with the adapter, the layout and the stop ids of its
        kind.

        Warns once (raises ValueError if the model is `strict`) where the model was not made for it.
        """
        prompt, adapter, orders = request.prompt, request.adapter, frozenset[str]()
        if isinstance(prompt, Infill | Chat) or isinstance(getattr(prompt, "prompt", None), str):
            _ = self.tokenizer  # raises where there is none
        if isinstance(prompt, Infill):
            self.expect("completion")
            adapter = self.completing_adapter(adapter)
            orders = self.fim_orders(adapter)
            if self._strict and not orders:
                raise ValueError(
                    f"{self.preset.title if self.preset else self.path} was made for text that goes on, not "
                    "trained to fill in the middle: choose another model (see `codegemma models`) or "
                    "drop --strict"
                )
        elif isinstance(prompt, Chat):
            self.expect("chat")
        adapter = "none" if adapter == "auto" else adapter
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
        """What belongs between `prefix` and `suffix`. `context` are other files (path, text) that it may draw
        on.

        `adapter` is "auto" for the one that the package has for this model, "none" for the base, or a name
        that was added. `time_budget` is in seconds, to the first token. Without FIM training, mode "auto"
        continues the prefix and drops what repeats the suffix. Raises ValueError on bad input, at once.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        files = tuple(file if isinstance(file, File) else File(*file) for file in context)
        infill = Infill(prefix, suffix, path, files, mode, trim)
        request = Request(infill, max_tokens, sampling, (), stop, top, speculate, adapter)
        return self.run(replace(request, prompt_seconds=time_budget), cancel)

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
        """Continues a text (<bos> is put in front) or ids (taken as they are). `raw` reads control tokens
        spelled in the text. truncate="left" drops the oldest tokens, except <bos>, of too long a prompt."""
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
        """The next turn after `messages`: Message, (role, text), or {"role", "content"}; the last one is the
        user's.

        Each turn's prompt begins with the one before it, so the cache holds all but the new text.
        """
        conversation = Chat([_message(message) for message in messages])
        return self.run(
            Request(conversation, max_tokens, sampling, (), stop, top, speculate, adapter), cancel
        )

    def logits(self, ids: Sequence[int], adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t is the prediction after ids[:t + 1]."""
        return self.engine.logits(ids, adapter=adapter)

    def expect(self, use: Use) -> None:
        """Warns once (raises ValueError if `strict`) where the model's card does not name a use."""
        if self.preset is None or use in self.preset.uses or use in self._warned:
            return
        text = f"{self.preset.title} was made for {', '.join(self.preset.uses)}, not for {use}"
        if self._strict:
            raise ValueError(f"{text}: choose another model (see `codegemma models`) or drop --strict")
        self._warned.add(use)
        warnings.warn(text, stacklevel=5)  # for a caller of `complete` or `chat`


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

    `quantize` ("q8_0", "q4_0") turns float weights into blocks while loading; `cache` is a prefix cache saved
    before. `backend`: "native" computes on the CPU, from the file's own blocks; "jax" on a GPU or TPU, with
    decoded weights. Raises ValueError naming what is wrong and what to do.
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
    role = "assistant" if role == "model" else role
    if role not in ("system", "user", "assistant") or not isinstance(text, str):
        raise ValueError(f"a chat message needs a role (system, user, assistant) and a text, got {message!r}")
    return Message(role, text)  # type: ignore[arg-type]


def _preset_of(checkpoint: Checkpoint) -> Preset | None:
    """The member of the family that a file is, by its own name or its path; None where neither says it."""
    keys = ("general.name", "general.basename", "_name_or_path")
    names = [
        *(str(checkpoint.metadata.get(key, "")) for key in keys),
        checkpoint.path.name,
        checkpoint.path.parent.name,
    ]
    presets = (hub.preset_in(name, checkpoint.config) for name in names)
    return next((preset for preset in presets if preset), None)
