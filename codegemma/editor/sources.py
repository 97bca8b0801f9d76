"""Where an editor's suggestions come from: a model in this process, or a server that is already running."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from codegemma.editor.buffers import normalize
from codegemma.generate.client import error_message, key_headers
from codegemma.generate.completion import cut
from codegemma.generate.model import Model
from codegemma.generate.request import Infill, Request
from codegemma.serve.requests import Busy
from codegemma.serve.scheduler import Scheduler

PROPS_SECONDS = 2.0  # how long a server may take to answer /props; the first suggestion waits for that
ANSWER_SECONDS = 60.0  # how long a server may take for a suggestion


@dataclass(frozen=True)
class Filled:
    """The text of a suggestion, and how sure the model is of it (`Step.confidence`)."""

    text: str = ""
    confidence: float = 1.0


class SuggestionSource(Protocol):
    """Answers fill-in-the-middle requests. Cancelling the task that awaits `fill` stops the work."""

    name: str

    async def reads_files(self) -> bool:
        """Whether other files in the prompt are what the model was trained on; see `Model.reads_files`."""

    async def fill(self, request: Request) -> Filled:
        """A suggestion. With max_tokens 0 its text is "": the prompt is only read into the cache.

        Raises Busy, ValueError or OSError if there is no answer.
        """

    async def close(self) -> None: ...


class LocalSource:
    """A model in this process. Its prompt cache is saved to the file `cache`, if there is one."""

    def __init__(self, model: Model, cache: Path | None = None) -> None:
        self.name = f"{model.title} in this process"
        self.model, self.cache, self.scheduler = model, cache, Scheduler(model)

    async def reads_files(self) -> bool:
        return await asyncio.to_thread(self.model.reads_files)

    async def fill(self, request: Request) -> Filled:
        (job,) = await self.scheduler.submit([request])
        try:
            steps = [step async for step in job.steps()]
        finally:
            job.cancel()  # no effect if the job has ended
        if steps[-1].stop == "cancelled":  # the prompt took too long
            return Filled()
        return Filled("".join(step.text for step in steps), steps[-1].confidence)

    async def close(self) -> None:
        await self.scheduler.close()
        if self.cache:
            await asyncio.to_thread(self.model.engine.cache.save, self.cache)


class RemoteSource:
    """Our server, or another with llama.cpp's /infill or OpenAI's /v1/completions with a suffix."""

    def __init__(self, url: str, key: str = "") -> None:
        try:
            base = httpx.URL(url if "//" in url else f"http://{url}")
        except httpx.InvalidURL:
            base = httpx.URL()
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError(f"the server must be a URL such as http://127.0.0.1:8012, got {url!r}")
        self.name = url
        self.client = httpx.AsyncClient(
            base_url=str(base).rstrip("/").removesuffix("/v1"),
            headers=key_headers(key),
            timeout=ANSWER_SECONDS,
            verify=ssl.create_default_context(),
            trust_env=False,  # no proxy stands between an editor and its server
        )
        self.has_infill = True  # until the server answers that this route is missing
        self._reads_files: bool | None = None

    async def reads_files(self) -> bool:
        if self._reads_files is None:
            try:
                answer = await self.client.get("/props", timeout=PROPS_SECONDS)
                ours = answer.json().get("codegemma", {})
                self._reads_files = bool(ours.get("reads_files", True))  # assumed of other servers
            except httpx.ConnectError:
                return True  # it may still start, and say
            except (httpx.HTTPError, ValueError, AttributeError):
                self._reads_files = True
        return self._reads_files

    async def fill(self, request: Request) -> Filled:
        infill = request.prompt
        assert isinstance(infill, Infill)
        if self.has_infill:
            answer = await self._post("/infill", _infill_body(request, infill))
            self.has_infill = answer.status_code not in (404, 405, 501)
        if not self.has_infill:
            if not request.max_tokens:
                return Filled()  # only our own server reads ahead
            body = {"prompt": infill.prefix, "suffix": infill.suffix, "temperature": 0}
            answer = await self._post("/v1/completions", body | {"max_tokens": request.max_tokens})
        if answer.status_code == 429:
            raise Busy("the server is busy", 1)
        try:
            choice = answer.json() if self.has_infill else answer.json()["choices"][0]
            text, confidence = choice["content" if self.has_infill else "text"], choice.get("confidence")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{self.name} answered {answer.status_code}: {error_message(answer)[:300]}"
            ) from None
        text = cut(normalize(text), infill)[0]  # only our own server trims
        return Filled(text, 1.0 if confidence is None else confidence)  # None: it knows no probabilities

    async def close(self) -> None:
        await self.client.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"{self.name} cannot be reached ({error or 'no answer'}): start `codegemma serve`, or drop "
                "--server, so that `codegemma lsp` loads the model itself"
            ) from error


def _infill_body(request: Request, infill: Infill) -> dict[str, Any]:
    """The body of /infill: llama.cpp's fields, and those that our server adds."""
    start = infill.prefix.rfind("\n") + 1
    optional = {
        "path": infill.path,
        "adapter": None if request.adapter == "auto" else request.adapter,
        "t_max_prompt_ms": request.prompt_seconds and round(1000 * request.prompt_seconds),
        "t_max_predict_ms": request.predict_seconds and round(1000 * request.predict_seconds),
    }
    return {
        "input_prefix": infill.prefix[:start],
        "prompt": infill.prefix[start:],
        "input_suffix": infill.suffix,
        "input_extra": [{"filename": file.path, "text": file.text} for file in infill.files],
        "n_predict": request.max_tokens,
        "temperature": 0,
        "stream": False,
        "cache_prompt": True,
        "mode": infill.mode,
        "trim": infill.trim,
        "session": request.session,
    } | {name: value for name, value in optional.items() if value}
