"""The card of the default model's adapter: its data, training, learning curve, scores, licences and terms.

    python tools/adapter_card.py ADAPTER --out codegemma/adapters/gemma-3-270m-fim [--orders spm]
        [--metrics metrics.jsonl ...]

Writes the adapter in 16 bits, with README.md and PACKAGES.txt beside it. Their contents come from the files
under --cache (manifests of the rows, evaluation reports) and from --metrics of the training runs (JSON lines
with tokens and seconds). For runs that are no longer in the cache, name an earlier card with --before: the
rows of its tables are taken over.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_data import CHOICES, LIST, ONLY, PHASES, Package, packages, packages_of
from adapter_eval import CACHE, markdown_table, table

from codegemma.adapters.adapter import Adapter
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import hub_name
from codegemma.adapters.peft import save as save_adapter
from codegemma.data.folder import BuildFolder
from codegemma.evals.heldout import LAYOUTS
from codegemma.hub import NOTICE

HEAD = """---
license: gemma
library_name: peft
base_model: {base}
tags: [lora, code, gemma, fill-in-the-middle]
---
# {name}: fill-in-the-middle for Gemma 3 270M

A LoRA adapter of rank {rank} that teaches {base}, a model that only continues text, to complete code \
between a prefix
and a suffix, in CodeGemma's orders and with its control ids: `<|fim_prefix|>` 67, `<|fim_middle|>` 68, \
`<|fim_suffix|>` 69,
`<|file_separator|>` 70, unused ids of Gemma 3. It changes {layers} linear layers and the embedding's rows
{rows}, as input and as output.

`codegemma complete` uses it by default. With `peft`: prompts are \
`<bos>[path\\n]<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>`
(PSM) or `<bos>[path\\n]<|fim_suffix|>S<|fim_prefix|>P<|fim_middle|>` (SPM) as ids, each text encoded \
alone; any of the four
ids, or `<eos>`, ends the answer. {orders}
"""
LIMITS = """It is small: it completes lines and short blocks, mostly Python, and errs often. It has seen no \
chat, no instructions.
Suggestions may be wrong or insecure, and may resemble the code it was trained on; read them before you use \
them.
"""
TERMS = """The Gemma Terms of Use and the Gemma Prohibited Use Policy hold for this adapter and for what is \
made with it. The
packages it was trained on stand under the licences named above.
"""
CHANGES = """The base model's weights are unchanged. This adapter adds low-rank products to its linear \
layers and replaces the
embedding rows named above; both were made by this project.
"""


def merged(table: str, before: str) -> str:
    """A table, begun with the rows that only the same table in an earlier card has, by their first cell."""
    head, rule, *rows = table.splitlines(keepends=True)
    _, _, rest = before.partition(head)
    names = {row.split("|")[1] for row in rows}
    earlier = rest.partition("\n\n")[0].splitlines()[1:]
    return "".join([head, rule, *(f"{row}\n" for row in earlier if row.split("|")[1] not in names), *rows])


def data(cache: Path, corpus: list[Package], before: str) -> str:
    """The section on data: what the adapter was trained on, what was left out and why."""
    manifests = {
        phase: {
            file.stem: json.loads(file.read_text())
            for file in BuildFolder(cache / "rows" / phase).manifests.glob("*.json")
        }
        for phase in (*PHASES, *CHOICES)
        if BuildFolder(cache / "rows" / phase).index.exists()
    }
    if not manifests:
        raise ValueError(f"{cache} holds no finished rows: make adapter builds them")
    counts, redacted, benchmarks = _counts(manifests)
    dropped = Counter({key: count for key, count in counts.items() if not key.startswith("kept")})
    licences = Counter(package.licence.strip("_").replace("_", " ") for package in corpus)
    return "\n".join(
        [
            f"{len(corpus)} permissively licensed packages, pinned by version and hash in PACKAGES.txt. "
            "Licences: "
            + ", ".join(f"{name} {count}" for name, count in licences.most_common())
            + ". A file whose own tag or folder says "
            "otherwise was dropped.",
            "",
            f"{counts['kept']:,} files were kept; {counts['kept: held out']:,} files of the "
            f"repositories drawn for evaluation (3 %) are in no row. Left out, and why:",
            "",
            markdown_table(
                ((reason, f"{count:,}") for reason, count in dropped.most_common()), ("reason", "files")
            ),
            f"{counts['dropped: benchmark']} files held a problem of a benchmark ({benchmarks} files of "
            "problems were compared, HumanEval, its infilling sets, MBPP and BabelCode among them) and were "
            "dropped. Replaced by fake values: "
            + ", ".join(f"{kind} {count}" for kind, count in sorted(redacted.items()))
            + ".",
            "",
            "The rows that were built for each phase. Training read only a part of them: see the tokens "
            "under Training.",
            "",
            merged(
                markdown_table(
                    (_phase(phase, manifest["rows"]) for phase, manifest in manifests.items()),
                    ("phase", "window or source", "suffix first", "examples", "tokens", "tokens with loss"),
                ),
                before,
            ),
        ]
    )


def _counts(manifests: dict[str, dict[str, Any]]) -> tuple[Counter[str], Counter[str], int]:
    """Files that were kept or dropped, by reason; redactions by kind; the number of benchmark files compared.

    Only builds that share no package are counted, the largest first.
    """
    stages, counted = [], set[str]()
    for phase in sorted(filter(PHASES.get, manifests), key=lambda phase: -len(packages_of(phase))):
        names = {package.name for package in packages_of(phase)}
        if names.isdisjoint(counted):
            stages.append(manifests[phase])
            counted |= names
    counts, redacted = Counter[str](), Counter[str]()
    for manifest in stages:
        for name in ("documents", "clean", "order"):
            counts.update(manifest[name]["counts"])
        redacted.update(manifest["clean"]["redacted"])
    return counts, redacted, max(len(manifest["clean"]["recipe"]["benchmarks"]) for manifest in stages)


def _phase(name: str, rows: dict[str, Any]) -> Sequence[str]:
    """The cells of a phase's row in the table of rows."""
    counts = f"{rows['examples']:,}", f"{rows['tokens']:,}", f"{rows['learned']:,}"
    if choice := CHOICES.get(name):
        sources = ", ".join(
            f"{part:.0%} of {phase.upper()}" if part < 1 else f"all of {phase.upper()}"
            for phase, part in choice.phases.items()
        )
        psm, spm = (rows["layouts"].get(layout, 0) for layout in ("psm", "spm"))
        return (
            name.upper(),
            f"a sample: {sources}; at most {choice.max_tokens} tokens",
            f"{spm / max(1, psm + spm):.0%}",
            *counts,
        )
    recipe = PHASES[name]
    window = recipe.window or (0, 0)
    suffix = f", suffix at most {recipe.suffix_limit}" if recipe.suffix_limit else ""
    only = f", {len(ONLY[name])} packages of small functions" if name in ONLY else ""
    return name.upper(), f"{window[0]} to {window[1]} tokens{suffix}{only}", f"{recipe.spm_rate:.0%}", *counts


