"""A model on this machine, as `codegemma.load` returns it: completion, generation, chat and adapters."""

from __future__ import annotations

import os
import sys
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
from codegemma.adapters.load import packaged_adapter
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.config import Mode, Trim, Use
from codegemma.generate.completion import trimmed
from codegemma.generate.engine import Completion, Engine
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.resolve import resolve
from codegemma.generate.sampling import Sampling
from codegemma.native import Cancel, Native
from codegemma.prompts import ROLES, File, Message
from codegemma.tokenizer import Tokenizer

STRICT_REMEDY = "choose another model (see `codegemma models`) or drop --strict"


class Model:
    """A loaded model. Its methods answer one request at a time; `engine.Batch` runs many together."""

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
        self.preset = hub.preset_of(checkpoint)
        self.title = self.preset.title if self.preset else hub.name_of(self.path)  # for messages

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the checkpoint has none: such a model reads and writes ids only."""
        if self.engine.tokenizer is None:
            remedy = "use ids, or put its tokenizer.model beside it"
            raise ValueError(f"{self.path} has no tokenizer, so text cannot be read or written: {remedy}")
        return self.engine.tokenizer

    @property
    def adapters(self) -> list[str]:
        """The names of the added adapters. The packaged adapter is among them once it has been used."""
        return sorted(self._adapters)

    def adapter(self, name: str) -> Adapter:
        """The added adapter with this name. Raises KeyError where there is none."""
        return self._adapters[name]

    def add_adapter(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Adds an adapter under a name, which requests then pass as `adapter=`.

        It may be the path of a PEFT folder, a NeMo archive or a GGUF adapter. The base weights do not change,
        and requests with different adapters run together. Raises ValueError where it does not fit the model.
        """
        if name in ("", "auto", "none"):
            raise ValueError(f"an adapter cannot be called {name!r}: choose another name")
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
        self.engine.add_adapter(name, loaded)
        self._adapters[name] = loaded

    def adapter_at(self, path: str | os.PathLike[str]) -> str:
        """Adds the adapter at a path, named after its file or folder, and returns that name.

        "auto" gives the name of the completing adapter, and adds the packaged one if that is it; "none" gives
        "none".
        """
        if path in ("auto", "none"):
            return self.completing_adapter(str(path))
        folder = Path(path).resolve()
        name = folder.name if folder.is_dir() else folder.stem
        self.add_adapter(name, folder)
        return name

    def prefer(self, path: str | os.PathLike[str]) -> None:
        """Makes the adapter at a path (see `adapter_at`) the adapter that Infills use by default."""
        self._completing_adapter = self.adapter_at(path)

    def completing_adapter(self, adapter: str = "auto") -> str:
        """The adapter that an Infill with this `adapter` uses. For "auto" it is the preferred one, else the
        packaged one, else "none"."""
        return self._completing_adapter if adapter == "auto" else adapter

    @cached_property
    def _completing_adapter(self) -> str:
        """The packaged adapter of this model, or "none", until `prefer` names another."""
        can_adapt = hasattr(self.backend, "add_adapter")
        packaged = packaged_adapter(self.checkpoint, self.preset) if can_adapt else None
        if packaged is None:
            return "none"
        self.add_adapter(*packaged)
        return packaged[0]

    def fim_orders(self, adapter: str = "auto") -> frozenset[str]:
        """Which of the layouts "psm" and "spm" the model with an adapter was trained in.

        The adapter's card says so, or else the checkpoint's metadata. Where neither does, it is "psm" for a
        model that was trained for FIM: by its preset or, without one, if its vocabulary names the FIM tokens.
        """
        applied = self._adapters.get(self.completing_adapter(adapter))
        if applied and (orders := frozenset(order for order in ("psm", "spm") if applied.trained_for(order))):
            return orders
        if self.checkpoint.fim_orders:
            return self.checkpoint.fim_orders
        return frozenset({"psm"}) if self._base_is_fim_trained else frozenset()

    def reads_files(self, adapter: str = "auto") -> bool:
        """Whether the model with an adapter was trained on documents with other files in front of them.

        With an adapter, its card says so (card["fim"]["files"]); without one, it is true of CodeGemma. All
        others are shown files as comments.
        """
        if applied := self._adapters.get(self.completing_adapter(adapter)):
            return applied.trained_for("files")
        return self._base_is_fim_trained

    @property
    def _base_is_fim_trained(self) -> bool:
        """Whether the model, without an adapter, was trained for FIM. Its preset says so; a model without a
        preset was if its vocabulary names the FIM tokens."""
        if self.preset:
            return self.preset.fim
        return self.engine.tokenizer is not None and self.engine.tokenizer.control.fim == "named"

    @property
    def fim_trained(self) -> bool:
        """Whether the model, with its completing adapter, was trained to fill in the middle."""
        return bool(self.fim_orders())

    def run(self, request: Request, cancel: Cancel | None = None) -> Completion:
        """Answers a request of any kind. Setting `cancel` in another thread stops it.

        Raises ValueError on bad input at once, before the first Step.
        """
        resolved = self.resolve(request)
        return trimmed(self.engine.generate(resolved, cancel), request, resolved.layout)

    def resolve(self, request: Request) -> Request:
        """The request as token ids, with its adapter, layout and stop ids, for the engine.

        Where the model was not made for this use, it warns once or, if `strict`, raises ValueError.
        """
        prompt, adapter, orders = request.prompt, request.adapter, frozenset[str]()
        source = prompt.prompt if isinstance(prompt, TextPrompt) else prompt
        if isinstance(source, Infill | Chat | str):
            _ = self.tokenizer  # raises ValueError where there is none
        if isinstance(prompt, Infill):
            self.expect("completion")
            adapter = self.completing_adapter(adapter)
            orders = self.fim_orders(adapter)
            if self._strict and not orders:
                name = self.preset.title if self.preset else self.path
                problem = f"{name} was made to continue text, not trained to fill in the middle"
                raise ValueError(f"{problem}: {STRICT_REMEDY}")
        elif isinstance(prompt, Chat):
            self.expect("chat")
        adapter = "none" if adapter == "auto" else adapter
        return resolve(self.engine, replace(request, adapter=adapter), orders, self.reads_files(adapter))

    def complete(
        self,
        prefix: str,
        suffix: str = "",
        path: str | None = None,
        context: Sequence[File | tuple[str, str]] = (),
        *,
        trim: Trim = "auto",
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
        """Completes the code between `prefix` and `suffix`; `context` are other files (path, text) to read.

        `adapter` is "auto" for the completing adapter, "none" for the base, or the name of an added one.
        `time_budget` limits the seconds until the first token. For a model without FIM training, mode "auto"
        continues the prefix and drops what repeats the suffix. Raises ValueError on bad input at once, before
        the first Step.
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
        """Continues a text, which gets <bos> in front, or ids, which are used as they are.

        `raw`: control tokens spelled in the text become control ids. truncate="left": a prompt that is too
        long loses its oldest tokens, but not <bos>. Raises ValueError on bad input at once, before the first
        Step.
        """
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
        """The model's turn after `messages`: Message, (role, text) or {"role", "content"}, the last a user's.

        The prompt of a turn begins with that of the turn before, so only the new text has to be read. Raises
        ValueError on bad input at once, before the first Step.
        """
        prompt = Chat([_message(message) for message in messages])
        return self.run(Request(prompt, max_tokens, sampling, (), stop, top, speculate, adapter), cancel)

    def logits(self, ids: Sequence[int], adapter: str = "none") -> np.ndarray:
        """float32 [T, V]: row t predicts the token after ids[:t + 1]."""
        return self.engine.logits(ids, adapter=adapter)

    def expect(self, use: Use) -> None:
        """Warns once, or raises ValueError if `strict`, where the model's card does not name this use."""
        if self.preset is None or use in self.preset.uses or use in self._warned:
            return
        text = f"{self.preset.title} was made for {', '.join(self.preset.uses)}, not for {use}"
        if self._strict:
            raise ValueError(f"{text}: {STRICT_REMEDY}")
        self._warned.add(use)
        frame, level = sys._getframe(), 1  # shows the line that called a method of Model
        while frame.f_back and frame.f_code.co_filename == __file__:
            frame, level = frame.f_back, level + 1
        warnings.warn(text, stacklevel=level)


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
    """Loads a model by name (see `codegemma models`) or path (.gguf, .safetensors, Hugging Face directory).

    `quantize` ("q8_0", "q4_0") quantizes float weights while loading; `cache` is a saved prefix cache's path.
    `backend`: "native" computes on the CPU with the weights as stored; "jax" on a GPU or TPU with float
    weights. Raises ValueError where the model cannot be found, read or run.
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
    name, text = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None or not isinstance(text, str):
        rule = f"a chat message needs a role ({', '.join(ROLES)}) and a text"
        raise ValueError(f"{rule}, got {name!r:.40} and {type(text).__name__}")
    return Message(role, text)
