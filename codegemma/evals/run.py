"""Runs a task: asks the model, lets the task judge the answers, and writes samples and scores to a folder.

The folder gets, for each task: `TASK.jsonl`, the samples in the set's order, and `TASK.json`, the score; both
are the same bytes for the same model, seed and settings. `TASK.times.json` holds what may differ: the times,
and the version of what ran the programs. `TASK.partial.jsonl` keeps the answers until the task is finished.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from codegemma.evals import code, infill, language, maths
from codegemma.evals.records import Records
from codegemma.evals.task import (
    ChoiceTask,
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
from codegemma.files import atomic_write, open_locked
from codegemma.prompts import Layout, fim_stops

TASKS: dict[str, Task] = {**code.TASKS, **infill.TASKS, **language.TASKS, **maths.TASKS}
NOT_ON_THE_CARD = ("infill-span", "arc-e")
# Benchmarks that ask a model as `complete` does, in its own order and with its own adapter.
AS_COMPLETE = [name for name, task in infill.TASKS.items() if task.layout is None]
# The benchmarks of CodeGemma's model card, which has one order of infilling, that of the model.
CARD = [name for name in TASKS if not name.endswith(("-psm", "-spm", "-l2r")) and name not in NOT_ON_THE_CARD]
MAX_CHARACTERS = 4_000  # of a prompt (its end) and of a program's output in the samples file
SHOWN: dict[Layout, str] = {  # what a model sees of an item with a suffix
    "psm": "FIM ids in PSM order",
    "spm": "FIM ids in SPM order",
    "prefix": "the prefix alone",
}
CHOICE_BATCH = 32  # items whose choices are scored in one call

Answer = dict[str, Any]  # a ModelOutput or a Score as JSON
Sample = dict[str, Any]  # a line of the samples file
Progress = Callable[[str, int, int], None]  # name of the task, answered items, all items


@dataclass(frozen=True)
class EvalSettings:
    """How to decode, and how many items of a set to score (None: all)."""

    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.limit is not None and self.limit < 1) or self.temperature < 0:
            raise ValueError(f"samples and limit must be at least 1, temperature at least 0, got {self}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} greedy samples of a prompt are all the same: pass a temperature"
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
    """Runs a task, writes its files to `out` and returns its summary. `resume` continues an interrupted run.

    Raises ValueError where `resume` finds a run with other settings, and while another process runs the task
    into this folder; LookupError where records are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    _expect_no_foreign_files(out, task.name)
    if isinstance(task, GenerationTask):
        task = replace(task, layout=task.layout or getattr(model, "layout", "psm"))
    settings = settings or EvalSettings()
    file = out / f"{task.name}.partial.jsonl"  # if it is not empty, it is newer than the summary
    with open_locked(file, file, os.O_CREAT):
        try:
            return _run(task, model, records, file, settings, resume, progress)
        finally:
            if file.exists() and not file.stat().st_size:
                file.unlink()


