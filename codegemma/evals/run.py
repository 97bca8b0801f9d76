"""Runs a task: answers (kept as they come, so that a run can go on), verdicts, score, and the files that hold them.

In the folder of a run, for each task: `TASK.jsonl`, the samples in the set's order, and `TASK.json`, the score; both
are the same bytes for the same model, seed and settings. `TASK.times.json` holds what is not: the times, and the version
of what ran the programs.
"""

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
    Completion,
    Generate,
    Item,
    Model,
    Score,
    Task,
    encode_choice,
    interval,
    pass_at_k,
    rank,
    stop_ids,
    subset,
)

TASKS: dict[str, Task] = {**code.TASKS, **infill.TASKS, **language.TASKS, **maths.TASKS}
CARD = [
    name for name in TASKS if not name.endswith(("-spm", "-l2r")) and name not in ("infill-span", "arc-e")
]
KEPT = 4_000  # characters of a prompt's end and of a program's output in the samples file
GROUP = 32  # items whose choices are scored in one call
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to decode and how much of a set to score; `samples` above 1 needs a temperature."""

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


def run(
    task: Task,
    model: Model,
    records: Records,
    out: Path,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """The task's summary (also written to `out`). `resume` keeps the answers that an interrupted run has left."""
    settings = settings or Settings()
    out.mkdir(parents=True, exist_ok=True)
    identity = {"task": task.name, "model": model.name, **asdict(settings)}
    finished = out / f"{task.name}.json"
    if resume and finished.exists():
        summary = json.loads(finished.read_text())
        _same({name: summary[name] for name in identity}, identity, finished)
        return summary
    every, note = task.items(records)
    items = subset(every, settings.limit)
    if len(items) < len(every):
        note += f"; a fixed subset of {len(items)} of {len(every)}"
    answers = _Answers(out / f"{task.name}.partial.jsonl", identity, resume)
    todo = [item for item in items if item.id not in answers.of]
    for done, (item, answer) in enumerate(_ask(task, model, todo, settings), len(items) - len(todo) + 1):
        answers.add(item, answer)
        progress(task.name, done, len(items))
    samples = sorted(_judge(task, items, answers.of), key=lambda sample: (sample["place"], sample["sample"]))
    for sample in samples:
        del sample["place"]
    summary = identity | _summary(task, samples, settings) | {"note": note}
    _write(out / f"{task.name}.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    tool = task.runs_on() if isinstance(task, Generate) and task.runs_on else ""
    _write(
        out / f"{task.name}.times.json", json.dumps(_times(answers.of) | {"runs_on": tool}, indent=1) + "\n"
    )
    _write(finished, json.dumps(summary, indent=1) + "\n")
    answers.path.unlink()
    return summary


class _Answers:
    """Answers by item id, appended to a file as they come."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path, self.of = path, dict[str, list[dict[str, Any]]]()
        lines = (
            path.read_text().split("\n")[:-1] if resume and path.exists() else []
        )  # a torn last line is dropped
        if lines:
            _same(json.loads(lines[0]), identity, path)
        for line in lines[1:]:
            self.of |= json.loads(line)
        _write(path, "".join(line + "\n" for line in lines or [json.dumps(identity)]))

    def add(self, item: Item, answer: list[dict[str, Any]]) -> None:
        self.of[item.id] = answer
        with self.path.open("a") as file:
            file.write(json.dumps({item.id: answer}) + "\n")


def _same(found: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    if found != identity:
        raise ValueError(
            f"{path} is of another run ({found}), not of {identity}: pass the same settings, another "
            "--out, or no --resume"
        )


def _ask(
    task: Task, model: Model, items: list[Item], settings: Settings
) -> Iterator[tuple[Item, list[dict[str, Any]]]]:
    """(item, its answers) as soon as all of an item's answers are there."""
    if isinstance(task, Generate):
        waiting: dict[int, dict[int, dict[str, Any]]] = {}
        prompts = [task.prompt(model.tokenizer, item) for item in items]
        for at, number, completion in model.sample(
            prompts,
            max_tokens=task.max_tokens,
            stop_ids=stop_ids(model.tokenizer),
            stop=list(task.stop),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            n=settings.samples,
        ):
            waiting.setdefault(at, {})[number] = asdict(completion)
            if len(waiting[at]) == settings.samples:
                yield items[at], [answer for _, answer in sorted(waiting.pop(at).items())]
        return
    for group in _groups(items, GROUP):
        pairs = [encode_choice(model.tokenizer, choice) for item in group for choice in item.choices]
        scores = iter(model.score(pairs))
        for item in group:
            yield item, [asdict(score) for score in islice(scores, len(item.choices))]


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _judge(
    task: Task, items: list[Item], answers: dict[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The samples, in any order."""
    if isinstance(task, Generate):
        places = [
            (place, number) for place, item in enumerate(items) for number in range(len(answers[item.id]))
        ]
        asked = [items[place] for place, _ in places]
        said = [Completion(**answers[items[place].id][number]) for place, number in places]
        for i, verdict in task.judge(asked, said):
            place, number = places[i]
            output = re.sub(r"0x[0-9a-f]{6,}", "0x...", verdict.output)  # addresses differ from run to run
            yield {
                "place": place,
                "id": asked[i].id,
                "sample": number,
                "prompt": asked[i].prompt[-KEPT:],
                "suffix": asked[i].suffix,
                "completion": said[i].text,
                "stop_reason": said[i].stop_reason,
                "tokens": len(said[i].ids),
                "program": verdict.program,
                "output": output[:KEPT],
                "outcome": verdict.outcome,
                "passed": verdict.passed,
                **({} if verdict.exact is None else {"exact": verdict.exact}),
            }
        return
    for place, item in enumerate(items):
        scores = [Score(**answer) for answer in answers[item.id]]
        chosen = rank(item, scores)
        passed = {rule: index == item.target for rule, index in chosen.items()}
        yield {
            "place": place,
            "id": item.id,
            "sample": 0,
            "prompt": item.choices[0][0][-KEPT:],
            "completion": item.choices[chosen[task.by]][1],
            "choices": [text for _, text in item.choices],
            "logprobs": [round(sum(score.logprobs), 6) for score in scores],
            "target": item.target,
            "passed": passed[task.by],
            "outcome": "right" if passed[task.by] else "wrong",
            "rules": passed,
        }


def _summary(task: Task, samples: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    by_item: dict[str, list[bool]] = {}
    for sample in samples:
        by_item.setdefault(sample["id"], []).append(sample["passed"])
    values = [sum(passed) / len(passed) for passed in by_item.values()]
    low, high = interval(values)
    more: dict[str, float] = {}
    if settings.samples > 1:
        more = {
            f"pass@{k}": sum(pass_at_k(len(passed), sum(passed), k) for passed in by_item.values())
            / len(by_item)
            for k in (1, 10, 100)
            if k <= settings.samples
        }
    if not isinstance(task, Generate):
        more = {
            rule: sum(sample["rules"][rule] for sample in samples) / len(samples)
            for rule in ("raw", "normalised")
        }
    if "exact" in samples[0]:
        more["exact"] = sum(sample["exact"] for sample in samples) / len(samples)
    if task.name == "gsm8k":
        more["strict"] = sum("strict" in sample["outcome"] for sample in samples) / len(samples)
    return {
        "title": task.title,
        "group": task.group,
        "items": len(by_item),
        "score": sum(values) / len(values),
        "low": low,
        "high": high,
        "more": more,
        "outcomes": dict(sorted(Counter(sample["outcome"] for sample in samples).items())),
    }


def _times(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    flat = [answer for of in answers.values() for answer in of if "seconds" in answer]
    seconds, tokens = sum(answer["seconds"] for answer in flat), sum(len(answer["ids"]) for answer in flat)
    return {
        "samples": len(flat),
        "seconds": seconds,
        "tokens": tokens,
        "stops": dict(sorted(Counter(answer["stop_reason"] for answer in flat).items())),
    }


def _write(path: Path, text: str) -> None:
    """All of the file or none: a reader never meets half a file."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
