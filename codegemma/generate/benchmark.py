"""Prefill and decode speed of a model, beside this machine's memory bandwidth and rate of multiplications."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from codegemma.generate.model import Model
from codegemma.native import CHUNK, PAGE, Native, Slice, measure, why_no_amx


def benchmark(
    model: Model, prompt_tokens: int = 512, decode_tokens: int = 32, repeats: int = 3, adapter: str = "none"
) -> dict[str, Any]:
    """Median prefill and decode speed in tokens a second, and their shares of the machine's limits.

    The limits are measured before each repeat. Prefill computes logits for the last token only. On level
    avx512, `why_no_amx` says why level amx is not used. Raises ValueError where the tokens do not fit the
    context or the model is not on the native backend.
    """
    backend, context = model.backend, model.config.context
    if not 1 <= prompt_tokens <= context - decode_tokens or decode_tokens < 1:
        raise ValueError(
            f"benchmark: prompt_tokens + decode_tokens must lie in the context of {context:,}, "
            f"got {prompt_tokens} + {decode_tokens}"
        )
    if not isinstance(backend, Native):
        raise ValueError('benchmark measures the native engine: load the model without backend="jax"')
    ids = [int(token) for token in np.random.default_rng(0).integers(0, model.config.vocab, prompt_tokens)]
    digest = model.engine.adapter_digest(adapter) or None
    backend.use_huge_pages()
    rows = []
    for _ in range(repeats):
        with model.engine.lock:
            limits = measure(backend.threads, backend.level)
            seconds = _seconds(backend, ids, decode_tokens, digest)
        rows.append((*limits, prompt_tokens / seconds[0], decode_tokens / seconds[1]))
    bandwidth, peak, prefill, decode = np.median(rows, axis=0).tolist()
    tensors = model.checkpoint.tensors
    matrices = [t for name, t in tensors.items() if name.startswith("layers.") and len(t.shape) == 2]
    layer_weights = sum(float(np.prod(tensor.shape)) for tensor in matrices)
    return {
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "prefill_share_of_peak": 2 * layer_weights * prefill / peak,
        "decode_share_of_bandwidth": sum(t.data.nbytes for t in tensors.values()) * decode / bandwidth,
        "bandwidth_bytes_per_second": bandwidth,
        f"{backend.factors}_operations_per_second": peak,
        "threads": backend.threads,
        "simd": backend.level,
        "why_no_amx": (backend.level == "avx512" and why_no_amx()) or None,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
    }


def _seconds(backend: Native, ids: list[int], decode_tokens: int, adapter: str | None) -> tuple[float, float]:
    """Seconds to read an uncached prompt, and to decode `decode_tokens` after it."""
    pages = [backend.new_page() for _ in range(-(-(len(ids) + decode_tokens) // PAGE))]
    started = time.perf_counter()
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        backend.run([Slice(part, start, pages, int(start + len(part) == len(ids)), adapter)])
    prefilled = time.perf_counter()
    for i in range(decode_tokens):
        backend.run([Slice([ids[i % len(ids)]], len(ids) + i, pages, 1, adapter)])
    return prefilled - started, time.perf_counter() - prefilled
