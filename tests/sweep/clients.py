"""Forty clients of one server, five of them hostile: what the good ones get, /health, memory, and the log."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from serving import Process

from sweep import judges
from sweep.jobs import ROOT, environment

GOOD, HOSTILE = 35, 5
QUIET = 0.3  # the share of the time in which the good clients are alone, as what the others compare with
PROBE_S = 0.1
LAW = "good answers as alone; /health within 100 ms of before; memory level; connections closed; a clean log"

_PREFIX, _SUFFIX = "def area(width, height):\n    return ", "\n\nprint(area(2, 3))\n"
_COMMON = {"max_tokens": 12, "temperature": 0}
_SPELLED = {"n_predict": 12, "temperature": 0}
_OLLAMA = {"num_predict": 12, "temperature": 0}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": _PREFIX, **_COMMON}),
    "hole": ("/v1/completions", {"prompt": _PREFIX, "suffix": _SUFFIX, **_COMMON}),
    "drawn": ("/v1/completions", {"prompt": _PREFIX, "max_tokens": 12, "temperature": 0.8, "seed": 7}),
    "likelihoods": ("/v1/completions", {"prompt": "x = ", "logprobs": 3, **_COMMON}),
    "streamed": ("/v1/completions", {"prompt": "import ", "stream": True, **_COMMON}),
    "infill": ("/infill", {"input_prefix": _PREFIX, "input_suffix": _SUFFIX, **_SPELLED}),
    "infill streamed": (
        "/infill",
        {"input_prefix": "a = [", "input_suffix": "]", "stream": True, **_SPELLED},
    ),
    "mistral": ("/v1/fim/completions", {"prompt": _PREFIX, "suffix": _SUFFIX, **_COMMON}),
    "ollama": ("/api/generate", {"model": "tiny", "prompt": _PREFIX, "raw": True, "options": _OLLAMA}),
}


def answer(body: str) -> list[str]:
    """The texts, reasons and likelihoods of an answer, without its names, times and what was cached. The
    texts of a stream are joined, since their division depends on time."""
    parts = [
        line.removeprefix("data: ") for line in body.splitlines() if line.strip(" :") not in ("", "ping")
    ]
    try:
        values = [json.loads(body)]
    except ValueError:
        values = [json.loads(part) for part in parts if part.startswith("{")]
    texts, others = "", []
    for value in values:
        for key, leaf in _leaves(value):
            if key in ("text", "content", "response"):
                texts += str(leaf)
            elif key in ("finish_reason", "done_reason", "stop_type", "error", "message"):
                others += [f"{key} {leaf}"] if leaf not in (None, "none") else []
            elif key in ("token_logprobs", "tokens") and not isinstance(leaf, dict):
                others.append(str(leaf))
    return [texts, *others]


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, part in value.items() for pair in _leaves(part, name)]
    if isinstance(value, list):
        return [pair for part in value for pair in _leaves(part, key)]
    return [(key, value)]


# --------------------------------------------------------------------------------- hostile clients
Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Attack = Callable[[Reader, Writer, random.Random], Awaitable[object]]


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


async def slow_sender(reader: Reader, writer: Writer, chance: random.Random) -> None:
    """A byte at a time."""
    for byte in post("/v1/completions", b'{"prompt": "x"}')[: chance.randint(5, 60)]:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.05)


async def half_request(reader: Reader, writer: Writer, chance: random.Random) -> None:
    """The head, half the body, and silence."""
    writer.write(post("/infill", b'{"input_prefix": "', chance.choice([100, 1 << 20])))
    await writer.drain()
    await asyncio.sleep(chance.uniform(0, 3))


MALFORMED = (
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"prompt": 1e999}', b'{"prompt": "\\ud83d", "max_tokens": 1}', b'{"prompt": [[1], [2], "x"]}',
    b'{"prompt": "x", "max_tokens": -9, "temperature": "NaN", "logit_bias": {"x": []}}',
    b'{"prompt": [999999999999], "stop": ' + b"[" * 900 + b"]" * 900 + b"}",
)  # fmt: skip


async def malformed(reader: Reader, writer: Writer, chance: random.Random) -> None:
    path = chance.choice(
        ["/v1/completions", "/infill", "/api/generate", "/v1/chat/completions", "/%0d%0aX%1b[31m"]
    )
    writer.write(post(path, chance.choice(MALFORMED)))
    await _drain(reader, writer)


async def huge_body(reader: Reader, writer: Writer, chance: random.Random) -> None:
    """14 MB of lists, of text and of numbers, or 100 MB that are announced."""
    body = chance.choice(
        [
            b'{"prompt": [' + b"[1]," * (14 << 18) + b"[1]]}",
            b'{"prompt": "' + b"x " * (7 << 20) + b'"}',
            b'{"prompt": [' + b"7," * (7 << 20) + b"7]}",
        ]
    )
    writer.write(post("/v1/completions", body, chance.choice([len(body), 100 << 20, 10**15])))
    await _drain(reader, writer)


async def header_flood(reader: Reader, writer: Writer, chance: random.Random) -> None:
    """Ten thousand headers, or one of a megabyte, or a head without end."""
    flood = chance.choice([b"X-%d: y\r\n" * 10_000, b"X: " + b"y" * (1 << 20) + b"\r\n", b"X: y\r\n"])
    flood = flood.replace(b"%d", b"7")
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + flood + chance.choice([b"\r\n", b""]))
    await _drain(reader, writer)


async def leaves_midstream(reader: Reader, writer: Writer, chance: random.Random) -> None:
    """Asks for a long stream, reads a little of it, and is gone."""
    body = {"prompt": "x = " * chance.randint(1, 60), "max_tokens": 200, "stream": True, "temperature": 1}
    writer.write(post("/v1/completions", json.dumps(body).encode()))
    await writer.drain()
    await asyncio.wait_for(reader.read(chance.choice([1, 400, 2000])), 10)
    writer.transport.abort()


async def _drain(reader: Reader, writer: Writer) -> None:
    await asyncio.wait_for(writer.drain(), 10)
    await asyncio.wait_for(reader.read(4096), 3)


ATTACKS: tuple[Attack, ...] = (
    slow_sender,
    half_request,
    malformed,
    huge_body,
    header_flood,
    leaves_midstream,
)


# --------------------------------------------------------------------------------------- the siege
@dataclass
class Siege:
    """What was seen: pairs of a request's name and its answer, resident bytes, and counts."""

    answers: list[tuple[str, object]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    attacks: int = 0
    hostile_since: float = 0.0  # of time.monotonic, which all processes share
    busy: int = 0


async def _good(siege: Siege, client: httpx.AsyncClient, until: float, chance: random.Random) -> None:
    while time.monotonic() < until:
        name = chance.choice(list(REQUESTS))
        try:
            siege.answers.append((name, await _ask(siege, client, name)))
        except (httpx.HTTPError, ValueError) as error:
            siege.answers.append((name, repr(error)))
        await asyncio.sleep(chance.uniform(0, 0.5))


async def _ask(siege: Siege, client: httpx.AsyncClient, name: str) -> object:
    path, body = REQUESTS[name]
    while True:
        response = await client.post(path, json=body)
        if response.status_code != 429:  # a refusal that says when to come again
            break
        siege.busy += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))
    return answer(response.text) if response.status_code == 200 else (response.status_code, response.text)