def _run(
    task: Task,
    model: EvaluatedModel,
    records: Records,
    answer_file: Path,
    settings: EvalSettings,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    out = answer_file.parent
    identity = {"task": task.name, "model": model.name, **asdict(settings)}
    summary_file = out / f"{task.name}.json"
    if resume and summary_file.exists() and not answer_file.stat().st_size:
        summary = json.loads(summary_file.read_text())
        _check_identity({name: summary[name] for name in identity}, identity, summary_file)
        return summary
    all_items, note = task.load_items(records)
    if not all_items:
        raise LookupError(f"{task.name}: the set has no items: download its file again")
    toolchain = ""
    if isinstance(task, GenerationTask) and task.toolchain_version:
        toolchain = task.toolchain_version()
    items = subset(all_items, settings.limit)
    if isinstance(task, GenerationTask) and items[0].suffix is not None:
        note += f"; {SHOWN[task.layout or 'psm']}"
    if len(items) < len(all_items):
        note += f"; a fixed subset of {len(items)} of {len(all_items)}"
    answers = _AnswerFile(answer_file, identity, resume)
    todo = [item for item in items if item.id not in answers.by_id]
    if isinstance(task, GenerationTask):
        answered = _generate(task, model, todo, settings)
    else:
        answered = _score_choices(model, todo)
    for done, (item, answer) in enumerate(answered, len(items) - len(todo) + 1):
        answers.add(item, answer)
        progress(task.name, done, len(items))
    if isinstance(task, GenerationTask):
        samples = _generated_samples(task, items, answers.by_id)
    else:
        samples = [_choice_sample(item, answers.by_id[item.id], task.rule) for item in items]
    summary = identity | _summary(task, samples, settings) | {"note": note}
    times = {"seconds": answers.seconds, **_times(answers.by_id), "runs_on": toolchain}
    _write(out / f"{task.name}.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    _write(out / f"{task.name}.times.json", json.dumps(times, indent=1) + "\n")
    _write(summary_file, json.dumps(summary, indent=1) + "\n")
    answers.path.unlink()
    return summary


def _expect_no_foreign_files(out: Path, task: str) -> None:
    """Raises ValueError where a run would replace files of the folder that no run wrote."""
    names = []
    if not any((out / f"{task}.{ending}").exists() for ending in ("times.json", "partial.jsonl")):
        names += [f"{task}.json", f"{task}.jsonl"]
    if not any(any(out.glob(f"*.{ending}")) for ending in ("times.json", "partial.jsonl")):
        names += ["report.md", "report.html"]
    for name in names:
        if (out / name).exists():
            raise ValueError(f"{out / name} exists, and no evaluation wrote it: choose another folder")


class _AnswerFile:
    """Answers by item id, appended to a file as they come. Its first line is the run's identity: the task,
    the model and the settings. `seconds` is the wall time up to the last answer, without the time between an
    interruption and its resumption.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path, self.by_id, self.seconds = path, dict[str, list[Answer]](), 0.0
        data = path.read_bytes() if resume else b""
        data = data[: data.rfind(b"\n") + 1]  # without a line that was cut off
        lines = [json.loads(line) for line in data.splitlines()]
        if lines:
            _check_identity(lines[0], identity, path)
        for line in lines[1:]:
            self.by_id[line["item"]], self.seconds = line["answers"], line["seconds"]
        self._start = time.perf_counter() - self.seconds
        os.truncate(path, len(data))  # and not a new file, since the old one is locked
        if not lines:
            self._append(identity)

    def add(self, item: Item, answers: list[Answer]) -> None:
        self.by_id[item.id], self.seconds = answers, time.perf_counter() - self._start
        self._append({"item": item.id, "answers": answers, "seconds": self.seconds})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _check_identity(recorded: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    if recorded != identity:
        raise ValueError(
            f"{path} is of another run ({recorded}), not of {identity}: pass the same settings, another "
            "--out, or no --resume"
        )


def _generate(
    task: GenerationTask, model: EvaluatedModel, items: list[Item], settings: EvalSettings
) -> Iterator[tuple[Item, list[Answer]]]:
    """Yields an item with its samples as soon as the last of them has ended."""
    sampling = {name: value for name, value in asdict(settings).items() if name != "limit"}
    decoding = Decoding(task.max_tokens, fim_stops(model.tokenizer), task.stop, **sampling)
    prompts = [task.prompt(model.tokenizer, item) for item in items]
    incomplete: dict[int, dict[int, Answer]] = {}
    for i, number, output in model.sample(prompts, decoding):
        incomplete.setdefault(i, {})[number] = asdict(output)
        if len(incomplete[i]) == settings.samples:
            yield items[i], [answer for _, answer in sorted(incomplete.pop(i).items())]


def _score_choices(model: EvaluatedModel, items: list[Item]) -> Iterator[tuple[Item, list[Answer]]]:
    """Yields each item with the likelihoods of its choices."""
    for start in range(0, len(items), CHOICE_BATCH):
        batch = items[start : start + CHOICE_BATCH]
        pairs = [encode_choice(model.tokenizer, choice) for item in batch for choice in item.choices]
        scores = iter(model.score(pairs))
        for item in batch:
            yield item, [asdict(score) for score in islice(scores, len(item.choices))]


def _generated_samples(
    task: GenerationTask, items: list[Item], answers: dict[str, list[Answer]]
) -> list[Sample]:
    rows = [(item, number, answer) for item in items for number, answer in enumerate(answers[item.id])]
    outputs = [ModelOutput(**answer) for _, _, answer in rows]
    samples: dict[int, Sample] = {}
    for i, verdict in task.judge([item for item, _, _ in rows], outputs):
        item, number, _ = rows[i]
        printed = re.sub(r"0x[0-9a-f]{6,}", "0x...", verdict.output)  # addresses differ from run to run
        samples[i] = {
            "id": item.id,
            "sample": number,
            "prompt": item.prompt[-MAX_CHARACTERS:],
            "suffix": item.suffix,
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


def _choice_sample(item: Item, answers: list[Answer], rule: str) -> Sample:
    scores = [Score(**answer) for answer in answers]
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


def passed_by_item(samples: Iterable[Sample]) -> dict[str, list[bool]]:
    """Whether each sample passed, by the id of its item."""
    by_item: dict[str, list[bool]] = {}
    for sample in samples:
        by_item.setdefault(sample["id"], []).append(sample["passed"])
    return by_item


def _summary(task: Task, samples: list[Sample], settings: EvalSettings) -> dict[str, Any]:
    by_item = passed_by_item(samples)
    values = [fmean(passed) for passed in by_item.values()]
    low, high = interval(values)
    by_rule: dict[str, float] = {}  # the score by each rule of the task, pass@k and exact matches
    if isinstance(task, ChoiceTask):
        by_rule = {rule: fmean(sample["rules"][rule] for sample in samples) for rule in ("raw", "normalised")}
    elif settings.samples > 1:
        for k in (k for k in (1, 10, 100) if k <= settings.samples):
            by_rule[f"pass@{k}"] = fmean(pass_at_k(len(p), sum(p), k) for p in by_item.values())
    if "exact" in samples[0]:
        by_rule["exact"] = fmean(sample["exact"] for sample in samples)
    if task.name == "gsm8k":
        for rule in ("strict", "flexible"):
            by_rule[rule] = fmean(rule in sample["outcome"] for sample in samples)
    return {
        "title": task.title,
        "group": task.group,
        "items": len(by_item),
        "score": fmean(values),
        "low": low,
        "high": high,
        "more": by_rule,
        "outcomes": dict(sorted(Counter(sample["outcome"] for sample in samples).items())),
    }


def _times(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Times and counts of the generated answers. Answers run together, so the times whose mean is
    `answer_seconds` overlap.
    """
    timed = [answer for samples in answers.values() for answer in samples if "seconds" in answer]
    return {
        "samples": len(timed),
        "answer_seconds": fmean(answer["seconds"] for answer in timed) if timed else 0.0,
        "tokens": sum(len(answer["ids"]) for answer in timed),
        "stops": dict(sorted(Counter(answer["stop_reason"] for answer in timed).items())),
    }


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
