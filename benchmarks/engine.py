"""Prefill, decode and edits beside llama.cpp, transformers and OpenVINO: one run, same threads, same minutes.

    PYTHONPATH=. .venv/bin/python benchmarks/engine.py [--rounds 5] [--models default,q4_0,q8_0] [--log]

Each round measures the machine's limits, then ours and the peer in turn. Printed are medians over the rounds
of the speeds, of their ratio, and of the shares of the machine's limits. In prefill, all engines compute
logits for the last token only. A peer that is not installed or fails is left out, and a line says why.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from logbook import ROOT, parser, publish
from peers import BENCH, Peer, check_llama_cpp, exported_for_openvino, single_file

import codegemma
from codegemma.adapters.adapter import LINEAR, Adapter
from codegemma.checkpoints.table import tensor_locations
from codegemma.generate.request import Request
from codegemma.native import Slice, _native, measure

PROMPT, BEFORE, DECODED = 512, 64, 32  # tokens of a prompt; of the prompt before decoding; decoded
EDITED = 400  # tokens of the edited function
FUNCTION = (ROOT / "benchmarks" / "edited_function.py").read_text()
PEER_FAILURES = RuntimeError, OSError, ValueError, subprocess.CalledProcessError
MAX_REASON = 200  # characters of the reason why a peer is missing
# Peers beside which the default model runs: the engine's name in peers.py, the file or folder that it reads,
# made from ours where it reads another format, and its options.
PEERS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "llama.cpp, the same file": ("llamacpp", lambda path: path, {"context": 2048}),
    "transformers, bfloat16 eager": ("torch", lambda path: path, {}),
    "transformers, bfloat16 compiled": ("torch", lambda path: path, {"compiled": True}),
    "OpenVINO GenAI, int8": ("openvino", lambda path: exported_for_openvino("int8"), {}),
    "OpenVINO GenAI, int4": ("openvino", lambda path: exported_for_openvino("int4"), {}),
}


def run_prompt(
    model: codegemma.Model, ids: list[int], adapter: str | None = None
) -> tuple[float, int, list[Any]]:
    """Seconds for a prompt with nothing cached, its next token, and the pages."""
    pages = [model.backend.new_page() for _ in range(-(-(len(ids) + 1024) // 64))]
    for page in pages:
        page.data.fill(0)  # allocates the memory before the clock starts, as the peer does
    began, token = time.perf_counter(), 0
    for start in range(0, len(ids), PROMPT):
        part = ids[start : start + PROMPT]
        is_last = start + len(part) == len(ids)
        logits = model.backend.run([Slice(part, start, pages, int(is_last), adapter)])
        token = int(logits.argmax[0]) if is_last else 0
    return time.perf_counter() - began, token, pages


def run_decode(model: codegemma.Model, ids: list[int], count: int, adapter: str | None = None) -> float:
    """Seconds for `count` tokens, one at a time, after a prompt."""
    _, token, pages = run_prompt(model, ids, adapter)
    start = time.perf_counter()
    for i in range(count):
        token = int(model.backend.run([Slice([token], len(ids) + i, pages, 1, adapter)]).argmax[0])
    return time.perf_counter() - start


def run_edit(model: codegemma.Model, ids: list[int], count: int) -> tuple[float, int]:
    """Greedy decoding as users get it, with speculation: seconds after the first token, and tokens."""
    model.engine.cache.forget_all()
    steps = model.engine.generate(Request(ids, count + 1))
    next(steps)
    start = time.perf_counter()
    tokens = sum(1 for _ in steps)
    return time.perf_counter() - start, tokens


def edit_prompt(model: codegemma.Model) -> list[int]:
    """A function of 60 lines as it is, then the first lines of the same function with one name changed."""
    renamed = FUNCTION.replace("parse_line", "read_record")
    start = renamed[: renamed.index("\n", renamed.index("read_record"))]
    text = f"# before\n{FUNCTION}\n# the same with parse_line renamed to read_record\n{start}"
    return model.tokenizer.encode(text, bos=True)


def weights_bytes(model: codegemma.Model) -> tuple[float, float]:
    """Bytes of weights read for one token, and operations for one prompt token (without the vocabulary)."""
    tensors = model.checkpoint.tensors
    matrices = (t for name, t in tensors.items() if name.startswith("layers.") and len(t.shape) == 2)
    operations = 2 * sum(float(np.prod(t.shape)) for t in matrices)
    return float(sum(t.data.nbytes for t in tensors.values())), operations


def limits(threads: int, level: str) -> dict[str, float]:
    """The machine's limits: "bandwidth" is GB/s read; the others are GOP/s of products, "peak" with the
    level's own factors, "int8" in vectors, "bfloat16" in any way (0 without such instructions)."""
    bandwidth, peak = measure(threads, level)
    is_amx = level == "amx"
    int8 = measure(threads, "avx512")[1] if is_amx else peak
    bfloat16 = peak if is_amx else _native.measure_products(level, _native.Pool(threads), True)
    values = {"bandwidth": bandwidth, "peak": peak, "int8": int8, "bfloat16": bfloat16}
    return {name: value / 1e9 for name, value in values.items()}


