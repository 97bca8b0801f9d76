"""A folder of finished tasks -> one HTML page and one Markdown table, beside the published figures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codegemma.evals.languages import LANGUAGES
from codegemma.evals.task import Comparison, compare

VARIANTS = ("2b", "1.1-2b", "7b", "7b-it", "1.1-7b-it", "gemma-3-270m")
# Percent, from the CodeGemma report (tables 2 to 5) and Gemma 3's model card. The report draws the language benchmarks
# of CodeGemma only as bars, without figures.
_HUMANEVAL = {
    "cpp": (24.2, 19.9, 32.9, 42.2, 46.6),
    "csharp": (10.6, 26.1, 22.4, 26.7, 54.7),
    "go": (20.5, 18.0, 21.7, 28.6, 34.2),
    "java": (29.2, 29.8, 41.0, 48.4, 50.3),
    "javascript": (21.7, 28.0, 39.8, 46.0, 48.4),
    "kotlin": (28.0, 32.3, 39.8, 51.6, 47.8),
    "python": (21.7, 36.6, 42.2, 48.4, 54.0),
    "rust": (26.7, 24.2, 34.1, 36.0, 37.3),
}
_MBPP = {
    "cpp": (47.1, 38.9, 53.8, 56.7, 63.5),
    "csharp": (28.7, 45.3, 32.5, 41.2, 62.0),
    "go": (45.6, 38.9, 43.3, 46.2, 53.2),
    "java": (41.8, 49.7, 50.3, 57.3, 62.9),
    "javascript": (45.3, 45.0, 58.2, 61.4, 61.4),
    "kotlin": (46.8, 49.7, 54.7, 59.9, 62.6),
    "python": (38.6, 52.9, 59.1, 62.0, 60.2),
    "rust": (45.3, 47.4, 52.9, 53.5, 52.3),
}
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "humaneval": (31.1, 37.8, 44.5, 56.1, 60.4),
    "mbpp": (43.6, 49.2, 56.2, 54.2, 55.2),
    "infill-single": (78.41, 79.28, 76.09, 68.25, 77.44),
    "infill-multi": (51.44, 50.99, 58.44, 20.05, 23.66),
    **{f"babelcode-{key}": values for key, values in _HUMANEVAL.items()},
    **{f"babelcode-mbpp-{key}": values for key, values in _MBPP.items()},
    "gsm8k": (None, None, 44.2, 41.2, 47.3),
    "math": (None, None, 19.9, 20.9, 22.3),
    **{
        name: (None,) * 5 + (value,)
        for name, value in (
            ("hellaswag", 40.9),
            ("boolq", 61.4),
            ("piqa", 67.7),
            ("triviaqa", 15.4),
            ("arc-c", 29.0),
            ("arc-e", 57.7),
            ("winogrande", 52.0),
        )
    },
}
# Seconds for the whole set, one task at a time on one NVIDIA L4 in bfloat16 (report, table 2).
PUBLISHED_SECONDS = {
    "infill-single": (543, 771, 1505, 8330, 7579),
    "infill-multi": (8479, 9372, 22896, 49438, 46888),
}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Finished tasks by name, each with its times. Raises ValueError where the folder holds none."""
    found = {}
    for path in sorted(folder.glob("*.times.json")):
        name = path.name.removesuffix(".times.json")
        found[name] = json.loads((folder / f"{name}.json").read_text()) | {
            "times": json.loads(path.read_text()),
            "published": PUBLISHED.get(name, ()),
        }
    if not found:
        raise ValueError(f"{folder} holds no finished benchmark: run codegemma eval run ... --out {folder}")
    return found


def write(folder: Path) -> Path:
    """`report.md`, `report.html` and, beside it, one script of samples per task, loaded when a reader opens it."""
    results = load(folder)
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    for name in results:
        samples = [
            json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        (folder / f"{name}.samples.js").write_text(f"receive({json.dumps(name)}, {json.dumps(samples)})\n")
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    data = {
        "results": results,
        "variants": VARIANTS,
        "seconds": PUBLISHED_SECONDS,
        "languages": list(LANGUAGES),
    }
    safe = json.dumps(data).replace("<", "\\u003c")  # no </script> may end the page's own
    title = html.escape(", ".join(sorted({result["model"] for result in results.values()})))
    (folder / "report.html").write_text(
        page.replace("__TITLE__", title).replace("__DATA__", safe), encoding="utf-8"
    )
    return folder / "report.html"


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The scores in percent with 95 % intervals beside the published ones, then the times."""
    head = ["benchmark", "score", "95 %", "items", *VARIANTS, "how"]
    rows = [
        [
            r["title"],
            f"{100 * r['score']:.1f}",
            f"{100 * r['low']:.1f} - {100 * r['high']:.1f}",
            r["items"],
            *(_percent(r["published"][i] if i < len(r["published"]) else None) for i in range(len(VARIANTS))),
            r["note"] + "".join(f"; {rule} {100 * value:.1f}" for rule, value in r["more"].items()),
        ]
        for r in results.values()
    ]
    timed = [(r["title"], r["times"]) for r in results.values() if r["times"]["samples"]]
    times = [
        [
            title,
            f"{t['seconds']:.1f}",
            f"{t['seconds'] / t['samples']:.3f}",
            t["tokens"],
            ", ".join(f"{why} {count}" for why, count in t["stops"].items()),
            t.get("runs_on", ""),
        ]
        for title, t in timed
    ]
    text = f"# {', '.join(sorted({r['model'] for r in results.values()}))}\n\n" + _table(head, rows)
    if times:
        head = ["benchmark", "seconds", "per answer", "tokens", "why it stopped", "programs ran on"]
        text += "\n## Time\n\n" + _table(head, times)
    return text


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def compare_runs(before: Path, after: Path) -> dict[str, Comparison]:
    """Paired differences, after - before, of every task that both folders hold."""
    shared = [name for name in load(before) if (after / f"{name}.jsonl").exists()]
    if not shared:
        raise ValueError(f"{before} and {after} share no finished benchmark: run the same ones in both")
    return {name: compare(_scores(before, name), _scores(after, name)) for name in shared}


def _scores(folder: Path, name: str) -> dict[str, float]:
    by_item: dict[str, list[bool]] = {}
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        by_item.setdefault(sample["id"], []).append(sample["passed"])
    return {id: sum(passed) / len(passed) for id, passed in by_item.items()}


def comparison_text(name: str, found: Comparison) -> str:
    """One comparison as lines for a terminal."""
    d = {key: 100 * value for key, value in asdict(found).items() if key in ("difference", "low", "high")}
    lines = [
        f"{name}: {d['difference']:+.1f} points (95 % {d['low']:+.1f} to {d['high']:+.1f}), p = {found.p:.3g}, "
        f"{found.items} items"
    ]
    for sign, ids in (("+", found.gained), ("-", found.lost)):
        lines += [f"  {sign} {id}" for id in ids]
    return "\n".join(lines)
