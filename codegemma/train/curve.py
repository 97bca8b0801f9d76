"""The loss curve as an SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 640, 280, 46, 14


def draw(history: Sequence[dict[str, Any]]) -> str:
    """Training loss of each step (thin), its running mean, and the held-out loss (dots), against tokens seen."""
    tokens, points, smooth, held = 0, [], [], []
    mean = None
    for one in history:
        tokens += one["tokens"]
        mean = one["loss"] if mean is None else mean + 0.1 * (one["loss"] - mean)
        points.append((tokens, one["loss"]))
        smooth.append((tokens, mean))
        if one["held_out"] is not None:
            held.append((tokens, one["held_out"]))
    losses = [loss for _, loss in points + held] or [0.0]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point[0] / max(tokens, 1), (point[1] - low) / (high - low)
        return LEFT + x * (WIDTH - LEFT - 10), TOP + (1 - y) * (HEIGHT - TOP - 34)

    def line(points: Sequence[tuple[float, float]], style: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        return f'<polyline points="{path}" fill="none" {style}/>'

    marks = "".join(
        f'<text x="{LEFT - 6}" y="{at((0, value))[1] + 4:.0f}" text-anchor="end">{value:.2f}</text>'
        for value in (low, (low + high) / 2, high)
    )
    marks += "".join(
        f'<text x="{at((tokens * share, low))[0]:.0f}" y="{HEIGHT - 14}" text-anchor="middle">{_short(tokens * share)}'
        "</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#e15759"/>' for x, y in map(at, held))
    thin, thick = 'stroke="#4e79a7" stroke-opacity=".3"', 'stroke="#4e79a7" stroke-width="2"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui,sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{marks}'
        f"{line(points, thin)}{line(smooth, thick)}{dots}"
        f'<text x="{WIDTH - 10}" y="{TOP + 6}" text-anchor="end">nats a target: training (line), held out (dots); tokens seen'
        "</text></svg>"
    )


def _short(tokens: float) -> str:
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"
