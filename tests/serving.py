"""Starts a real server on loopback, in a thread of this process or in another process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn

from codegemma.serve import app, run
from codegemma.serve.guard import Rules
from codegemma.serve.protocol import HttpProtocol

ROOT = Path(__file__).parent.parent


class Served:
    """A server in a thread. `client` sends requests to it; `service` is its CompletionService, to look at."""

    def __init__(self, url: str, application) -> None:
        self.url, self.app = url, application
        self.client = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self.post, self.get = self.client.post, self.client.get

    @property
    def service(self):
        return self.app.state.service

    @property
    def address(self) -> tuple[str, int]:
        parts = httpx.URL(self.url)
        return parts.host, parts.port


@contextlib.contextmanager
def served(
    open_service,
    rules: Rules | None = None,
    web_folder: Path = app.WEB_FOLDER,
    terms: str = "",
    redact: bool = True,
) -> Iterator[Served]:
    """`open_service` is awaited in the server's loop."""
    listener = run.open_socket("127.0.0.1", 0)
    application = app.create(open_service, rules or Rules(), terms, web_folder, redact)
    config = uvicorn.Config(
        application,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    started = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(server.serve([listener]))
        while not (server.started or task.done()):
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(60) and server.started
    instance = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", application)
    try:
        yield instance
    finally:
        instance.client.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Process:
    """`codegemma serve ARGUMENTS --port 0`; `url` once it listens."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "codegemma.cli", "serve", "--port", "0", *arguments]
        self.child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.child.stdout.readline()
        if "http://" not in line:
            raise RuntimeError(f"the server did not start: {line}{self.child.stderr.read()}")
        self.url = line.split()[-1]
        self.log: list[str] = []
        self._reading = threading.Thread(target=lambda: self.log.extend(self.child.stderr), daemon=True)
        self._reading.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        self.child.wait(60)
        self._reading.join(60)
        self.child.stdout.close()
        self.child.stderr.close()
