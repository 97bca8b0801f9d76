"""Runs a task: answers (saved as they come, so that a run can resume), verdicts, score, and the files that
hold them.

In the folder of a run, for each task: `TASK.jsonl`, the samples in the set's order, and `TASK.json`, the
score; both are the same bytes for the same model, seed and settings. `TASK.times.json` holds what may differ:
the times, and the version of what ran the programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from codegemma.evals import code, infill, language, maths
from codegemma.evals.records import Records
from codegemma.evals.task import (
    Decoding,
    EvaluatedModel,
    GenerationTask,
    Item,
    ModelOutput,
    Score,
    Task,
    encode_choice,
    interval,
    pass_at_k,
    rank,
    subset,
)
from codegemma.files import atomic_write
from codegemma.prompts import fim_stops

TASKS: dict[str, Task] = {**code.TASKS, **infill.TASKS, **language.TASKS, **maths.TASKS}
NOT_ON_THE_CARD = ("infill-span", "arc-e")
CARD = [name for name in TASKS if not name.endswith(("-spm", "-l2r")) and name not in NOT_ON_THE_CARD]
MAX_CHARACTERS = 4_000  # of a prompt's end and of a program's output in the samples file
CHOICE_BATCH = 32  # items whose choices are scored in one call

Answer = dict[str, Any]  # a ModelOutput or a Score as JSON
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalSettings:
    """How to decode, and how much of a set to score; several `samples` need a temperature above 0."""

    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.limit is not None and self.limit < 1) or self.temperature < 0:
            raise ValueError(
                f"samples and limit must be at least 1 and the temperature 0 or more, got {self}"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} greedy samples of one prompt are all the same: pass a temperature"
            )

    def decoding(self, task: GenerationTask, stop_ids: frozenset[int]) -> Decoding:
        return Decoding(
            task.max_tokens, stop_ids, task.stop, self.temperature, self.top_p, self.seed, self.samples
        )


def run(
    task: Task,
    model: EvaluatedModel,
    records: Records,
    out: Path,
    settings: EvalSettings | None = None,
    *,
    resume: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """The task's summary, which is also written to `out`. `resume` keeps the answers of an interrupted run.

    Raises ValueError where `resume` finds a run with other settings, LookupError where records are missing.
    """
    settings = settings or EvalSettings()
    out.mkdir(parents=True, exist_ok=True)
    identity = {"task": task.name, "model": model.name, **asdict(settings)}
    summary_file = out / f"{task.name}.json"
    if resume and summary_file.exists():
        summary = json.loads(summary_file.read_text())
        _check_identity({name: summary[name] for name in identity}, identity, summary_file)
        return summary
    all_items, note = task.items(records)
    items = subset(all_items, settings.limit)
    if len(items) < len(all_items):
        note += f"; a fixed subset of {len(items)} of {len(all_items)}"
    answers = _AnswerFile(out / f"{task.name}.partial.jsonl", identity, resume)
    todo = [item for item in items if item.id not in answers.by_id]
    for done, (item, answer) in enumerate(_ask(task, model, todo, settings), len(items) - len(todo) + 1):
        answers.add(item, answer)
        progress(task.name, done, len(items))
    samples = list(_samples(task, items, answers.by_id))
    summary = identity | _summary(task, samples, settings) | {"note": note}
    runs_on = task.runs_on() if isinstance(task, GenerationTask) and task.runs_on else ""
    times = _times(answers.by_id) | {"runs_on": runs_on}
    _write(out / f"{task.name}.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    _write(out / f"{task.name}.times.json", json.dumps(times, indent=1) + "\n")
    _write(summary_file, json.dumps(summary, indent=1) + "\n")
    answers.path.unlink()
    return summary


class _AnswerFile:
    """Answers by item id, appended to a file as they come. Its first line is the identity of the run."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path, self.by_id = path, dict[str, list[Answer]]()
        lines = []
        if resume and path.exists():
            lines = path.read_text().split("\n")[:-1]  # drops a line that was cut off
        if lines:
            _check_identity(json.loads(lines[0]), identity, path)
        for line in lines[1:]:
            self.by_id |= json.loads(line)
        _write(path, "".join(line + "\n" for line in lines or [json.dumps(identity)]))

    def add(self, item: Item, answers: list[Answer]) -> None:
        self.by_id[item.id] = answers
        with self.path.open("a") as file:
            file.write(json.dumps({item.id: answers}) + "\n")