async def _hostile(siege: Siege, port: int, until: float, chance: random.Random) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                siege.attacks += 1
                await chance.choice(ATTACKS)(reader, writer, chance)
            finally:
                writer.transport.abort()
        await asyncio.sleep(chance.uniform(0, 0.1))


async def _besiege(siege: Siege, url: str, pid: int, seconds: float, chance: random.Random) -> None:
    port, limits = httpx.URL(url).port, httpx.Limits(max_connections=None)
    assert port is not None
    chances = [random.Random(chance.random()) for _ in range(GOOD + HOSTILE)]
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(_good(siege, client, until, each)) for each in chances[:GOOD]]
        await asyncio.sleep(QUIET * seconds)
        siege.hostile_since = time.monotonic()
        tasks += [asyncio.create_task(_hostile(siege, port, until, each)) for each in chances[GOOD:]]
        while time.monotonic() < until:
            siege.memory.append(resident(pid))
            await asyncio.sleep(0.2)
        await asyncio.gather(*tasks)


def resident(pid: int) -> int:
    """The resident bytes of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def connections(pid: int) -> int:
    """The open sockets of a process."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


def probe(url: str, seconds: float) -> None:
    """Prints, for `seconds`, when /health was asked and how long its answer took; in a process of its own."""
    address, began = httpx.URL(url), time.monotonic()
    while (start := time.monotonic()) < began + seconds:
        try:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=30)
            connection.request("GET", "/health")
            took = time.monotonic() - start if connection.getresponse().status == 200 else float("inf")
            connection.close()
        except (OSError, http.client.HTTPException):
            took = float("inf")
        print(start, took, flush=True)
        time.sleep(PROBE_S)


