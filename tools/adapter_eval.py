"""Scores of the default model's adapter beside the base model: held-out code and HumanEval infilling.

    python tools/adapter_eval.py LABEL --adapter FOLDER --tokens SEEN --data BENCHMARKS [--holes 500]
    python tools/adapter_eval.py base --data BENCHMARKS     # the base model, left to right and in FIM order
    python tools/adapter_eval.py --table                    # the learning curve, in Markdown

Writes LABEL.json under --out (~/.cache/codegemma/adapter/evals), with the benchmarks' samples in a folder
beside it. The base model's run must come first: every other run is compared with it, item by item.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from adapter_data import CACHE

from codegemma import load
from codegemma.data.documents import Document
from codegemma.evals import heldout
from codegemma.evals.local import LocalModel
from codegemma.evals.records import Records
from codegemma.evals.report import compare_runs
from codegemma.evals.run import TASKS, EvalSettings, run
from codegemma.evals.task import Comparison, compare

FIM_TASKS = {kind: (f"infill-{kind}-psm", f"infill-{kind}-spm") for kind in ("single", "multi")}


def documents(rows: Path) -> list[Document]:
    """The documents of the repositories that the build of the rows held out."""
    fields = Document.__dataclass_fields__
    return [
        Document(**{name: row[name] for name in fields if name != "imports"})
        for row in pq.read_table(rows / "held-out").to_pylist()
    ]


def held_out(model: LocalModel, held: list[Document], holes: int, plain: int) -> dict[str, Any]:
    """Scores on held-out code: of `holes` holes in each FIM order, of as many inside words, arguments and
    strings ("inside"), and of `plain` documents left to right."""
    report: dict[str, Any] = {}
    if holes:
        report = heldout.measure(model, heldout.holes(held, model.tokenizer, holes))
        inside = heldout.holes(held, model.tokenizer, holes, kinds=heldout.EDITOR_KINDS)
        report["inside"] = heldout.measure(model, inside)
        report["inside"]["cut"] = heldout.left_to_right_cut(model, inside)
    return report | ({"left_to_right": heldout.left_to_right(model, held, plain)} if plain else {})


def infilling(
    model: LocalModel, names: list[str], data: Path, out: Path, limits: dict[str, int | None]
) -> dict[str, Any]:
    """Scores of the named benchmarks, whose samples go to `out`; a finished benchmark is not run again."""
    records = Records(data, offline=True)
    fields = ("score", "low", "high", "more", "items", "outcomes")
    summaries = {
        name: run(TASKS[name], model, records, out, EvalSettings(limits[name.split("-")[1]]), resume=True)
        for name in names
    }
    return {
        name: {key: summary[key] for key in fields} | {"stopped": _stopped(out, name)}
        for name, summary in summaries.items()
    }


def _stopped(out: Path, name: str) -> float:
    """The share of a benchmark's answers that ended with a stop token."""
    stops = json.loads((out / f"{name}.times.json").read_text())["stops"]
    return stops.get("token", 0) / max(1, sum(stops.values()))


def compared(report: dict[str, Any], base: dict[str, Any], out: Path, base_out: Path) -> dict[str, Any]:
    """Paired differences to the base model continuing the prefix, for each FIM order and held-out code."""
    differences: dict[str, Any] = {}
    for kind, names in FIM_TASKS.items():
        for name in names:
            if name in report["infilling"] and f"infill-{kind}-l2r" in base["infilling"]:
                differences[f"{name} - base left to right"] = _interval(
                    compare(_scores(base_out, f"infill-{kind}-l2r"), _scores(out, name))
                )
    if out != base_out and set(report["infilling"]) & set(base["infilling"]):
        for name, comparison in compare_runs(base_out, out).items():
            differences[f"{name} - base in FIM order"] = _interval(comparison)
    before, after = (scores["held_out"].get("left_to_right", []) for scores in (base, report))
    if before and len(before) == len(after) and out != base_out:
        nats: Any = (dict(enumerate(before)), dict(enumerate(after)))
        differences["nats a token left to right"] = _interval(compare(*nats))
    return differences


def _interval(comparison: Comparison) -> dict[str, float]:
    return {key: getattr(comparison, key) for key in ("items", "difference", "low", "high")}


def _scores(folder: Path, name: str) -> dict[str, float]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return {sample["id"]: float(sample["passed"]) for sample in map(json.loads, lines)}


