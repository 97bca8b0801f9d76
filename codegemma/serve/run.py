"""The command line's verb `serve`: sockets, workers, and what to put into which editor."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

if TYPE_CHECKING:
    from fastapi import FastAPI

    from codegemma.serve.requests import Backend

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS = 4096  # open at once; more are closed unheard
BACKLOG = 1024


@dataclass(frozen=True)
class Settings:
    """What a worker needs to serve; it travels to the processes of --workers."""

    model: str | None
    adapters: tuple[str, ...]
    remote: str | None
    remote_key: str
    threads: int | None
    quantize: str | None
    cache_bytes: int
    keep: bool
    hosts: frozenset[str] | None
    origins: frozenset[str]
    keys: tuple[bytes, ...]


def serve(
    model: Annotated[
        str | None,
        Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="A name (see `codegemma models`), a .gguf file or "
            "a directory; the packaged default model where left out.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, Option(metavar="NAME=PATH", help="An adapter that requests may name. Repeatable.")
    ] = None,
    host: Annotated[
        str, Option(help="The address to listen on; any but this machine's own needs --api-key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 lets the system choose.")] = 8012,
    api_key_file: Annotated[
        Path | None, Option(metavar="FILE", help="Keys, one a line, of which every request must bring one.")
    ] = None,
    workers: Annotated[
        int, Option(min=1, max=64, help="Processes, each with its own caches and its share of the threads.")
    ] = 1,
    remote: Annotated[
        str | None,
        Option(metavar="URL", help="Let this OpenAI-compatible server generate; -m gives the tokenizer."),
    ] = None,
    remote_key_file: Annotated[Path | None, Option(metavar="FILE", help="The key for --remote.")] = None,
    allow_origin: Annotated[
        list[str] | None, Option(metavar="ORIGIN", help="A page beside our own that may call. Repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="A name that this machine is called by. Repeatable.")
    ] = None,
    threads: Annotated[
        int | None,
        Option(
            "-t",
            "--threads",
            min=1,
            help="The CPUs that this process may use, where left out.",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        Literal["q8_0", "q4_0"] | None,
        Option("--quantize", help="Turn float weights into blocks while loading."),
    ] = None,
    cache_mb: Annotated[int, Option(min=1, help="Memory for the prompt cache.")] = 1024,
    keep_cache: Annotated[bool, Option(help="Save the prompt cache on stop and load it on start.")] = True,
) -> None:
    """Serve completions to editors and programs.

    It understands the clients of OpenAI, llama.cpp, Ollama, Mistral and Tabby; see docs/server.md.
    """
    _needs_extra()
    from codegemma.serve import guard

    keys = guard.read_keys(api_key_file.read_text().splitlines()) if api_key_file else ()
    if host not in LOOPBACK and not keys:
        raise ValueError(
            f"--host {host} opens this server to the network: give it keys with --api-key-file FILE"
        )
    names = (
        None
        if keys
        else frozenset({*guard.LOOPBACK_NAMES, host.lower(), *(name.lower() for name in allow_host or ())})
    )
    settings = Settings(
        model,
        tuple(adapter or ()),
        remote,
        remote_key_file.read_text().strip() if remote_key_file else "",
        threads,
        quantize,
        cache_mb << 20,
        keep_cache,
        names,
        frozenset(allow_origin or ()),
        keys,
    )
    _log()
    with _listening(host, port) as listener:
        _run(settings, listener, workers)


def application(settings: Settings, share: int = 1) -> FastAPI:
    """A worker's application with its model, which is loaded here. `share`: how many workers divide the threads."""
    from codegemma import hub
    from codegemma.serve import app, terms
    from codegemma.serve.guard import Rules

    rules = Rules(settings.hosts, settings.origins, settings.keys)
    text = terms.terms_text(hub.resolve(settings.model or hub.DEFAULT))
    if settings.remote:
        from codegemma.checkpoints import open_checkpoint
        from codegemma.serve.remote import Remote

        checkpoint = open_checkpoint(hub.resolve(settings.model or hub.DEFAULT))

        async def connect() -> Backend:
            return await Remote.open(str(settings.remote), checkpoint, settings.remote_key)

        return app.create(connect, rules, text)
    from codegemma.generate.model import load
    from codegemma.native import usable_cpus
    from codegemma.serve.scheduler import Scheduler

    threads = settings.threads or (max(1, usable_cpus() // share) if share > 1 else None)
    model = load(
        settings.model or hub.DEFAULT,
        threads=threads,
        quantize=settings.quantize,
        cache_bytes=settings.cache_bytes,
    )
    for given in settings.adapters:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--adapter must be NAME=PATH, got {given!r}")
        model.add_adapter(name, path)

    async def start() -> Backend:
        return Scheduler(model, cache=hub.cache_dir() / "prefixes" if settings.keep else None)

    return app.create(start, rules, text)


def _run(settings: Settings, listener: socket.socket, workers: int) -> None:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from codegemma.serve.protocol import HttpProtocol

    def config(app: object, factory: bool = False) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            factory=factory,
            http=HttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            workers=workers,  # type: ignore[arg-type]
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=3,
            timeout_worker_healthcheck=120,  # a machine under load is slow to start one
            backlog=BACKLOG,
        )

    if workers > 1:
        _greet(listener)
        Multiprocess(config(partial(application, settings, workers), factory=True), sockets=[listener]).run()
        return
    server = uvicorn.Server(config(application(settings)))
    started = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await started(sockets)
        if server.started:
            _greet(listener)

    server.startup = startup  # type: ignore[method-assign]
    server.run([listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _raise_file_limit()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --port, or 0 for "
            "any that is free"
        ) from error


def _raise_file_limit() -> None:
    """Each connection is a file, and systems allow few at first."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = 2 * MAX_CONNECTIONS
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )


def _greet(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(
        host, f"[{host}]" if ":" in host else host
    )
    url = f"http://{host}:{port}"
    print(f"listening on {url}", flush=True)
    print(
        f"""
  in a browser         {url}
  VS Code, Neovim, ... codegemma setup vscode | neovim | helix | emacs | continue | zed
  llama.vim            let g:llama_config = {{ 'endpoint_fim': '{url}/infill' }}
  llama.vscode         "llama-vscode.endpoint": "{url}"
  Tabby's plug-ins     endpoint = "{url}"
  Ollama's clients     OLLAMA_HOST={url}
  OpenAI's clients     OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none
  Mistral's clients    server_url = "{url}"
""",
        file=sys.stderr,
        flush=True,
    )


def _log() -> None:
    """Warnings of all and what the server has to say go to stderr; never a word of a prompt."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("codegemma.serve").setLevel(logging.INFO)


def _needs_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f'codegemma serve needs {error.name}: pip install "codegemma[serve]"') from error


VERBS = (serve,)
