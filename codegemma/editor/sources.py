"""Where an editor's suggestions come from: a model in this process, or a server that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from codegemma.generate import completion
from codegemma.generate.model import Model
from codegemma.serve.requests import Ask, Busy, Fill
from codegemma.serve.scheduler import Scheduler

WAIT = 60.0  # seconds for a server's answer


class Source(Protocol):
    """`fill` gives the text of a suggestion; cancelling the task that awaits it stops the work, also in the middle of a
    prompt. max_tokens 0 reads the prompt into the prefix cache."""

    name: str

    async def fill(self, ask: Ask) -> str: ...
    async def close(self) -> None: ...


class Here:
    """A model in this process. Its prompt cache is kept in `cache` where that names a file."""

    def __init__(self, model: Model, cache: Path | None = None) -> None:
        self.name = f"{model.preset.title if model.preset else model.path.name} in this process"
        self.model, self.cache, self.scheduler = model, cache, Scheduler(model)

    async def fill(self, ask: Ask) -> str:
        (job,) = await self.scheduler.submit([ask])
        try:
            steps = [step async for step in job.steps()]
            return (
                "" if steps[-1].stop == "cancelled" else "".join(step.text for step in steps)
            )  # its prompt was overdue
        finally:
            job.cancel()  # of one that has ended it does nothing

    async def close(self) -> None:
        await self.scheduler.close()
        if self.cache:
            await asyncio.to_thread(self.model.engine.cache.save, self.cache)


class There:
    """A server of ours, or any that has llama.cpp's /infill or OpenAI's /v1/completions with a suffix."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the server must be a URL such as http://127.0.0.1:8012, got {url!r}")
        self.name, self.key, self.host = url, key, parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.infill = True  # until it says that it has no such route

    async def fill(self, ask: Ask) -> str:
        what = ask.what
        assert isinstance(what, Fill)
        if self.infill:
            status, answer = await self._post("/infill", _infill(ask, what))
            self.infill = status not in (404, 405, 501)
        if not self.infill:
            if not ask.max_tokens:
                return ""  # only our own reads ahead
            status, answer = await self._post(
                "/v1/completions",
                {
                    "prompt": what.prefix,
                    "suffix": what.suffix,
                    "max_tokens": ask.max_tokens,
                    "temperature": 0,
                },
            )
        if status == 429:
            raise Busy("the server is busy", 1)
        try:
            text = answer["content"] if self.infill else answer["choices"][0]["text"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.name} answered {status}: {json.dumps(answer)[:300]}") from None
        return completion.cut(text, what.prefix, what.suffix, what.trim)[0]  # others than ours do not trim

    async def close(self) -> None:
        pass

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of an answer. HTTP/1.0, whose answers end with the connection, so that hanging up cancels."""
        data = json.dumps(body).encode()
        head = (
            f"POST {self.base}{path} HTTP/1.0\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n"
            + f"Authorization: Bearer {self.key}\r\n" * bool(self.key)
            + "\r\n"
        )
        try:
            async with asyncio.timeout(WAIT):
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
                try:
                    writer.write(head.encode() + data)
                    answer = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise ValueError(
                f"{self.name} cannot be reached ({error or 'no answer'}): start `codegemma serve`, or leave the "
                "server out to load the model here"
            ) from error
        head_bytes, _, payload = answer.partition(b"\r\n\r\n")
        with contextlib.suppress(ValueError, IndexError):
            return int(head_bytes.split()[1]), _json(payload)
        raise ValueError(f"{self.name} does not speak HTTP: {answer[:80]!r}")


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        return payload[:300].decode("utf-8", "replace")


def _infill(ask: Ask, what: Fill) -> dict[str, Any]:
    """llama.cpp's fields, and our server's own."""
    lines, here = what.prefix.rpartition("\n")[::2]
    body: dict[str, Any] = {
        "input_prefix": lines + "\n" * (len(lines) + len(here) < len(what.prefix)),
        "prompt": here,
        "input_suffix": what.suffix,
        "input_extra": [{"filename": file.path, "text": file.text} for file in what.files],
        "n_predict": ask.max_tokens,
        "temperature": 0,
        "stream": False,
        "cache_prompt": True,
        "mode": what.mode,
        "trim": what.trim,
        "session": ask.session,
    }
    if what.path:
        body["path"] = what.path
    if ask.adapter:
        body["adapter"] = ask.adapter
    if ask.prompt_seconds:
        body["t_max_prompt_ms"] = round(1000 * ask.prompt_seconds)
    if ask.predict_seconds:
        body["t_max_predict_ms"] = round(1000 * ask.predict_seconds)
    return body


def opener(
    model: str | None,
    server: str | None,
    key_file: Path | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    cache: Path | None = None,
    adapter: str = "auto",
) -> Callable[[], Source]:
    """What opens a source, in a thread: a server where one is named, else a model. Raises ValueError, OSError."""
    if server and adapter != "auto":
        raise ValueError(
            "--adapter is for a model in this process: start the server with --adapter NAME=PATH, and name it in the "
            "editor's setting `adapter`"
        )

    def there() -> Source:
        assert server
        return There(server, key_file.read_text().strip() if key_file else "")

    def here() -> Source:
        from codegemma import hub, load

        loaded = load(model or hub.DEFAULT, threads=threads, quantize=quantize, cache=cache)
        loaded.prefer(adapter)
        return Here(loaded, cache)

    return there if server else here