def _check_identity(recorded: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    if recorded != identity:
        raise ValueError(
            f"{path} is of another run ({recorded}), not of {identity}: pass the same settings, another "
            "--out, or no --resume"
        )


def _ask(
    task: Task, model: EvaluatedModel, items: list[Item], settings: EvalSettings
) -> Iterator[tuple[Item, list[Answer]]]:
    """(item, its answers) as soon as all answers of an item are there."""
    if isinstance(task, GenerationTask):
        prompts = [task.prompt(model.tokenizer, item) for item in items]
        incomplete: dict[int, dict[int, Answer]] = {}
        for i, number, output in model.sample(prompts, settings.decoding(task, fim_stops(model.tokenizer))):
            incomplete.setdefault(i, {})[number] = asdict(output)
            if len(incomplete[i]) == settings.samples:
                yield items[i], [answer for _, answer in sorted(incomplete.pop(i).items())]
        return
    for batch in _batches(items, CHOICE_BATCH):
        pairs = [encode_choice(model.tokenizer, choice) for item in batch for choice in item.choices]
        scores = iter(model.score(pairs))
        for item in batch:
            yield item, [asdict(score) for score in islice(scores, len(item.choices))]


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _samples(task: Task, items: list[Item], answers: dict[str, list[Answer]]) -> Iterable[dict[str, Any]]:
    """The lines of the samples file, in the set's order."""
    if isinstance(task, GenerationTask):
        return _generated_samples(task, items, answers)
    return (_choice_sample(item, [Score(**a) for a in answers[item.id]], task.by) for item in items)


def _generated_samples(
    task: GenerationTask, items: list[Item], answers: dict[str, list[Answer]]
) -> list[dict[str, Any]]:
    rows = [(item, number) for item in items for number in range(len(answers[item.id]))]
    asked = [item for item, _ in rows]
    outputs = [ModelOutput(**answers[item.id][number]) for item, number in rows]
    samples: dict[int, dict[str, Any]] = {}
    for i, verdict in task.judge(asked, outputs):
        printed = re.sub(r"0x[0-9a-f]{6,}", "0x...", verdict.output)  # addresses differ from run to run
        samples[i] = {
            "id": asked[i].id,
            "sample": rows[i][1],
            "prompt": asked[i].prompt[-MAX_CHARACTERS:],
            "suffix": asked[i].suffix,
            "completion": outputs[i].text,
            "stop_reason": outputs[i].stop_reason,
            "tokens": len(outputs[i].ids),
            "program": verdict.program,
            "output": printed[:MAX_CHARACTERS],
            "outcome": verdict.outcome,
            "passed": verdict.passed,
            **({} if verdict.exact is None else {"exact": verdict.exact}),
        }
    return [samples[i] for i in sorted(samples)]


def _choice_sample(item: Item, scores: list[Score], rule: str) -> dict[str, Any]:
    chosen = rank(item, scores)
    passed = {name: index == item.target for name, index in chosen.items()}
    return {
        "id": item.id,
        "sample": 0,
        "prompt": item.choices[0][0][-MAX_CHARACTERS:],
        "completion": item.choices[chosen[rule]][1],
        "choices": [text for _, text in item.choices],
        "logprobs": [round(sum(score.logprobs), 6) for score in scores],
        "target": item.target,
        "passed": passed[rule],
        "outcome": "right" if passed[rule] else "wrong",
        "rules": passed,
    }


def passed_by_item(samples: Iterable[dict[str, Any]]) -> dict[str, list[bool]]:
    """Of each item, whether each of its samples passed."""
    by_item: dict[str, list[bool]] = {}
    for sample in samples:
        by_item.setdefault(sample["id"], []).append(sample["passed"])
    return by_item


def _summary(task: Task, samples: list[dict[str, Any]], settings: EvalSettings) -> dict[str, Any]:
    by_item = passed_by_item(samples)
    values = [_mean(passed) for passed in by_item.values()]
    low, high = interval(values)
    more: dict[str, float] = {}
    if settings.samples > 1:
        for k in (k for k in (1, 10, 100) if k <= settings.samples):
            more[f"pass@{k}"] = _mean(pass_at_k(len(p), sum(p), k) for p in by_item.values())
    if not isinstance(task, GenerationTask):
        more = {rule: _mean(sample["rules"][rule] for sample in samples) for rule in ("raw", "normalised")}
    if "exact" in samples[0]:
        more["exact"] = _mean(sample["exact"] for sample in samples)
    if task.name == "gsm8k":
        more["strict"] = _mean("strict" in sample["outcome"] for sample in samples)
    return {
        "title": task.title,
        "group": task.group,
        "items": len(by_item),
        "score": _mean(values),
        "low": low,
        "high": high,
        "more": more,
        "outcomes": dict(sorted(Counter(sample["outcome"] for sample in samples).items())),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _times(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    timed = [answer for of_item in answers.values() for answer in of_item if "seconds" in answer]
    return {
        "samples": len(timed),
        "seconds": sum(answer["seconds"] for answer in timed),
        "tokens": sum(len(answer["ids"]) for answer in timed),
        "stops": dict(sorted(Counter(answer["stop_reason"] for answer in timed).items())),
    }


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