def _reason(error: Exception) -> str:
    """Why a peer is missing, on one line."""
    return " ".join(str(error).split())[:MAX_REASON]


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def compare(path: Path, rounds: int, edits: bool, threads: int, has_peer: bool) -> dict[str, Any]:
    """One line of the table: a model in our engine and in llama.cpp, in turn; medians of the rounds. Where
    llama.cpp does not run (not `has_peer`), its figures are NaN."""
    model = codegemma.load(path, threads=threads)
    model.backend.use_huge_pages()  # as a process does by itself after some runs
    read, operations = weights_bytes(model)
    ids = [2, *np.random.default_rng(0).integers(1000, 200_000, PROMPT - 1).tolist()]
    rows: list[dict[str, float]] = []
    with Peer("llamacpp", path, threads=threads, context=2048) if has_peer else nullcontext() as peer:

        def peer_seconds(command: str, **arguments: Any) -> float:
            return float(peer(command, **arguments)["seconds"]) if peer else float("nan")

        edit = edit_prompt(model)
        run_decode(model, ids[:BEFORE], 2)  # warms both up
        peer_seconds("decode", ids=ids[:BEFORE], count=2)
        for _ in range(rounds):
            machine = limits(threads, model.backend.level)
            ours = PROMPT / run_prompt(model, ids)[0]
            theirs = PROMPT / peer_seconds("prefill", ids=ids)
            our_decode = DECODED / run_decode(model, ids[:BEFORE], DECODED)
            their_decode = DECODED / peer_seconds("decode", ids=ids[:BEFORE], count=DECODED)
            row = {
                "prefill": ours,
                "prefill_peer": theirs,
                "prefill_ratio": ours / theirs,
                "prefill_share": ours * operations / machine["peak"] / 1e9,
                "decode": our_decode,
                "decode_peer": their_decode,
                "decode_ratio": our_decode / their_decode,
                "decode_share": our_decode * read / machine["bandwidth"] / 1e9,
                **machine,
            }
            if edits:
                seconds, tokens = run_edit(model, edit, EDITED)
                their_seconds = peer_seconds("decode", ids=edit, count=EDITED)
                row |= {
                    "edit": tokens / seconds,
                    "edit_peer": EDITED / their_seconds,
                    "edit_ratio": tokens / seconds * their_seconds / EDITED,
                }
            rows.append(row)
        version = f"llama-cpp-python {peer.about['version']}" if peer else "missing"
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {
        "model": path.name,
        "level": model.backend.level,
        "factors": model.backend.factors,
        "peer": f"llama.cpp ({version})",
    }


