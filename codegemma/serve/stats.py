"""What came of suggestions: a local file of counts and times, which no part of this program sends anywhere.

One line per suggestion that was shown: the minute, the language, its latency, its length, and how much of it was taken.
No text, no path. `set_recording(False)` (`codegemma stats --off`) stops it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

MOST_BYTES = 4 << 20  # about 40,000 suggestions; of a longer file the newer half is kept
BARS = " ▁▂▃▄▅▆▇█"
MOST_OFFERED = 1024

_offered: OrderedDict[str, Shown] = OrderedDict()  # by id, until it is told what became of it


@dataclass
class Shown:
    """A suggestion on the screen. `taken` counts the characters of it that were accepted."""

    language: str
    latency_ms: float
    characters: int
    taken: int = 0
    minute: int = 0


def state_dir() -> Path:
    """`$XDG_STATE_HOME/codegemma`, by default ~/.local/state/codegemma."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "codegemma")


def file() -> Path:
    return state_dir() / "suggestions.jsonl"


def recording() -> bool:
    return not (state_dir() / "stats.off").exists()


def set_recording(on: bool) -> None:
    mark = state_dir() / "stats.off"
    if on:
        mark.unlink(missing_ok=True)
    else:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def record(shown: Shown) -> None:
    """Adds a line. What cannot be written is not worth an error in an editor."""
    if not recording():
        return
    row = asdict(shown) | {
        "latency_ms": round(shown.latency_ms, 1),
        "minute": shown.minute or int(time.time() // 60),
    }
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with open(file(), "ab") as out:  # one write of one line: processes do not mix theirs
            out.write(json.dumps(row).encode() + b"\n")
            full = out.tell() > MOST_BYTES
        if full:
            _halve()
    except OSError:
        pass


def offer(shown: Shown) -> str:
    """The id under which `settle` hears what became of a suggestion."""
    name = f"cmpl-{secrets.token_hex(12)}"
    _offered[name] = shown
    while len(_offered) > MOST_OFFERED:
        _offered.popitem(last=False)
    return name


def settle(name: str, accepted: bool) -> None:
    if shown := _offered.pop(name, None):
        record(replace(shown, taken=shown.characters if accepted else 0))


def _halve() -> None:
    data = file().read_bytes()
    kept = data[data.index(b"\n", len(data) // 2) + 1 :]
    fresh = file().with_suffix(".new")
    fresh.write_bytes(kept)
    fresh.replace(file())


def load() -> list[Shown]:
    """What was recorded; lines that are damaged are left out."""
    found = []
    try:
        lines = file().read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(Shown(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def clear() -> None:
    file().unlink(missing_ok=True)


def summary(rows: Sequence[Shown]) -> dict[str, Any]:
    asked = [row.latency_ms for row in rows]
    characters = sum(row.characters for row in rows)
    return {
        "shown": len(rows),
        "accepted": sum(row.taken > 0 for row in rows),
        "accepted_share": sum(row.taken > 0 for row in rows) / len(rows) if rows else None,
        "characters_kept_share": sum(min(row.taken, row.characters) for row in rows) / characters
        if characters
        else None,
        "latency_ms_median": median(asked) if asked else None,
        "latency_ms_95": quantiles(asked, n=20, method="inclusive")[-1] if len(asked) > 1 else None,
    }


def by_language(rows: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """The most used first."""
    groups: dict[str, list[Shown]] = {}
    for row in rows:
        groups.setdefault(row.language or "other", []).append(row)
    return {
        name: summary(group)
        for name, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def picture(rows: Sequence[Shown], days: int = 30, today: int | None = None) -> str:
    """Bars: suggestions a day and those accepted, and how long they took."""
    today = int(time.time() // 86_400) if today is None else today
    shown, accepted = [0] * days, [0] * days
    for row in rows:
        ago = today - row.minute // 1440
        if 0 <= ago < days:
            shown[days - 1 - ago] += 1
            accepted[days - 1 - ago] += row.taken > 0
    most = max(shown, default=0)
    lines = [
        f"shown     {_bars(shown, most)}  up to {most:,} a day, the last {days} days",
        f"accepted  {_bars(accepted, most)}",
    ]
    edges = (25, 50, 100, 200, 400, 800, 1600)
    counts = [
        sum(low <= row.latency_ms < high for row in rows)
        for low, high in zip((0, *edges), (*edges, 1e9), strict=True)
    ]
    width = max(counts, default=0)
    for name, count in zip([*(f"< {edge} ms" for edge in edges), "longer"], counts, strict=True):
        lines.append(f"{name:>9} {'█' * round(40 * count / width) if width else ''} {count:,}")
    return "\n".join(lines)


def _bars(values: Sequence[int], most: int) -> str:
    """One character a value; what is not zero is seen."""
    return "".join(BARS[-(-value * 8 // most)] if most else " " for value in values)
