"""Time to the first token after each of 60 keystrokes and 5 cursor jumps in a real file.

    PYTHONPATH=. .venv/bin/python benchmarks/keystrokes.py [--rounds 3] [--log]

Ours is `complete` as an editor calls it (encoding, window, cache, first token), in SPM order. The peer is
llama.cpp with its own prompt cache: in PSM order, as its /infill works, and in SPM order on our token ids.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Sequence

from logbook import ROOT, parser, publish
from peers import Peer, single_file

import codegemma
from codegemma import hub, prompts

KEYSTROKES = 60
TYPED = "    if not isinstance(value, (int, float)):\n        raise TypeErr"[:KEYSTROKES]
Trace = list[tuple[str, str, str]]  # kind, prefix, suffix


def trace(text: str) -> Trace:
    """The steps of a user who opens a file at three quarters of it, types, then jumps to five places."""
    lines = text.splitlines(keepends=True)
    cursor = len(lines) * 3 // 4
    prefix, suffix = "".join(lines[:cursor]), "".join(lines[cursor:])
    steps = [("open", prefix, suffix)]
    steps += [("key", prefix + TYPED[:i], suffix) for i in range(1, KEYSTROKES + 1)]
    for part in (0.2, 0.9, 0.5, 0.7, 0.35):
        cursor = int(len(lines) * part)
        steps.append(("jump", "".join(lines[:cursor]), "".join(lines[cursor:])))
    return steps


def our_times(model: codegemma.Model, steps: Trace) -> list[float]:
    """Seconds to the first token of each step, from an empty cache."""
    model.engine.cache.forget_all()
    seconds = []
    for _, prefix, suffix in steps:
        start = time.perf_counter()
        completion = model.complete(prefix, suffix, path="pkg/stats.py", mode="spm", max_tokens=64)
        next(completion)
        seconds.append(time.perf_counter() - start)
        completion.close()
    return seconds


def peer_times(
    peer: Peer, model: codegemma.Model, steps: Trace, layout: prompts.Layout
) -> list[float | None]:
    """Seconds to the first token of each step, from an empty cache.

    In PSM order the peer reads the whole suffix again after each keystroke, which takes more than a second:
    there only every sixth keystroke is measured, and the others are None.
    """
    peer("eval_prompt", ids=[2])  # empties its cache
    ids = [
        prompts.fim(model.tokenizer, prefix, suffix, "pkg/stats.py", layout=layout).ids
        for _, prefix, suffix in steps
    ]
    measured = [layout == "spm" or kind != "key" or i % 6 == 0 for i, (kind, _, _) in enumerate(steps)]
    pairs = zip(ids, measured, strict=True)
    return [peer("eval_prompt", ids=prompt)["seconds"] if wanted else None for prompt, wanted in pairs]


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = arguments.parse_args()
    text = (ROOT / "benchmarks" / "typed_file.txt").read_text()[:5600]
    steps = trace(text)
    model = codegemma.load(threads=args.threads)
    model.backend.use_huge_pages()
    length = len(model.tokenizer.encode(text))
    rounds: list[dict[str, Sequence[float | None]]] = []
    with Peer("llamacpp", single_file(hub.resolve()), threads=args.threads, context=4096) as peer:
        for _ in range(args.rounds):
            rounds.append(
                {
                    "ours": our_times(model, steps),
                    "psm": peer_times(peer, model, steps, "psm"),
                    "spm": peer_times(peer, model, steps, "spm"),
                }
            )
    lines = [
        "| | ours | llama.cpp, PSM | llama.cpp, SPM | ratio to PSM | ratio to SPM |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("key", "jump", "open"):
        indexes = [i for i, step in enumerate(steps) if step[0] == kind]
        medians = {
            name: statistics.median(
                x for times in rounds for i in indexes if (x := times[name][i]) is not None
            )
            for name in rounds[0]
        }
        ours_ms, psm_ms, spm_ms = (medians[name] * 1e3 for name in ("ours", "psm", "spm"))
        lines.append(
            f"| {kind} | {ours_ms:.1f} ms | {psm_ms:.1f} ms | {spm_ms:.1f} ms | "
            f"**1/{psm_ms / ours_ms:.1f}** | **{ours_ms / spm_ms:.2f}** |"
        )
    entry = (
        f"\n## {datetime.date.today()}: typing trace\n\n`benchmarks/keystrokes.py --rounds {args.rounds}`: "
        f"{length:,} tokens around the cursor, medians to the first token, "
        f"default model, {args.threads} threads, {model.backend.level}.\n\n" + "\n".join(lines) + "\n"
    )
    publish(entry, args.log)


if __name__ == "__main__":
    main()
