"""The laws of the sweep: each judge returns the violations that it sees, as sentences; none is a pass."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

Contents = dict[str, str]  # a path relative to a folder -> the hash of its file, or what else it is

_UNFINISHED = re.compile(r".*(\.part|\.tmp|\.incomplete|orbax-checkpoint-tmp.*)")
_REMEDY = re.compile(
    r"[:;,] (set|free|make|name|choose|remove|check|wait|give|pass|use|run|resume|rename|move|stop)\b"
)
MB = 1 << 20
HEALTH_DELAY_S = 0.1  # what hostile clients may add to the 95th percentile of /health
HEALTH_PAUSE_S = 1.0  # and to its longest answer
LEVEL_BYTES, LEVEL_SHARE = 128 * MB, 1.1  # how far memory may still rise: a prompt cache of 64 MB, and arenas
PEAK_BYTES = 512 * MB  # how far it may ever rise


def contents(folder: Path, patterns: Iterable[str] = ("**/*",)) -> Contents:
    """The files, links and folders below `folder` that match one of the patterns."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return {str(path.relative_to(folder)): _content(path) for path in sorted(paths)}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def equal(expected: Contents, actual: Contents, what: str) -> list[str]:
    """What is as it should be: the same paths with the same bytes."""
    missing = [f"{what}: {path} is missing" for path in expected.keys() - actual.keys()]
    extra = [f"{what}: {path} should not be there" for path in actual.keys() - expected.keys()]
    return sorted(missing) + sorted(extra) + complete(expected, actual, what)


def complete(expected: Contents, actual: Contents, what: str) -> list[str]:
    """What is there at all has the right bytes; it may be missing."""
    both = sorted(expected.keys() & actual.keys())
    return [f"{what}: {path} has other bytes" for path in both if expected[path] != actual[path]]


def no_leftovers(folder: Path, keep: Iterable[str] = ()) -> list[str]:
    """No unfinished file below `folder`, other than the user's own in `keep`."""
    paths = (path for path in folder.glob("**/*") if _UNFINISHED.fullmatch(path.name))
    names = (str(path.relative_to(folder)) for path in sorted(paths))
    return [f"a leftover: {name}" for name in names if name not in set(keep)]


def error_text(text: str, folder: Path | None) -> list[str]:
    """An error message names a path below `folder` (where one is given) and a remedy, without a traceback."""
    violations = ["a traceback"] if "Traceback" in text else []
    message = next(
        (line for line in reversed(text.splitlines()) if line.startswith(("error: ", "note: "))), ""
    )
    if not message:
        return [*violations, f"no line with the error: {text.strip()[-200:]!r}"]
    if folder is not None and str(folder) not in message:
        violations.append(f"no path in {message!r}")
    if not _REMEDY.search(message):
        violations.append(f"no remedy in {message!r}")
    return violations


def answers(expected: Mapping[str, object], received: Iterable[tuple[str, object]]) -> list[str]:
    """Every good client's answer is the one that it gets alone; at least one came."""
    pairs, violations = list(received), []
    for name, answer in pairs:
        if answer != expected[name]:
            violations.append(f"{name} got {str(answer)[:120]!r}, alone {str(expected[name])[:120]!r}")
    return violations or ([] if pairs else ["no good client got an answer"])


def health(alone: Sequence[float], besieged: Sequence[float]) -> list[str]:
    """Seconds of /health among good clients, and with the hostile ones too; infinite where no answer came."""
    if not alone or not besieged:
        return ["/health was not measured"]
    late, pause = percentile(besieged) - percentile(alone), max(besieged) - max(alone)
    violations = []
    if not late <= HEALTH_DELAY_S:
        violations.append(f"hostile clients add {late * 1000:.0f} ms to the 95th percentile of /health")
    if not pause <= HEALTH_PAUSE_S:
        violations.append(f"/health took {max(besieged):.1f} s, before {max(alone):.1f} s")
    return violations


def percentile(values: Sequence[float], share: float = 0.95) -> float:
    """The value that `share` of all do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def memory(before: int, samples: Sequence[int]) -> list[str]:
    """Resident bytes before, and while hostile clients are there: the last quarter is as the second one."""
    quarter = len(samples) // 4
    if not quarter:
        return ["memory was not measured"]
    settled, last = median(samples[quarter : 2 * quarter]), median(samples[-quarter:])
    violations = []
    if last > settled * LEVEL_SHARE + LEVEL_BYTES:
        violations.append(f"memory rises from {settled / MB:.0f} to {last / MB:.0f} MB")
    if max(samples) > before + PEAK_BYTES:
        violations.append(f"memory peaks at {max(samples) / MB:.0f} MB, before {before / MB:.0f} MB")
    return violations


def log(lines: Iterable[str]) -> list[str]:
    """A server's log has no traceback, and no control character that a client sent."""
    text = "".join(lines)
    violations = ["a traceback in the server's log"] if "Traceback" in text else []
    odd = re.search(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", text)
    return violations + ([f"the server's log has {odd[0]!r}"] if odd else [])
