"""HumanEval infilling with the model's own FIM ids, in PSM and SPM order, and left to right as the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from codegemma.evals.code import HUMANEVAL_SECONDS, judge_python
from codegemma.evals.languages import python_version
from codegemma.evals.records import Records
from codegemma.evals.task import Completion, Generate, Item, Program, Verdict
from codegemma.prompts import Layout

TITLES = {
    "single": "Infilling, single line",
    "multi": "Infilling, multi-line",
    "span": "Infilling, random span",
}
MAX_TOKENS = 128  # the report's own


def infill_items(name: str, layout: Layout, records: Records) -> tuple[list[Item], str]:
    items = [Item(r["task_id"], r["prompt"], suffix=r["suffix"], target=r) for r in records(name)]
    shown = "the prefix alone" if layout == "prefix" else f"FIM ids in {layout.upper()} order"
    return items, f"0-shot, {shown}, at most {MAX_TOKENS} tokens"


def infill_program(item: Item, completion: Completion) -> str:
    """The middle as the model wrote it: the last newline belongs to it, the suffix starts at the next line's indent."""
    test = f"{item.target['test']}\ncheck({item.target['entry_point']})"
    return f"{item.prompt}{completion.text}{item.suffix}\n{test}"


def left_to_right_program(item: Item, completion: Completion) -> str:
    """For models that see the prefix only: as many lines as were taken out, since they cannot know where it goes on."""
    count = item.target["canonical_solution"].count("\n")
    lines = "".join(line + "\n" for line in completion.text.split("\n")[:count])
    return infill_program(item, replace(completion, text=lines))


def judge(
    program: Program, items: Sequence[Item], completions: Sequence[Completion]
) -> Iterator[tuple[int, Verdict]]:
    """Exact where the whole program is the one that the middle was taken from."""
    for i, verdict in judge_python(program, HUMANEVAL_SECONDS, items, completions):
        own = infill_program(items[i], replace(completions[i], text=items[i].target["canonical_solution"]))
        yield i, replace(verdict, exact=verdict.program == own)


def _task(kind: str, layout: Layout) -> Generate:
    mark, suffix = {"psm": ("", ""), "spm": (" (SPM)", "-spm"), "prefix": (" (left to right)", "-l2r")}[
        layout
    ]
    program = left_to_right_program if layout == "prefix" else infill_program
    return Generate(
        f"infill-{kind}{suffix}",
        TITLES[kind] + mark,
        partial(infill_items, f"infill-{kind}", layout),
        partial(judge, program),
        MAX_TOKENS,
        layout=layout,
        stop=("\n",) if (kind, layout) == ("single", "prefix") else (),
        group="infilling",
        runs_on=python_version,
    )


LAYOUTS: tuple[Layout, ...] = ("psm", "spm", "prefix")
TASKS: dict[str, Generate] = {
    task.name: task
    for task in (_task(k, layout) for layout in LAYOUTS for k in TITLES if (k, layout) != ("span", "prefix"))
}
