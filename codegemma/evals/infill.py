"""HumanEval infilling with the model's own FIM ids, in PSM and SPM order."""

from __future__ import annotations

from functools import partial

from codegemma.evals.code import HUMANEVAL_SECONDS, judge_python
from codegemma.evals.records import Records
from codegemma.evals.task import Completion, Generate, Item
from codegemma.prompts import Layout

TITLES = {"single": "Infilling, single line", "multi": "Infilling, multi-line", "span": "Infilling, random span"}
MAX_TOKENS = 128                         # the report's own


def infill_items(name: str, layout: Layout, records: Records) -> tuple[list[Item], str]:
    items = [Item(r["task_id"], r["prompt"], suffix=r["suffix"], target=r) for r in records(name)]
    return items, f"0-shot, FIM ids in {layout.upper()} order, at most {MAX_TOKENS} tokens"


def infill_program(item: Item, completion: Completion) -> str:
    """The middle as the model wrote it: the last newline belongs to it, the suffix starts at the next line's indent."""
    test = f"{item.target['test']}\ncheck({item.target['entry_point']})"
    return f"{item.prompt}{completion.text}{item.suffix}\n{test}"


def _task(kind: str, layout: Layout) -> Generate:
    mark, suffix = ("", "") if layout == "psm" else (" (SPM)", "-spm")
    return Generate(f"infill-{kind}{suffix}", TITLES[kind] + mark, partial(infill_items, f"infill-{kind}", layout),
                    partial(judge_python, infill_program, HUMANEVAL_SECONDS), MAX_TOKENS, layout=layout,
                    group="infilling")


LAYOUTS: tuple[Layout, ...] = ("psm", "spm")
TASKS: dict[str, Generate] = {task.name: task for task in (_task(k, layout) for layout in LAYOUTS for k in TITLES)}