def cells_of(report: dict[str, Any]) -> list[str]:
    """The cells of one row of the learning curve; see HEAD."""
    held, tasks = report["held_out"], report["infilling"]

    def share(*path: str) -> str:
        value: Any = report
        for key in path:
            value = value.get(key, {})
        return f"{100 * value:.1f}" if isinstance(value, float) else "-"

    def passed(name: str) -> str:
        exact = share("infilling", name, "more", "exact")
        return share("infilling", name, "score") + (f" ({exact})" if exact != "-" else "")

    plain = held.get("left_to_right", [])
    cells = [report["label"], f"{report['tokens'] / 1e6:.1f}"]
    for layout in heldout.LAYOUTS:
        cells += [share("held_out", layout, "all", name, "mean") for name in ("exact", "stopped", "ended")]
        cells += [share("held_out", layout, "random", "exact", "mean")]
        cells += [f"{held[layout]['all']['gain']['mean']:+.2f}" if layout in held else "-"]
    cells += [passed(name) for names in FIM_TASKS.values() for name in names]
    cells += [passed(f"infill-{kind}-l2r") for kind in FIM_TASKS]
    return [
        *cells,
        f"{sum(plain) / len(plain):.4f}" if plain else "-",
        str(max((task["items"] for task in tasks.values()), default=0)),
    ]


HEAD = [
    "run",
    "M tokens",
    *(
        f"{layout} {column}"
        for layout in ("PSM", "SPM")
        for column in ("exact", "stops", "ends", "random exact", "gain")
    ),
    "single PSM",
    "single SPM",
    "multi PSM",
    "multi SPM",
    "single l2r",
    "multi l2r",
    "nats",
    "items",
]


def markdown_table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """A Markdown table, each row a line."""
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in (head, ["---"] * len(head), *rows))


def table(out: Path) -> str:
    """The learning curve in Markdown."""
    reports = [json.loads(file.read_text()) for file in out.glob("*.json")]
    return markdown_table(map(cells_of, sorted(reports, key=lambda report: report["tokens"])), HEAD)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The report of one point of the curve, compared with the base model's if there is one."""
    is_base, folder = args.label == args.base, args.out / args.label
    loaded = load(args.model, threads=args.threads)
    model = LocalModel(loaded, loaded.adapter_at(args.adapter) if args.adapter else "none")
    limits = {"single": args.limit, "multi": None if args.multi < 0 else args.multi}
    names: list[str] = []
    for kind, fim_names in FIM_TASKS.items():
        if limits[kind] != 0:
            names += [*fim_names, *([f"infill-{kind}-l2r"] if is_base else [])]
    report: dict[str, Any] = {
        "label": args.label,
        "tokens": _tokens_in_cache(is_base) if args.tokens is None else args.tokens,
        "adapter": str(args.adapter or ""),
        "held_out": held_out(model, documents(args.rows), args.holes, args.plain),
    }
    report["infilling"] = infilling(model, names, args.data, folder, limits)
    base = args.out / f"{args.base}.json"
    if is_base or base.exists():
        before = report if is_base else json.loads(base.read_text())
        report["compared"] = compared(report, before, folder, args.out / args.base)
    return report


def _tokens_in_cache(is_base: bool) -> int:
    """The tokens of all training runs in the cache; the base model has seen none of them."""
    metrics = [] if is_base else (CACHE / "runs").glob("*/metrics.jsonl")
    return sum(json.loads(line)["tokens"] for file in metrics for line in file.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("label", nargs="?", help="name of this point of the curve; `base` is the base model")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument(
        "--tokens", type=int, help="tokens seen in training (default: those of the runs in the cache)"
    )
    parser.add_argument("--data", type=Path, help="folder of the benchmarks' official files")
    parser.add_argument(
        "--rows", type=Path, default=CACHE / "rows" / "f", help="rows whose held-out part is read"
    )
    parser.add_argument("--out", type=Path, default=CACHE / "evals")
    parser.add_argument("--holes", type=int, default=500)
    parser.add_argument("--plain", type=int, default=64, help="held-out documents for left-to-right nats")
    parser.add_argument(
        "--limit", type=int, help="items of the single-line set, always the same (default: all)"
    )
    parser.add_argument(
        "--multi", type=int, default=582, help="items of the multi-line set; 0 leaves it out, -1 is all"
    )
    parser.add_argument("--base", default="base", help="label of the base model's own run, to compare with")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    if not args.label or not args.data:
        parser.error("a run needs LABEL and --data")
    if args.label == args.base and args.adapter:
        parser.error(f"{args.base} is the model without an adapter: give the run another LABEL")
    report = evaluate(args)
    (args.out / f"{args.label}.json").write_text(json.dumps(report, indent=1))
    print(table(args.out))
    for name, points in report.get("compared", {}).items():
        interval = f"95 % {points['low']:+.4f} to {points['high']:+.4f}, {points['items']} items"
        print(f"{name}: {points['difference']:+.4f} ({interval})")


if __name__ == "__main__":
    main()