def besiege(model: str, case: Path, seconds: float, chance: random.Random) -> tuple[list[str], str]:
    """Serves `model` to forty clients. Returns the violations, and what was measured in a few words."""
    siege, child = Siege(), environment(case)
    with Process("-m", model, "--cache-mb", "64", environment=child) as server:
        pid = server.child.pid
        with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
            alone: dict[str, object] = {
                name: answer(client.post(path, json=body).raise_for_status().text)
                for name, (path, body) in REQUESTS.items()
            }
        time.sleep(0.5)
        before, sockets = resident(pid), connections(pid)
        command = [sys.executable, "-m", "sweep.clients", server.url, str(seconds)]
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        with subprocess.Popen(command, env=child | paths, stdout=subprocess.PIPE, text=True) as probing:
            assert probing.stdout
            printed = probing.stdout.readline()  # it has started
            asyncio.run(_besiege(siege, server.url, pid, seconds, chance))
            printed += probing.communicate()[0]
        closed = _wait(lambda: connections(pid) <= sockets)
        violations = [] if closed else [f"{connections(pid) - sockets} connections stay open"]
    code = server.child.returncode
    violations += [] if code in (0, 143, -15) else [f"the server ends with {code}"]
    times = [tuple(map(float, line.split())) for line in printed.splitlines()]
    quiet = [took for start, took in times if start < siege.hostile_since]
    loud = [took for start, took in times if start >= siege.hostile_since]
    violations += judges.answers(alone, siege.answers) + judges.health(quiet, loud)
    violations += judges.memory(before, siege.memory) + judges.log(server.log)
    return violations, summary(siege, quiet, loud, before)


def summary(siege: Siege, quiet: list[float], loud: list[float], before: int) -> str:
    """The figures of a siege, for the table."""
    late = [f"{judges.percentile(times) * 1000:.0f}" for times in (quiet, loud) if times]
    megabytes = [
        f"{size / judges.MB:.0f}" for size in (before, max(siege.memory, default=0), *siege.memory[-1:])
    ]
    return (
        f"{len(siege.answers):,} answers, {siege.attacks:,} attacks, {siege.busy} sent away for a moment; "
        f"/health {' -> '.join(late)} ms (95 %), at most {max(loud, default=0):.2f} s; "
        f"memory {megabytes[0]} MB, at most {megabytes[1]}, {megabytes[-1]} last"
    )


def _wait(condition: Callable[[], bool], seconds: float = 40) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return done


if __name__ == "__main__":
    probe(sys.argv[1], float(sys.argv[2]))
