"""The verb `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from codegemma.cli.options import ModelOptions, Positive
from codegemma.files import read_text


def serve(
    model: ModelOptions,
    adapter: list[str] | None = None,
    host: str = "localhost",
    port: Annotated[int, Option(min=0, max=65535)] = 8012,
    api_key_file: Path | None = None,
    workers: Annotated[int, Option(min=1, max=64)] = 1,
    remote: str | None = None,
    remote_key_file: Path | None = None,
    allow_origin: list[str] | None = None,
    allow_host: list[str] | None = None,
    cache_mb: Positive = 1024,
    keep_cache: bool = True,
    redact: bool = True,
) -> None:
    """Serve completions to editors and programs.

    It understands the clients of OpenAI, llama.cpp, Ollama, Mistral and Tabby; see docs/server.md.
    """
    import fastapi  # noqa: F401  reports a missing extra before anything is read
    import uvicorn  # noqa: F401

    from codegemma.serve.guard import LOOPBACK_NAMES, Rules, read_keys
    from codegemma.serve.run import LOOPBACK, ServerSettings, listen

    keys = read_keys(read_text(api_key_file).splitlines()) if api_key_file else ()
    if host not in LOOPBACK and not keys:
        raise ValueError(
            f"--host {host} opens this server to the network: give it keys with --api-key-file FILE"
        )
    names = {*LOOPBACK_NAMES, host.lower(), *(name.lower() for name in allow_host or ())}
    settings = ServerSettings(
        model=model.model,
        rules=Rules(None if keys else frozenset(names), frozenset(allow_origin or ()), keys),
        adapters=tuple(adapter or ()),
        remote=remote,
        remote_key=read_text(remote_key_file).strip() if remote_key_file else "",
        threads=model.threads,
        quantize=model.quantize,
        cache_bytes=cache_mb << 20,
        keep_cache=keep_cache,
        redact=redact,
    )
    listen(settings, host, port, workers)
