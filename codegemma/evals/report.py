"""Reports finished tasks as an HTML page and as Markdown, beside published figures; compares two folders."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codegemma.evals.languages import LANGUAGES
from codegemma.evals.run import passed_by_item
from codegemma.evals.task import Comparison, compare

VARIANTS = ("2b", "1.1-2b", "7b", "7b-it", "1.1-7b-it", "gemma-3-270m")
PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished tasks of a folder by name, with times and published scores.

    Raises ValueError where there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the --out of an earlier run")
    results = {}
    for path in sorted(folder.glob("*.times.json")):
        name = path.name.removesuffix(".times.json")
        scores = PUBLISHED["scores"].get(name, {})
        results[name] = json.loads((folder / f"{name}.json").read_text()) | {
            "times": json.loads(path.read_text()),
            "published": [scores.get(variant) for variant in VARIANTS],
        }
    if not results:
        raise ValueError(f"{folder} holds no finished benchmark: run codegemma eval run ... --out {folder}")
    return results


def write(folder: Path) -> Path:
    """Writes `report.md`, the page `report.html` and, for each task, a script with its samples, which the
    page loads when it shows them. Returns the path of the page.
    """
    import jinja2

    results = load(folder)
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    for name in results:
        script = f"receive({json.dumps(name)}, {json.dumps(_samples(folder, name))})\n"
        (folder / f"{name}.samples.js").write_text(script)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, keep_trailing_newline=True).from_string(template)
    data = {
        "results": results,
        "variants": VARIANTS,
        "seconds": PUBLISHED["seconds"],
        "languages": [*LANGUAGES],
    }
    title = ", ".join(sorted({result["model"] for result in results.values()}))
    (folder / "report.html").write_text(page.render(title=title, data=data), encoding="utf-8")
    return folder / "report.html"


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The scores in percent with 95 % intervals beside the published ones, then the times: wall time, and the
    mean time of an answer while others run beside it.
    """
    scores = [["benchmark", "score", "95 %", "items", *VARIANTS, "how"]]
    times = [["benchmark", "seconds", "tokens/s", "s/answer", "tokens", "why it stopped", "toolchain"]]
    for r in results.values():
        rules = "".join(f"; {rule} {100 * value:.1f}" for rule, value in r["more"].items())
        low, high = f"{100 * r['low']:.1f}", f"{100 * r['high']:.1f}"
        published = ["" if value is None else f"{value:.1f}" for value in r["published"]]
        score = f"{100 * r['score']:.1f}"
        scores.append([r["title"], score, f"{low} - {high}", r["items"], *published, r["note"] + rules])
        if r["times"]["samples"]:
            seconds, tokens = r["times"]["seconds"], r["times"]["tokens"]
            rate, latency = tokens / max(seconds, 1e-9), r["times"].get("answer_seconds", 0.0)
            stops = ", ".join(f"{reason} {count}" for reason, count in r["times"]["stops"].items())
            toolchain = r["times"].get("runs_on", "")
            row = [r["title"], f"{seconds:.1f}", f"{rate:.1f}", f"{latency:.3f}", tokens, stops, toolchain]
            times.append(row)
    text = f"# {', '.join(sorted({r['model'] for r in results.values()}))}\n\n" + _table(scores)
    return text + ("\n## Time\n\n" + _table(times) if len(times) > 1 else "")


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def compare_runs(before: Path, after: Path) -> dict[str, Comparison]:
    """Paired differences, after - before, of the tasks that both folders hold.

    Raises ValueError where there are none.
    """
    finished = load(after)
    shared = [name for name in load(before) if name in finished]
    if not shared:
        raise ValueError(f"{before} and {after} share no finished benchmark: run the same ones in both")
    return {name: compare(_scores(before, name), _scores(after, name)) for name in shared}


def _samples(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _scores(folder: Path, name: str) -> dict[str, float]:
    by_item = passed_by_item(_samples(folder, name))
    return {id: sum(passed) / len(passed) for id, passed in by_item.items()}


def comparison_text(name: str, comparison: Comparison) -> str:
    """One comparison as lines for a terminal."""
    difference, low, high = (100 * v for v in (comparison.difference, comparison.low, comparison.high))
    lines = [
        f"{name}: {difference:+.1f} points (95 % {low:+.1f} to {high:+.1f}), p = {comparison.p:.3g}, "
        f"{comparison.items} items"
    ]
    lines += [f"  + {id}" for id in comparison.gained] + [f"  - {id}" for id in comparison.lost]
    return "\n".join(lines)