def training(adapter: Adapter, metrics: Sequence[Path], before: str) -> str:
    """The section on training: tokens, hours and settings. A step that was repeated counts once."""
    rows = []
    for file in metrics:
        steps = {report["step"]: report for report in map(json.loads, file.read_text().splitlines())}
        tokens, seconds = (sum(report[name] for report in steps.values()) for name in ("tokens", "seconds"))
        rows.append((file.parent.name.upper(), f"{tokens:,}", len(steps), f"{seconds / 3600:.1f}"))
    settings = {key: value for key, value in adapter.card.items() if key not in ("name", "base", "fim")}
    return "\n".join(
        [
            "On a CPU, phase by phase:",
            "",
            merged(markdown_table(rows, ("phase", "tokens", "steps", "hours")), before),
            "The last phase:",
            "",
            "```json",
            json.dumps(settings, indent=2),
            "```",
        ]
    )


def scores(evals: Path, label: str, before: str) -> str:
    """The section on evaluation: the learning curve, and the differences to the base model."""
    file = evals / f"{label}.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    rows = [
        (
            name,
            f"{points['difference']:+.4f}",
            f"{points['low']:+.4f} to {points['high']:+.4f}",
            points["items"],
        )
        for name, points in report.get("compared", {}).items()
    ]
    return "\n".join(
        [
            "Greedy. `exact`, `stops` (by itself), `ends` (the terminator is the likeliest token behind "
            "the true middle) and `gain` (nats that the suffix is worth) are of held-out holes; `single` "
            "and `multi` are HumanEval infilling, percent passed (and exact); `l2r` is the base model "
            "going on from the prefix. A run is a checkpoint, named after its phases, or after its last "
            f"phase and the steps in it; {label} is this adapter. `M tokens` is what it has read, `random` "
            "are holes at random characters, `nats` is the loss a token of held-out files read left to "
            "right, `items` the number of HumanEval infilling items.",
            "",
            merged(table(evals), before),
            *([markdown_table(rows, ("difference", "", "95 %, paired", "items"))] if rows else []),
        ]
    )


def card(adapter: Adapter, cache: Path, metrics: Sequence[Path], label: str, before: str) -> str:
    """The card's text; `label` is the adapter's point of the learning curve."""
    good, weak = (
        [order.upper() for order in LAYOUTS if adapter.trained_for(order) is trained]
        for trained in (True, False)
    )
    orders = f"Use {' or '.join(good)}." if good else ""
    if good and weak:
        orders += f" {weak[0]} is not learned well enough yet."
    head = HEAD.format(
        orders=orders,
        base=hub_name(adapter) or "google/gemma-3-270m",
        name=adapter.name,
        rank=adapter.rank,
        layers=len(adapter.a),
        rows=", ".join(map(str, sorted(adapter.rows))) or "(none)",
    )
    parts = [
        ("Data", data(cache, packages(), before)),
        ("Training", training(adapter, metrics, before)),
        ("Evaluation", scores(cache / "evals", label, before)),
        ("Limits", LIMITS),
        ("Licence", f"{NOTICE}\n{TERMS}"),
        ("Statement of changes", CHANGES),
    ]
    return "\n".join([head, *(f"## {title}\n\n{text.rstrip()}\n" for title, text in parts)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--orders",
        nargs="+",
        choices=LAYOUTS,
        help="FIM orders in which it completes well (default: those of its metadata)",
    )
    parser.add_argument("--metrics", type=Path, nargs="*", default=())
    parser.add_argument("--label", default="final", help="the adapter's point of the curve")
    parser.add_argument("--before", type=Path, help="an earlier card, whose table rows are taken over")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    adapter = load_adapter(args.adapter)
    orders = args.orders or [order for order in LAYOUTS if adapter.trained_for(order)]
    adapter = replace(adapter, card={**adapter.card, "fim": {order: order in orders for order in LAYOUTS}})
    text = card(adapter, args.cache, args.metrics, args.label, args.before.read_text() if args.before else "")
    save_adapter(adapter, args.out, "F16")
    (args.out / "README.md").write_text(text)
    shutil.copyfile(LIST, args.out / "PACKAGES.txt")
    print(args.out / "README.md")


if __name__ == "__main__":
    main()
