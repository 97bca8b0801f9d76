"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codegemma.files import atomic_write

SMOOTHING = 0.1  # weight of the newest step in the running mean


def draw(history: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes an SVG: each step's training loss, its running mean, and the held-out loss, over tokens read.

    `history` holds the lines of metrics.jsonl: "tokens" is the count of a step, and "loss" and "held_out" are
    in nats per target.
    """
    from matplotlib.figure import Figure  # its import takes longer than a step

    tokens, mean = 0, history[0]["loss"] if history else 0.0
    points, held_out = [], []
    for line in history:
        tokens += line["tokens"]
        mean += SMOOTHING * (line["loss"] - mean)
        points.append((tokens, line["loss"], mean))
        if line["held_out"] is not None:
            held_out.append((tokens, line["held_out"]))
    axes = (figure := Figure(figsize=(6.4, 2.8), layout="constrained")).add_subplot()
    read, losses, means = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(read, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(read, means, color="tab:blue", linewidth=2, label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:red", markersize=4, label="held out")
    axes.set(xlabel="tokens read", ylabel="loss in nats a target")
    axes.legend(frameon=False, fontsize="small")
    with atomic_write(file) as out:
        figure.savefig(out, format="svg")