def beside_peers(path: Path, rounds: int, threads: int) -> str:
    """The default model in our engine and in each of PEERS, in turn: a table of medians over the rounds."""
    model = codegemma.load(path, threads=threads)
    model.backend.use_huge_pages()
    ids = [2, *np.random.default_rng(0).integers(1000, 200_000, PROMPT - 1).tolist()]
    ours, machine = list[tuple[float, float]](), list[dict[str, float]]()
    theirs: dict[str, list[tuple[float, float]]] = {}
    versions, missing = dict[str, str](), dict[str, str]()
    with ExitStack() as stack:

        def attempt(name: str, action: Callable[[], Any]) -> Any:
            """The result of the action; None if it fails: its error is then why the peer is missing."""
            try:
                return action()
            except PEER_FAILURES as error:
                missing[name] = _reason(error)

        def times(peer: Peer) -> tuple[float, float]:
            prefill = PROMPT / peer("prefill", ids=ids)["seconds"]
            return prefill, DECODED / peer("decode", ids=ids[:BEFORE], count=DECODED)["seconds"]

        peers = dict[str, Peer]()
        for name, (engine, source, options) in PEERS.items():
            started = attempt(
                name, lambda e=engine, s=source, o=options: Peer(e, s(path), threads=threads, **o)
            )
            if started:
                peers[name] = stack.enter_context(started)
                versions[name] = started.about["version"]
                attempt(name, lambda peer=started: times(peer))  # compiles, and warms up
        run_decode(model, ids[:BEFORE], 2)
        for _ in range(rounds):
            machine.append(limits(threads, model.backend.level))
            prefill = PROMPT / run_prompt(model, ids)[0]
            ours.append((prefill, DECODED / run_decode(model, ids[:BEFORE], DECODED)))
            for name, peer in peers.items():
                if name not in missing and (result := attempt(name, lambda peer=peer: times(peer))):
                    theirs.setdefault(name, []).append(result)

    def medians(rows: list[tuple[float, float]]) -> list[float]:
        return [statistics.median(column) for column in zip(*rows, strict=True)]

    speed = medians(ours)
    limit = {name: statistics.median(row[name] for row in machine) for name in machine[0]}
    lines = [
        f"Default model on {processor()}, level {model.backend.level}, {threads} threads. "
        f"In the same rounds: {limit['bandwidth']:.1f} GB/s read, {limit['int8']:.0f} GOP/s int8, "
        + (f"{limit['bfloat16']:.0f} GFLOP/s bfloat16.\n" if limit["bfloat16"] else "no bfloat16.\n"),
        "| engine | prefill tok/s | ours is | decode tok/s | ours is |",
        "|---|---|---|---|---|",
        f"| ours | {speed[0]:.0f} | | {speed[1]:.1f} | |",
    ]
    for name, rows in theirs.items():
        if name in missing:
            continue
        ratios = medians([(a / c, b / d) for (a, b), (c, d) in zip(ours, rows, strict=True)])
        prefill, decode = medians(rows)
        lines.append(
            f"| {name} ({versions[name]}) | {prefill:.0f} | **{ratios[0]:.2f}x** "
            f"| {decode:.1f} | **{ratios[1]:.2f}x** |"
        )
    return "\n".join(lines + [f"\n{name} is missing: {reason}" for name, reason in missing.items()])


