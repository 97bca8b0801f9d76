"""Seconds to quantise one file, ours beside llama.cpp's, in turns; prints the ratio (above 1: ours is faster).

    PYTHONPATH=.:tests .venv-bench/bin/python benchmarks/quantize.py [FLOAT.gguf] [--types q4_0,q4_k_m]

Without a file: a random model of 0.4 billion weights. Ours also measures the error it makes, llama.cpp's does not.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import logbook

from codegemma.convert import convert
from codegemma.native import usable_cpus

CODES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q6_k": 18}
SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def peer(source: Path, target: Path, type: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = CODES[type], usable_cpus()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError("llama.cpp refused the file")


def seconds(work: Callable[[], object]) -> float:
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

            source = write_tiny_gguf(
                Path(folder, "source.gguf"),
                tiny_config(
                    "gemma-mqa", layers=12, width=1024, ffn_width=8192, heads=4, head_width=256, vocab=64_000
                ),
                "BF16",
            )
        target, rows = Path(folder, "target.gguf"), []
        for type in args.types.split(","):
            pairs = [
                (
                    seconds(
                        lambda type=type: convert.convert(source, target, quantize_to=type, overwrite=True)
                    ),
                    seconds(lambda type=type: peer(source, target, type)),
                )
                for _ in range(args.rounds)
            ]
            ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
            rows.append(f"| {type} | {ours:.1f} s | {theirs:.1f} s | {theirs / ours:.2f} |")
            print(rows[-1], flush=True)
    head = [
        f"\n## Quantising beside llama.cpp\n\n`benchmarks/quantize.py`: {source.name}, {usable_cpus()} threads.\n",
        "| blocks | ours | llama.cpp | ratio |",
        "|---|---|---|---|",
    ]
    logbook.publish("\n".join([*head, *rows, ""]), args.log)


if __name__ == "__main__":
    main()
