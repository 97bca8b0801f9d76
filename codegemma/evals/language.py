"""BoolQ, PIQA, TriviaQA, ARC, HellaSwag, MMLU and WinoGrande: likelihoods of choices, and exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from functools import partial

from codegemma.evals.records import Record, Records
from codegemma.evals.task import ChoiceTask, GenerationTask, Item, ModelOutput, Task, Verdict, cut


def shots_of(
    records: Records, scored: str, others: Sequence[str], count: int
) -> tuple[list[Record], list[Record], str]:
    """(shots, records to score, note). The shots are the first records of another split.

    Where there is no other split, they are records spread over the scored one (its first ones may all be of
    one source, as HellaSwag's are), and are not scored."""
    rows = records(scored)
    for name in others:
        if len(examples := records.maybe(name)) >= count:
            return examples[:count], rows, f"{count}-shot from {name}"
    chosen = {i * len(rows) // count for i in range(count)}
    examples = [rows[i] for i in sorted(chosen)]
    note = f"{count}-shot: {count} validation items spread over the set, which are not scored"
    return examples, [row for i, row in enumerate(rows) if i not in chosen], note


def boolq_items(records: Records) -> tuple[list[Item], str]:
    """Yes or no to a question about a passage."""

    def item(i: int, r: Record) -> Item:
        context = f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:"
        return _choices(f"boolq/{i}", context, ("no", "yes"), int(r["answer"]))

    return [item(i, r) for i, r in enumerate(records("boolq"))], "0-shot"


def piqa_items(records: Records) -> tuple[list[Item], str]:
    """Which of two ways reaches a goal."""

    def item(i: int, r: Record) -> Item:
        context = f"Question: {r['goal']}\nAnswer:"
        return _choices(f"piqa/{i}", context, (r["sol1"], r["sol2"]), r["label"])

    return [item(i, r) for i, r in enumerate(records("piqa"))], "0-shot"


def _choices(id: str, context: str, texts: Sequence[str], target: int) -> Item:
    return Item(id, choices=tuple((context, f" {text}") for text in texts), target=target)


def arc_items(kind: str, shots: int, records: Records) -> tuple[list[Item], str]:
    """ARC-Challenge ("c") or ARC-Easy ("e")."""
    others = (f"arc-{kind}-train", f"arc-{kind}-validation")
    examples, rows, note = shots_of(records, f"arc-{kind}-test", others, shots)
    lead = "".join(f"{question} {choices[gold]}\n\n" for question, choices, gold in map(_arc, examples))
    items = [
        _choices(f"arc-{kind}/{i}", lead + question, choices, gold)
        for i, (question, choices, gold) in enumerate(map(_arc, rows))
    ]
    return items, note if shots else "0-shot"


def _arc(r: Record) -> tuple[str, list[str], int]:
    """(question, choices, index of the right one)."""
    if "query" in r:  # the form in which evaluation harnesses publish it, with "Question: " in front
        return f"{r['query']}\nAnswer:", r["choices"], r["gold"]
    texts, labels = r["choices"]["text"], r["choices"]["label"]
    return f"Question: {r['question']}\nAnswer:", texts, labels.index(r["answerKey"])


def hellaswag_items(records: Records) -> tuple[list[Item], str]:
    """How a scene goes on."""
    examples, rows, note = shots_of(records, "hellaswag", ("hellaswag-train",), 10)
    lead = "".join(f"{_hellaswag(r)} {_clean(r['endings'][int(r['label'])])}\n\n" for r in examples)
    items = [
        _choices(
            f"hellaswag/{r['ind']}/{i}",
            lead + _hellaswag(r),
            list(map(_clean, r["endings"])),
            int(r["label"]),
        )
        for i, r in enumerate(rows)
    ]
    return items, note


def _hellaswag(r: Record) -> str:
    return _clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")


def _clean(text: str) -> str:
    """Removes WikiHow's [header] marks, which are artefacts of the crawl."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def mmlu_items(records: Records) -> tuple[list[Item], str]:
    """Four-choice questions, with the five examples of the question's subject in front."""
    leads: dict[str, str] = {}
    for r in records("mmlu-dev"):
        subject = r["subject"]
        title = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        leads[subject] = f"{leads.get(subject, title)}{_mmlu(r)} {'ABCD'[r['answer']]}\n\n"
    items = [
        _choices(f"mmlu/{r['subject']}/{i}", leads[r["subject"]] + _mmlu(r), "ABCD", r["answer"])
        for i, r in enumerate(records("mmlu-test"))
    ]
    return items, "5-shot from the dev split"


def _mmlu(r: Record) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", r["choices"], strict=True))
    return f"{r['question'].strip()}{options}\nAnswer:"


def winogrande_items(records: Records) -> tuple[list[Item], str]:
    """Partial scoring: the likelihood of the text behind the blank, given each filling of it."""
    examples, rows, note = shots_of(records, "winogrande", ("winogrande-train",), 5)
    lead = "".join(f"{r['sentence'].replace('_', r['option' + r['answer']])}\n\n" for r in examples)
    items = []
    for i, r in enumerate(rows):
        before, after = r["sentence"].split("_")
        fillings = tuple(
            (lead + before + r[option], " " + after.strip()) for option in ("option1", "option2")
        )
        items.append(Item(f"winogrande/{i}", choices=fillings, target=int(r["answer"]) - 1))
    return items, note


def triviaqa_items(records: Records) -> tuple[list[Item], str]:
    """Questions that are answered by a name or a date."""
    examples, rows, note = shots_of(records, "triviaqa", ("triviaqa-train",), 5)
    lead = "".join(f"{_trivia(r)} {r['answer']['value']}\n\n" for r in examples)
    items = [
        Item(r.get("question_id") or f"triviaqa/{i}", lead + _trivia(r), target=r["answer"])
        for i, r in enumerate(rows)
    ]
    return items, note


def _trivia(r: Record) -> str:
    return f"Question: {r['question']}\nAnswer:"


def normalise(answer: str) -> str:
    """TriviaQA's rule: lower case, no punctuation, no articles, single spaces."""
    text = answer.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "\u2018\u2019\u00b4`" else c for c in text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def judge_trivia(items: Sequence[Item], outputs: Sequence[ModelOutput]) -> Iterator[tuple[int, Verdict]]:
    """An answer is right that equals an alias, both normalised."""
    for i, (item, output) in enumerate(zip(items, outputs, strict=True)):
        answer = normalise(cut(output, ("\n",))[0])
        aliases = {normalise(text) for text in [item.target["value"], *item.target["aliases"]]}
        passed = answer in aliases | set(item.target.get("normalized_aliases", []))
        outcome = "matched" if passed else "no match"
        yield i, Verdict(passed, outcome, output=f"wanted: {item.target['value']}")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ChoiceTask("boolq", "BoolQ", boolq_items),
        ChoiceTask("piqa", "PIQA", piqa_items),
        GenerationTask(
            "triviaqa", "TriviaQA", triviaqa_items, judge_trivia, 32, stop=("\n",), group="language"
        ),
        ChoiceTask("arc-c", "ARC-Challenge", partial(arc_items, "c", 25), by="normalised"),
        ChoiceTask("arc-e", "ARC-Easy", partial(arc_items, "e", 0)),
        ChoiceTask("hellaswag", "HellaSwag", hellaswag_items, by="normalised"),
        ChoiceTask("mmlu", "MMLU", mmlu_items),
        ChoiceTask("winogrande", "WinoGrande", winogrande_items),
    )
}
