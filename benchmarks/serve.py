"""The server beside llama-cpp-python's: a typing trace, eight clients at once, and many users under load.

    PYTHONPATH=. .venv/bin/python benchmarks/serve.py [--rounds 3] [--log]
    PYTHONPATH=. .venv/bin/python benchmarks/serve.py --load 300 --clients 64 [--plot load.svg] [--log]

The peer (`pip install "llama-cpp-python[server]"` in the bench environment) has the same file, threads and
context. It gets prompts in its own order, PSM, and uses its own prompt cache. Servers run one at a time. The
cost of a request over the engine alone is measured as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from keystrokes import Trace, trace
from logbook import ROOT, parser, publish
from peers import PYTHON, single_file

import codegemma
from codegemma import hub

TOKENS = 8  # of a suggestion
CONTEXT = 4096
FIM = (
    "<unused60>",
    "<unused61>",
    "<unused62>",
)  # in place of FIM tokens, which this model's file does not name


@contextlib.contextmanager
def our_server(threads: int) -> Iterator[tuple[str, int]]:
    """Our server in a process of its own: its URL and process id."""
    options = ["--port", "0", "--threads", str(threads), "--no-keep-cache"]
    command = [sys.executable, "-m", "codegemma.cli", "serve", *options]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout
    try:
        yield child.stdout.readline().split()[-1], child.pid
    finally:
        child.terminate()
        child.wait()


@contextlib.contextmanager
def peer_server(threads: int) -> Iterator[tuple[str, int]]:
    """The peer's server: its URL and process id. Raises RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--model": single_file(hub.resolve()),
        "--port": port,
        "--n_ctx": CONTEXT,
        "--n_batch": 512,
        "--n_threads": threads,
        "--n_threads_batch": threads,
        "--verbose": "false",
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [str(PYTHON), "-m", "llama_cpp.server", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:  # until it listens
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/v1/models", trust_env=False)
                break
            if child.poll() is not None:
                remedy = 'pip install "llama-cpp-python[server]" into the bench environment'
                raise RuntimeError(f"the peer does not start: {remedy}")
            time.sleep(0.2)
        yield url, child.pid
    finally:
        child.terminate()
        child.wait()


def our_request(prefix: str, suffix: str, tokens: int = TOKENS) -> tuple[str, dict[str, Any]]:
    """Path and body of a request for a hole."""
    return "/v1/completions", {
        "prompt": prefix,
        "suffix": suffix,
        "max_tokens": tokens,
        "mode": "spm",
        "path": "pkg/stats.py",
        "temperature": 0,
    }


def peer_request(prefix: str, suffix: str, tokens: int = TOKENS) -> tuple[str, dict[str, Any]]:
    """The same for the peer, in PSM order."""
    prompt = f"pkg/stats.py\n{FIM[0]}{prefix}{FIM[2]}{suffix}{FIM[1]}"
    return "/v1/completions", {"prompt": prompt, "max_tokens": tokens, "temperature": 0}


def typing(url: str, request: Any, steps: Trace, every: int) -> dict[str, list[float]]:
    """Seconds from a step to its complete suggestion, by kind of step; of the keys, only every `every`-th."""
    seconds: dict[str, list[float]] = {"open": [], "key": [], "jump": []}
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        for index, (kind, prefix, suffix) in enumerate(steps):
            if kind == "key" and index % every:
                continue
            path, body = request(prefix, suffix)
            start = time.perf_counter()
            client.post(path, json=body).raise_for_status()
            seconds[kind].append(time.perf_counter() - start)
    return seconds


def together(url: str, request: Any, count: int = 8, tokens: int = 64) -> tuple[float, list[str]]:
    """Tokens per second of `count` clients at once, and the text that each got."""

    async def run() -> tuple[float, list[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            start = time.perf_counter()
            posts = (client.post(path, json=body) for path, body in holes(request, count, tokens))
            answers = [answer.json() for answer in await asyncio.gather(*posts)]
            seconds = time.perf_counter() - start
        generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
        return generated / seconds, [answer["choices"][0]["text"] for answer in answers]

    return asyncio.run(run())


def alone(url: str, request: Any) -> list[str]:
    """The answers to the requests of `together`, one after the other."""
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        answers = [client.post(path, json=body).json() for path, body in holes(request)]
        return [answer["choices"][0]["text"] for answer in answers]


def holes(request: Any, count: int = 8, tokens: int = 64) -> list[tuple[str, dict[str, Any]]]:
    """Requests for `count` holes in a file."""
    text = (ROOT / "benchmarks" / "typed_file.txt").read_text()
    cursors = [1500 + 700 * i for i in range(count)]
    return [request(text[cursor - 1500 : cursor], text[cursor : cursor + 300], tokens) for cursor in cursors]


def overhead(url: str, model: codegemma.Model, steps: Trace) -> tuple[list[float], list[float]]:
    """Seconds of the same cached requests over HTTP and in this process, in turn."""
    served, inside = [], []
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        for number, (_, prefix, suffix) in enumerate([step for step in steps if step[0] == "key"] * 2):
            path, body = our_request(prefix, suffix, 1)
            start = time.perf_counter()
            client.post(path, json=body).raise_for_status()
            between = time.perf_counter()
            assert model.complete(prefix, suffix, path="pkg/stats.py", mode="spm", max_tokens=1).stop
            if number >= len(steps) - 6:  # the first pass fills the caches
                served.append(between - start)
                inside.append(time.perf_counter() - between)
    return served, inside


@dataclass
class LoadTest:
    """Clients that always type: each keystroke cancels the request before it."""

    url: str
    pid: int
    clients: int
    seconds: float
    answered: list[tuple[float, float]] = field(
        default_factory=list
    )  # seconds since the start, of the answer
    served: Counter[int] = field(default_factory=Counter)  # answers of each client
    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)  # bytes, every second

    async def run(self) -> None:
        """Runs the test and fills the results."""
        self.started = time.perf_counter()
        self.end = self.started + self.seconds
        limits = httpx.Limits(max_connections=2 * self.clients)
        options: dict[str, Any] = {"timeout": 600, "trust_env": False, "limits": limits}
        async with httpx.AsyncClient(base_url=self.url, **options) as client:
            users = (self._user(number, client) for number in range(self.clients))
            await asyncio.gather(self._watch_memory(), *users)

    async def _user(self, number: int, client: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        steps = trace((ROOT / "benchmarks" / "typed_file.txt").read_text()[:5600])
        while time.perf_counter() < self.end:
            for _, prefix, suffix in steps:
                path, body = our_request(f"# client {number}\n{prefix}", suffix)
                body |= {"session": str(number), "time_budget_ms": 1000}
                typing_on = draw.random() < 0.9  # or else the user stops to read for some seconds
                pause = draw.uniform(0.1, 0.4) if typing_on else draw.uniform(2.0, 6.0)
                await self._keystroke(number, client, path, body, pause)
                if time.perf_counter() >= self.end:
                    return

    async def _keystroke(
        self, number: int, client: httpx.AsyncClient, path: str, body: dict[str, Any], pause: float
    ) -> None:
        """Sends a request, and cancels it if its answer is not there when the pause is over."""
        start = time.perf_counter()
        task = asyncio.ensure_future(client.post(path, json=body))
        done, _ = await asyncio.wait({task}, timeout=pause)
        if not done:
            task.cancel()
            self.statuses["dropped"] += 1
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await task
            return
        try:
            status = task.result().status_code
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
        else:
            now = time.perf_counter()
            self.statuses[str(status)] += 1
            self.answered.append((now - self.started, now - start))
            self.served[number] += status == 200
        await asyncio.sleep(max(0.0, start + pause - time.perf_counter()))

    async def _watch_memory(self) -> None:
        while time.perf_counter() < self.end:
            status = Path(f"/proc/{self.pid}/status").read_text()
            self.memory.append(int(status.partition("VmRSS:")[2].split()[0]) * 1024)
            await asyncio.sleep(1)


def plot(answered: list[tuple[float, float]], file: Path) -> None:
    """A dot for each answer: its time, and its latency on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    times, latencies = zip(*answered, strict=True)
    axes.scatter(times, latencies, s=4, alpha=0.4)
    axes.set(xlabel="seconds since the start", ylabel="latency in seconds", yscale="log", ylim=(1e-3, 1e2))
    axes.grid(True, linewidth=0.5)
    figure.savefig(file)


def percentile(values: list[float], share: float) -> float:
    """The value at this share of the sorted values."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def speed(args: Any) -> str:
    """The entry on our server and the peer's, in turn."""
    model = codegemma.load(threads=args.threads)
    steps = trace((ROOT / "benchmarks" / "typed_file.txt").read_text()[:5600])
    servers = {"ours": (our_server, our_request, 1), "peer": (peer_server, peer_request, 6)}
    typed: dict[str, dict[str, list[float]]] = {name: {"open": [], "key": [], "jump": []} for name in servers}
    rates: dict[str, list[float]] = {name: [] for name in servers}
    costs: list[float] = []
    starts: dict[str, list[float]] = {name: [] for name in servers}
    same = True
    for _ in range(args.rounds):
        for name, (start, request, every) in servers.items():
            began = time.perf_counter()
            with start(args.threads) as (url, _pid):
                starts[name].append(time.perf_counter() - began)
                for kind, seconds in typing(url, request, steps, every).items():
                    typed[name][kind] += seconds
                rate, texts = together(url, request)
                rates[name].append(rate)
                if name == "ours":
                    same = same and texts == alone(url, request)
                    served, inside = overhead(url, model, steps)
                    costs.append(statistics.median(served) - statistics.median(inside))
    rows = [
        "| keystroke to suggestion | ours, median | ours, 95th | peer, median | peer, 95th | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("key", "jump", "open"):
        a, b = typed["ours"][kind], typed["peer"][kind]
        figures = [statistics.median(a), percentile(a, 0.95), statistics.median(b), percentile(b, 0.95)]
        cells = " | ".join(f"{1e3 * seconds:.0f} ms" for seconds in figures)
        rows.append(f"| {kind} | {cells} | **1/{figures[2] / figures[0]:.1f}** |")
    ours, peer = (statistics.median(rates[name]) for name in ("ours", "peer"))
    return (
        f"`benchmarks/serve.py --rounds {args.rounds}`: default model, {args.threads} threads, "
        f"{TOKENS} tokens a suggestion; the peer is llama-cpp-python's server in PSM order.\n\n"
        + "\n".join(rows)
        + "\n\n"
        f"Eight clients at once, 64 tokens each: {ours:.1f} tokens/s, the peer {peer:.1f}: "
        f"**{ours / peer:.2f}**; "
        f"{'each got what it gets alone' if same else 'OUTPUTS DIFFER from those of a single client'}. "
        f"Over the engine a request costs {1e3 * statistics.median(costs):.1f} ms at the median. "
        f"From the command to a listening server: {statistics.median(starts['ours']):.2f} s, "
        f"the peer {statistics.median(starts['peer']):.2f} s.\n"
    )


def under_load(args: Any) -> str:
    """The entry on our server under load."""
    with our_server(args.threads) as (url, pid):
        test = LoadTest(url, pid, args.clients, args.load)
        asyncio.run(test.run())
    if not test.answered:
        raise RuntimeError(f"no request was answered before its client typed on: {dict(test.statuses)}")
    seconds = [took for _, took in test.answered]
    memory = [size / 1e6 for size in test.memory]
    answers = [test.served[number] for number in range(args.clients)]
    if args.plot:
        plot(test.answered, args.plot)
    quarter = max(len(memory) // 4, 1)
    return (
        f"`benchmarks/serve.py --load {args.load:g} --clients {args.clients}`: default model, "
        f"{args.threads} threads, each client types without end and drops what is not there by its next "
        "keystroke.\n\n"
        f"{dict(test.statuses)}; answers took {1e3 * statistics.median(seconds):.0f} ms at the median, "
        f"{1e3 * percentile(seconds, 0.95):.0f} ms at the 95th percentile, "
        f"{1e3 * max(seconds):.0f} ms at most; a client got {min(answers)} to "
        f"{max(answers)} answers; memory "
        f"{statistics.mean(memory[quarter : 2 * quarter] or memory):.0f} MB in the second quarter, "
        f"{statistics.mean(memory[-quarter:]):.0f} MB in the last.\n"
    )


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument(
        "--load", type=float, metavar="SECONDS", help="many clients that type, instead of the comparison"
    )
    arguments.add_argument("--clients", type=int, default=64)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="an SVG of the latencies under load")
    args = arguments.parse_args()
    text = under_load(args) if args.load else speed(args)
    publish(
        f"\n## {datetime.date.today()}: the server{' under load' if args.load else ''}\n\n{text}", args.log
    )


if __name__ == "__main__":
    main()
