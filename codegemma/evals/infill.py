"""HumanEval infilling: in the order that the model was trained in, in PSM (tasks -psm) or SPM (-spm), and
left to right (-l2r).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from codegemma.evals.code import HUMANEVAL_SECONDS, judge_python
from codegemma.evals.languages import python_version
from codegemma.evals.records import Records
from codegemma.evals.task import GenerationTask, Item, ModelOutput, ProgramBuilder, Verdict
from codegemma.prompts import Layout

TITLES = {
    "single": "Infilling, single line",
    "multi": "Infilling, multi-line",
    "span": "Infilling, random span",
}
ENDINGS: dict[Layout | None, tuple[str, str]] = {  # of a task's title and name, by its layout
    None: ("", ""),
    "psm": (" (PSM)", "-psm"),
    "spm": (" (SPM)", "-spm"),
    "prefix": (" (left to right)", "-l2r"),
}
MAX_TOKENS = 128  # as in CodeGemma's report


def infill_items(name: str, records: Records) -> tuple[list[Item], str]:
    """The items of one of the three sets; an item's target is its record."""
    items = [Item(r["task_id"], r["prompt"], suffix=r["suffix"], target=r) for r in records(name)]
    return items, f"0-shot, at most {MAX_TOKENS} tokens, nothing trimmed"


def infill_program(item: Item, output: ModelOutput) -> str:
    """Prefix, answer, suffix and tests. The answer's last newline counts: the suffix starts on a new line."""
    test = f"{item.target['test']}\ncheck({item.target['entry_point']})"
    return f"{item.prompt}{output.text}{item.suffix}\n{test}"


def left_to_right_program(item: Item, output: ModelOutput) -> str:
    """As `infill_program`, with only as many lines of the answer as were removed: a model that sees no suffix
    cannot know where to stop.
    """
    count = item.target["canonical_solution"].count("\n")
    lines = "".join(line + "\n" for line in output.text.split("\n")[:count])
    return infill_program(item, replace(output, text=lines))


def judge(
    build_program: ProgramBuilder, items: Sequence[Item], outputs: Sequence[ModelOutput]
) -> Iterator[tuple[int, Verdict]]:
    """As `judge_python`; an answer is exact if the text that was removed makes the same program."""
    for i, verdict in judge_python(build_program, HUMANEVAL_SECONDS, items, outputs):
        middle = items[i].target["canonical_solution"]
        reference = infill_program(items[i], replace(outputs[i], text=middle))
        yield i, replace(verdict, exact=verdict.program == reference)


def _task(kind: str, layout: Layout | None) -> GenerationTask:
    title_end, name_end = ENDINGS[layout]
    return GenerationTask(
        f"infill-{kind}{name_end}",
        TITLES[kind] + title_end,
        partial(infill_items, f"infill-{kind}"),
        partial(judge, left_to_right_program if layout == "prefix" else infill_program),
        MAX_TOKENS,
        layout=layout,
        stop=("\n",) if (kind, layout) == ("single", "prefix") else (),
        group="infilling",
        toolchain_version=python_version,
    )


TASKS: dict[str, GenerationTask] = {
    task.name: task
    for task in (_task(k, layout) for layout in ENDINGS for k in TITLES if (k, layout) != ("span", "prefix"))
}
