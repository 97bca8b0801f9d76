"""Seconds to quantise one file, ours beside llama.cpp's, in turns; prints the ratio (above 1: ours is faster).

    PYTHONPATH=.:tests .venv-bench/bin/python benchmarks/quantize.py [FLOAT.gguf]

Without a file: a random model of 0.4 billion weights. Ours also measures the error it makes, llama.cpp's does not.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp

from codegemma import convert
from codegemma.native import usable_cpus

CODES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q6_k": 18}
ROUNDS = 3
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
    llama_cpp.llama_log_set(SILENT, None)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "source.gguf")
        if len(sys.argv) < 2:
            from tiny import tiny_config, write_tiny_gguf

            write_tiny_gguf(source, tiny_config("gemma-mqa", layers=12, width=1024, ffn_width=8192, heads=4,
                                                head_width=256, vocab=64_000), "BF16")
        target = Path(folder, "target.gguf")
        for type in CODES:
            pairs = [(seconds(lambda type=type: convert.convert(source, target, quantize_to=type, overwrite=True)),
                      seconds(lambda type=type: peer(source, target, type))) for _ in range(ROUNDS)]
            ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
            print(f"{type:7} ours {ours:6.2f} s  llama.cpp {theirs:6.2f} s  ratio {theirs / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
