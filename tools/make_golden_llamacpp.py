"""Writes tests/golden/llamacpp.npz: llama.cpp's predictions for code_1000.py.txt by the default model.

    PYTHONPATH=.:benchmarks:tests .venv-bench/bin/python tools/make_golden_llamacpp.py [--check]

Holds `ids` int32 [1000] (llama.cpp's own, BOS first), `next_logprob` float32 [999] of the token that follows,
`argmax` int32 [1000], `top_ids` int32 and `top_logprobs` float32 [1000, 64] (best first), and `about`
(versions, settings, hash of the model). KL(llama.cpp || ours) at a position is at least, and nearly, the sum
over its top 64 of p * (log p - log q), plus the same term for all other tokens taken as one outcome.

`--check` compares with the float64 model instead: how far llama.cpp is from it by its own rounding.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from make_golden_twin import GOLDEN, TOP, log_softmax, twin_log_probabilities
from peers import LlamaCpp

MODEL = Path.home() / ".cache" / "codegemma" / "models" / "gemma-3-270m" / "model.gguf"
TOKENS = 1000


def encode(engine: LlamaCpp, text: bytes) -> list[int]:
    """llama.cpp's token ids of a text, BOS first."""
    vocab = engine.api.llama_model_get_vocab(engine.model)
    ids = (ctypes.c_int32 * (len(text) + 1))()
    return list(ids[: engine.api.llama_tokenize(vocab, text, len(text), ids, len(ids), True, False)])


def check(ids: list[int], theirs_TV: np.ndarray) -> str:
    """llama.cpp's log probabilities beside those of the float64 model."""
    exact_TV = twin_log_probabilities(MODEL, ids)
    kl_T = np.array(
        [
            np.exp(exact_V) @ (exact_V - theirs_V)
            for exact_V, theirs_V in zip(exact_TV, theirs_TV, strict=True)
        ]
    )
    agree = (exact_TV.argmax(-1) == theirs_TV.argmax(-1)).mean()
    follows = np.arange(len(ids) - 1), np.asarray(ids[1:])
    nats = [-log_TV[follows].mean() for log_TV in (exact_TV, theirs_TV)]
    return (
        f"KL(float64 twin || llama.cpp): mean {kl_T.mean():.5f}, median {np.median(kl_T):.5f}, "
        f"max {kl_T.max():.4f}; same top token {agree:.1%}; "
        f"loss {nats[0]:.4f} and {nats[1]:.4f} nats per token"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--check", action="store_true", help="compare with the float64 twin instead of writing"
    )
    args = parser.parse_args()
    engine = LlamaCpp(str(MODEL), threads=2, context=1024)
    ids = encode(engine, (GOLDEN / "code_1000.py.txt").read_bytes())[:TOKENS]
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        engine.logits(ids, file.name)
        log_TV = log_softmax(np.load(file.name))
    if args.check:
        print(check(ids, log_TV))
        return
    best_T64 = np.array([np.argsort(-log_V, kind="stable")[:TOP] for log_V in log_TV], np.int32)
    about = engine.about | {"kv": "float16", "model_sha256": hashlib.sha256(MODEL.read_bytes()).hexdigest()}
    np.savez_compressed(
        GOLDEN / "llamacpp.npz",
        ids=np.array(ids, np.int32),
        argmax=best_T64[:, 0],
        top_ids=best_T64,
        next_logprob=log_TV[np.arange(len(ids) - 1), ids[1:]].astype(np.float32),
        about=json.dumps(about),
        top_logprobs=np.take_along_axis(log_TV, best_T64, -1).astype(np.float32),
    )
    print(f"{len(ids)} tokens, loss {-log_TV[np.arange(len(ids) - 1), ids[1:]].mean():.4f} nats per token")


if __name__ == "__main__":
    main()
