"""Statistics of suggestions: a local file of counts and times, which this program never sends anywhere.

It has a line for each suggestion that was shown: the minute, the language, the latency, the length, and how
many characters were accepted; no text and no path. `set_recording(False)` (`codegemma stats --off`) stops it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from codegemma.files import state_dir

MAX_BYTES = 4 << 20  # about 40,000 suggestions; the older half of a longer file is dropped
BARS = " ▁▂▃▄▅▆▇█"
MAX_PENDING = 1024
LATENCY_EDGES_MS = (0, 25, 50, 100, 200, 400, 800, 1600, 1e9)

_pending: dict[str, Shown] = {}  # by id, until the client says whether the suggestion was accepted


@dataclass
class Shown:
    """A suggestion that was shown, as in a line of the file. `taken`: how many characters were accepted."""

    language: str
    latency_ms: float
    characters: int
    taken: int = 0
    minute: int = 0  # since 1970; for 0, `record` writes the present minute


def file() -> Path:
    """The file of the statistics."""
    return state_dir() / "suggestions.jsonl"


def recording() -> bool:
    """Whether suggestions are recorded."""
    return not (state_dir() / "stats.off").exists()


def set_recording(on: bool) -> None:
    """Switches the recording on or off, for this and later processes."""
    off_file = state_dir() / "stats.off"
    if on:
        off_file.unlink(missing_ok=True)
    else:
        off_file.parent.mkdir(parents=True, exist_ok=True)
        off_file.touch()


def record(shown: Shown) -> None:
    """Adds a line to the file, unless recording is off. Errors are ignored: an editor cannot use them."""
    if not recording():
        return
    minute = shown.minute or int(time.time() // 60)
    row = asdict(replace(shown, latency_ms=round(shown.latency_ms, 1), minute=minute))
    with suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        with open(file(), "ab") as out:  # one write per line, so that lines of several processes do not mix
            out.write(json.dumps(row).encode() + b"\n")
            too_long = out.tell() > MAX_BYTES
        if too_long:
            data, new = file().read_bytes(), file().with_suffix(".new")
            new.write_bytes(data[data.index(b"\n", len(data) // 2) + 1 :])
            new.replace(file())


def offer(shown: Shown) -> str:
    """Keeps a suggestion until `settle` is called with the id that this returns."""
    name = f"cmpl-{secrets.token_hex(12)}"
    _pending[name] = shown
    if len(_pending) > MAX_PENDING:
        del _pending[next(iter(_pending))]  # the oldest
    return name


def settle(name: str, accepted: bool) -> None:
    """Records whether the suggestion of this id was accepted. Unknown ids are ignored."""
    if shown := _pending.pop(name, None):
        record(replace(shown, taken=shown.characters if accepted else 0))


def load() -> list[Shown]:
    """The recorded suggestions, without damaged lines."""
    rows = []
    with suppress(OSError):
        for line in file().read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, TypeError):
                rows.append(Shown(**json.loads(line)))
    return rows


def clear() -> None:
    """Deletes the file."""
    file().unlink(missing_ok=True)


def summary(rows: Sequence[Shown]) -> dict[str, Any]:
    """Counts, shares from 0 to 1, and latencies. A value that needs more rows than there are is None."""
    latencies = [row.latency_ms for row in rows]
    characters = sum(row.characters for row in rows)
    accepted = sum(row.taken > 0 for row in rows)
    accepted_characters = sum(min(row.taken, row.characters) for row in rows)
    return {
        "shown": len(rows),
        "accepted": accepted,
        "accepted_share": accepted / len(rows) if rows else None,
        "characters_kept_share": accepted_characters / characters if characters else None,
        "latency_ms_median": median(latencies) if latencies else None,
        "latency_ms_95": quantiles(latencies, n=20, method="inclusive")[-1] if len(rows) > 1 else None,
    }


def by_language(rows: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """The summary for each language, the language with the most suggestions first."""
    groups: dict[str, list[Shown]] = {}
    for row in rows:
        groups.setdefault(row.language or "other", []).append(row)
    by_use = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: summary(group) for name, group in by_use}


def picture(rows: Sequence[Shown], days: int = 30, today: int | None = None) -> str:
    """Bars as text: the suggestions and the accepted ones of each day, and a histogram of latencies.

    `today` is in days since 1970; None: the present day.
    """
    today = int(time.time() // 86_400) if today is None else today
    shown, accepted = [0] * days, [0] * days
    for row in rows:
        day = days - 1 - (today - row.minute // 1440)
        if 0 <= day < days:
            shown[day] += 1
            accepted[day] += row.taken > 0
    peak = max(shown, default=0)
    lines = [
        f"shown     {_bars(shown, peak)}  up to {peak:,} a day, the last {days} days",
        f"accepted  {_bars(accepted, peak)}",
    ]
    bins = list(zip(LATENCY_EDGES_MS, LATENCY_EDGES_MS[1:], strict=False))
    counts = [sum(low <= row.latency_ms < high for row in rows) for low, high in bins]
    names = [*(f"< {high} ms" for _, high in bins[:-1]), "longer"]
    for name, count in zip(names, counts, strict=True):
        lines.append(f"{name:>9} {'█' * round(40 * count / max(*counts, 1))} {count:,}")
    return "\n".join(lines)


def _bars(values: Sequence[int], peak: int) -> str:
    """One character for each value, from " " for 0 to a full block for `peak`."""
    return "".join(BARS[-(-value * 8 // peak)] if peak else " " for value in values)
