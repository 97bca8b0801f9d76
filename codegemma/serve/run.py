"""Runs a server: its settings, sockets, model and worker processes, log, and the greeting on the terminal."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from codegemma.serve.guard import MAX_CONNECTIONS, Rules

if TYPE_CHECKING:
    from fastapi import FastAPI

    from codegemma.serve.requests import CompletionService

LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 1024
PORT_ATTEMPTS = 16  # to find a port that is free at both loopback addresses
# Terminals obey control characters, and show what follows a change of direction in another order.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
GREETING = """
  in a browser         {url}
  VS Code, Neovim, ... codegemma setup vscode | neovim | helix | emacs | continue | zed
  llama.vim            let g:llama_config = {{ 'endpoint_fim': '{url}/infill' }}
  llama.vscode         "llama-vscode.endpoint": "{url}"
  Tabby's plug-ins     endpoint = "{url}"
  Ollama's clients     OLLAMA_HOST={url}
  OpenAI's clients     OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none
  Mistral's clients    server_url = "{url}"
"""


@dataclass(frozen=True)
class ServerSettings:
    """What a worker process needs to serve.

    `adapters` are written NAME=PATH. `remote` is the URL of a server that generates in place of the model.
    `keep_cache`: whether the prompt cache is saved at the end and loaded at the start. `redact`: whether
    secrets are removed from context files.
    """

    model: str
    rules: Rules
    adapters: tuple[str, ...] = ()
    remote: str | None = None
    remote_key: str = ""
    threads: int | None = None
    quantize: str | None = None
    cache_bytes: int = 1 << 30
    keep_cache: bool = True
    redact: bool = True


def listen(settings: ServerSettings, host: str, port: int, workers: int) -> None:
    """Serves on a host and port until the process is interrupted; port 0 is any free one.

    "localhost" is both loopback addresses. SIGTERM and SIGHUP end it like Ctrl-C: the prompt cache is saved.
    Raises ValueError where the port is taken, or the model or an adapter cannot be loaded.
    """
    _configure_log()
    with contextlib.ExitStack() as stack:
        _run(settings, [stack.enter_context(listener) for listener in open_sockets(host, port)], workers)


def _configure_log() -> None:
    """Logs to stderr. The log never contains a part of a prompt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("codegemma.serve").setLevel(logging.INFO)


class LogFormatter(logging.Formatter):
    """A line for each record, and for each line of a traceback: what a client sent cannot forge another."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(_printable, super().formatException(ei).split("\n")))


def _printable(line: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)


def application(settings: ServerSettings, workers: int = 1) -> FastAPI:
    """Loads the model and returns a worker's application. The threads are divided among `workers`."""
    from codegemma import hub
    from codegemma.serve import app, terms

    if workers > 1:
        _configure_log()
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor ends this process with SIGTERM
    path = hub.resolve(settings.model)
    text = terms.terms_text(path)
    if settings.remote:
        from codegemma.checkpoints import open_checkpoint
        from codegemma.serve.remote import RemoteService

        open_remote = partial(RemoteService.open, settings.remote, open_checkpoint(path), settings.remote_key)
        return app.create(open_remote, settings.rules, text, redact=settings.redact)
    from codegemma.generate.model import load
    from codegemma.native import usable_cpus
    from codegemma.serve.scheduler import Scheduler

    model = load(
        settings.model,
        threads=settings.threads or (max(1, usable_cpus() // workers) if workers > 1 else None),
        quantize=settings.quantize,
        cache_bytes=settings.cache_bytes,
    )
    for adapter in settings.adapters:
        name, equals, folder = adapter.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter must be NAME=PATH, got {adapter!r}")
        model.add_adapter(name, folder)

    async def open_local() -> CompletionService:
        return Scheduler(model, cache=hub.cache_dir() / "prefixes" if settings.keep_cache else None)

    return app.create(open_local, settings.rules, text, redact=settings.redact)


def _run(settings: ServerSettings, listeners: list[socket.socket], workers: int) -> None:
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from codegemma.serve.protocol import HttpProtocol

    config = partial(
        uvicorn.Config,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        workers=workers,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=3,
        timeout_worker_healthcheck=120,  # a worker starts slowly on a machine under load
        backlog=BACKLOG,
    )
    if workers > 1:
        _greet(listeners[0])
        factory = partial(application, settings, workers)
        supervisor = Multiprocess(config(factory, factory=True), sockets=listeners)
        interrupted, stop = threading.Event(), supervisor.handle_int

        def interrupt() -> None:
            interrupted.set()
            stop()

        supervisor.handle_int = interrupt  # type: ignore[method-assign]
        supervisor.handle_hup = supervisor.handle_term  # type: ignore[method-assign]
        supervisor.run()
        if interrupted.is_set():
            raise KeyboardInterrupt  # as a server without workers does
        return
    server = uvicorn.Server(config(application(settings)))
    start = server.startup

    async def start_and_greet(sockets: list[socket.socket] | None = None) -> None:
        await start(sockets)
        if server.started:
            _greet(listeners[0])

    server.startup = start_and_greet  # type: ignore[method-assign]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, lambda *_: setattr(server, "should_exit", True))
    server.run(listeners)


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """The listening sockets of a host: for "localhost" one for each loopback address, with the same port.

    Clients resolve that name to either. Raises ValueError as `open_socket` does.
    """
    if host != "localhost":
        return [open_socket(host, port)]
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # without IPv6
        return [open_socket("127.0.0.1", port)]
    attempts = 1 if port else PORT_ATTEMPTS
    while True:
        first = open_socket("127.0.0.1", port)
        try:
            return [first, open_socket("::1", first.getsockname()[1])]
        except ValueError:
            first.close()
            attempts -= 1
            if not attempts:
                raise


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _raise_file_limit()
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        problem = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise ValueError(f"{problem}; choose another with --port, or 0 for any that is free") from error


def _raise_file_limit() -> None:
    """Lets this process hold MAX_CONNECTIONS: each is an open file, and systems allow few by default."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        soft = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * MAX_CONNECTIONS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _greet(listener: socket.socket) -> None:
    """Prints the URL to stdout, and to stderr how clients use it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"listening on {url}", flush=True)
    print(GREETING.format(url=url), file=sys.stderr, flush=True)
