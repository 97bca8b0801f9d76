"""Seconds to quantise one file beside llama.cpp, in alternation, and their ratio (above 1: ours is faster).

    PYTHONPATH=.:tests .venv-bench/bin/python benchmarks/quantize.py [FLOAT.gguf] [--types q4_0,q4_k_m]

Without a file, a random model of 0.4 billion weights is used. Our time includes measuring the error.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llama_cpp
import logbook

from codegemma.convert.convert import convert
from codegemma.native import usable_cpus

CODES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q6_k": 18}
SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def peer(source: Path, target: Path, type: str) -> None:
    """Quantises a file by llama.cpp."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = CODES[type], usable_cpus()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError("llama.cpp refused the file")


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = logbook.parser(__doc__, 3)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--types", default=",".join(CODES))
    args = parser.parse_args()
    llama_cpp.llama_log_set(SILENT, None)
    with tempfile.TemporaryDirectory() as folder:
        if not (source := args.source):
            from tiny import tiny_config, write_tiny_gguf

            sizes = {"layers": 12, "width": 1024, "ffn_width": 8192, "heads": 4, "head_width": 256}
            config = tiny_config("gemma-mqa", vocab=64_000, **sizes)
            source = write_tiny_gguf(Path(folder, "source.gguf"), config, "BF16")
        target, rows = Path(folder, "target.gguf"), []
        for type in args.types.split(","):
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours.append(seconds(partial(convert, source, target, quantize_to=type, overwrite=True)))
                theirs.append(seconds(partial(peer, source, target, type)))
            mine, other = statistics.median(ours), statistics.median(theirs)
            rows.append(f"| {type} | {mine:.1f} s | {other:.1f} s | {other / mine:.2f} |")
            print(rows[-1], flush=True)
    head = [
        "\n## Quantising beside llama.cpp\n\n"
        f"`benchmarks/quantize.py`: {source.name}, {usable_cpus()} threads.\n",
        "| blocks | ours | llama.cpp | ratio |",
        "|---|---|---|---|",
    ]
    logbook.publish("\n".join([*head, *rows, ""]), args.log)


if __name__ == "__main__":
    main()