def adapters(path: Path, rounds: int, threads: int, rank: int = 32) -> str:
    """The cost in time of an adapter on all linear layers and four token rows: with and without, in turn."""
    model = codegemma.load(path, threads=threads)
    rng, (rows, c) = np.random.default_rng(0), ([67, 68, 69, 70], model.config)
    shapes = {
        location.name: location.shape
        for location in tensor_locations(c, "hf")
        if location.name.rpartition(".")[2] in LINEAR
    }
    a = {
        name: rng.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
        for name, (_, columns) in shapes.items()
    }
    b = {name: rng.normal(0, 0.01, (out, rank)).astype(np.float32) for name, (out, _) in shapes.items()}
    random = Adapter(
        "random", rank, rank, a, b, {row: rng.normal(0, 0.1, c.width).astype(np.float32) for row in rows}
    )
    model.backend.add_adapter("random", random)
    model.backend.use_huge_pages()
    ids = [2, *rng.integers(1000, 200_000, PROMPT - 1).tolist()]
    run_decode(model, ids[:BEFORE], 2, "random")
    both = (None, "random")
    prefill: dict[str | None, list[float]] = {name: [] for name in both}
    decode: dict[str | None, list[float]] = {name: [] for name in both}
    for _ in range(rounds):
        prompts = {name: run_prompt(model, ids, name) for name in both}
        for name in both:
            prefill[name].append(prompts[name][0])
        for i in range(4 * DECODED):  # alternating by token, so that changes of the machine's speed hit both
            for name in both:
                start = time.perf_counter()
                model.backend.run([Slice(ids[i : i + 1], len(ids) + i, prompts[name][2], 1, name)])
                decode[name].append(time.perf_counter() - start)
    read, decoded = (
        statistics.median(times["random"]) / statistics.median(times[None]) for times in (prefill, decode)
    )
    return (
        f"With an adapter of rank {rank} on all linear layers, default model: prefill takes **{read:.3f}x** "
        f"the time, decode **{decoded:.3f}x**."
    )


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| model | prefill tok/s | llama.cpp | ratio | share of {results[0]['factors']} peak "
        "| decode tok/s | llama.cpp | ratio | share of bandwidth | edit ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        edit = f"{r['edit_ratio']:.2f}" if "edit_ratio" in r else ""
        lines.append(
            f"| {r['model']} | {r['prefill']:.1f} | {r['prefill_peer']:.1f} | **{r['prefill_ratio']:.2f}** "
            f"| {r['prefill_share']:.0%} | "
            f"{r['decode']:.1f} | {r['decode_peer']:.1f} | **{r['decode_ratio']:.2f}** "
            f"| {r['decode_share']:.0%} | {edit} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--models", default="default,q4_0,q4_k_m,q8_0")
    args = arguments.parse_args()
    from codegemma import hub

    paths: dict[str, Callable[[], Path]] = {"default": lambda: single_file(hub.resolve())}
    has_llama_cpp = True
    try:
        build_note = check_llama_cpp(paths["default"]())
    except PEER_FAILURES as error:
        has_llama_cpp, build_note = False, f"llama.cpp does not run: {_reason(error)}"
    results, beside = [], ""
    for name in args.models.split(","):
        path = paths[name]() if name in paths else BENCH / f"random-2b-{name}.gguf"
        if not path.exists():
            subprocess.run(
                [sys.executable, str(ROOT / "benchmarks" / "random_model.py"), "2b", name], check=True
            )
        results.append(compare(path, args.rounds, name == "default", args.threads, has_llama_cpp))
        if name == "default":
            beside = "\n\n".join(part(path, args.rounds, args.threads) for part in (beside_peers, adapters))
        print(table(results[-1:]), beside, sep="\n", flush=True)
        print({k: round(v, 2) for k, v in results[-1].items() if isinstance(v, float)}, flush=True)
    first = results[0]
    machine = (
        f"{processor()}, {args.threads} threads, level {first['level']}; "
        f"medians of {first['bandwidth']:.1f} GB/s read, {first['int8']:.0f} GOP/s int8, "
        f"{first['bfloat16']:.0f} GFLOP/s bfloat16"
    )
    about = "; ".join(filter(None, (first["peer"], build_note, machine)))
    title = f"## {datetime.date.today()}: engine against llama.cpp"
    command = f"`benchmarks/engine.py --rounds {args.rounds}`"
    publish(f"\n{title}\n\n{command}; {about}.\n\n{table(results)}\n\n{beside}\n", args.log)


if __name__ == "__main__":
    main()
