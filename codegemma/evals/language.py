"""BoolQ, PIQA, TriviaQA, ARC, HellaSwag, MMLU and WinoGrande: likelihoods of choices, and exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from functools import partial

from codegemma.evals.records import Record, Records
from codegemma.evals.task import Choose, Completion, Generate, Item, Task, Verdict, cut


def shots_of(
    records: Records, scored: str, others: Sequence[str], count: int
) -> tuple[list[Record], list[Record], str]:
    """(shots, records to score, note). The first records of another split; where there is none, records spread over the
    scored one, which are then not scored: its first ones may all be of one source, as HellaSwag's are."""
    rows = records(scored)
    for name in others:
        if len(found := records.maybe(name)) >= count:
            return found[:count], rows, f"{count}-shot from {name}"
    chosen = {i * len(rows) // count for i in range(count)}
    return (
        [rows[i] for i in sorted(chosen)],
        [row for i, row in enumerate(rows) if i not in chosen],
        f"{count}-shot: {count} validation items spread over the set, which are not scored",
    )


def boolq_items(records: Records) -> tuple[list[Item], str]:
    def item(i: int, r: Record) -> Item:
        context = f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:"
        return Item(f"boolq/{i}", choices=((context, " no"), (context, " yes")), target=int(r["answer"]))

    return [item(i, r) for i, r in enumerate(records("boolq"))], "0-shot"


def piqa_items(records: Records) -> tuple[list[Item], str]:
    def item(i: int, r: Record) -> Item:
        context = f"Question: {r['goal']}\nAnswer:"
        return Item(
            f"piqa/{i}", choices=((context, f" {r['sol1']}"), (context, f" {r['sol2']}")), target=r["label"]
        )

    return [item(i, r) for i, r in enumerate(records("piqa"))], "0-shot"


def arc_items(kind: str, shots: int, records: Records) -> tuple[list[Item], str]:
    examples, rows, note = shots_of(
        records, f"arc-{kind}-test", (f"arc-{kind}-train", f"arc-{kind}-validation"), shots
    )
    lead = "".join(f"{q} {choices[gold]}\n\n" for q, choices, gold in map(_arc, examples))
    items = []
    for i, (question, choices, gold) in enumerate(map(_arc, rows)):
        items.append(
            Item(
                f"arc-{kind}/{i}",
                choices=tuple((lead + question, f" {text}") for text in choices),
                target=gold,
            )
        )
    return items, note if shots else "0-shot"


def _arc(r: Record) -> tuple[str, list[str], int]:
    if "query" in r:  # the harnesses' query form: "Question: ..."
        return f"{r['query']}\nAnswer:", r["choices"], r["gold"]
    return (
        f"Question: {r['question']}\nAnswer:",
        r["choices"]["text"],
        r["choices"]["label"].index(r["answerKey"]),
    )


def hellaswag_items(records: Records) -> tuple[list[Item], str]:
    examples, rows, note = shots_of(records, "hellaswag", ("hellaswag-train",), 10)
    lead = "".join(f"{_hellaswag(r)} {_clean(r['endings'][int(r['label'])])}\n\n" for r in examples)
    items = [
        Item(
            f"hellaswag/{r['ind']}/{i}",
            target=int(r["label"]),
            choices=tuple((lead + _hellaswag(r), f" {_clean(text)}") for text in r["endings"]),
        )
        for i, r in enumerate(rows)
    ]
    return items, note


def _hellaswag(r: Record) -> str:
    return _clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")


def _clean(text: str) -> str:
    """Without WikiHow's [header] marks: they are artefacts of the crawl."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def mmlu_items(records: Records) -> tuple[list[Item], str]:
    leads: dict[str, str] = {}
    for r in records("mmlu-dev"):
        head = leads.get(r["subject"]) or (
            "The following are multiple choice questions (with answers) about "
            f"{r['subject'].replace('_', ' ')}.\n\n"
        )
        leads[r["subject"]] = f"{head}{_mmlu(r)} {'ABCD'[r['answer']]}\n\n"
    items = []
    for i, r in enumerate(records("mmlu-test")):
        context = leads[r["subject"]] + _mmlu(r)
        items.append(
            Item(
                f"mmlu/{r['subject']}/{i}",
                choices=tuple((context, f" {letter}") for letter in "ABCD"),
                target=r["answer"],
            )
        )
    return items, "5-shot from the dev split"


def _mmlu(r: Record) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", r["choices"], strict=True))
    return f"{r['question'].strip()}{options}\nAnswer:"


def winogrande_items(records: Records) -> tuple[list[Item], str]:
    """Partial scoring: the likelihood of what follows the blank, given each filling."""
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
    examples, rows, note = shots_of(records, "triviaqa", ("triviaqa-train",), 5)
    lead = "".join(f"{_trivia(r)} {r['answer']['value']}\n\n" for r in examples)
    return [
        Item(r.get("question_id") or f"triviaqa/{i}", lead + _trivia(r), target=r["answer"])
        for i, r in enumerate(rows)
    ], note


def _trivia(r: Record) -> str:
    return f"Question: {r['question']}\nAnswer:"


def normalise(answer: str) -> str:
    """TriviaQA's rule: lower case, no punctuation, no articles, single spaces."""
    text = answer.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "\u2018\u2019\u00b4`" else c for c in text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def judge_trivia(items: Sequence[Item], completions: Sequence[Completion]) -> Iterator[tuple[int, Verdict]]:
    for i, (item, completion) in enumerate(zip(items, completions, strict=True)):
        said = normalise(cut(completion, ("\n",))[0])
        known = {normalise(text) for text in [item.target["value"], *item.target["aliases"]]}
        passed = said in known | set(item.target.get("normalized_aliases", []))
        yield (
            i,
            Verdict(passed, "matched" if passed else "no match", output=f"wanted: {item.target['value']}"),
        )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Choose("boolq", "BoolQ", boolq_items),
        Choose("piqa", "PIQA", piqa_items),
        Generate(
            "triviaqa",
            "TriviaQA",
            triviaqa_items,
            judge_trivia,
            max_tokens=32,
            stop=("\n",),
            group="language",
        ),
        Choose("arc-c", "ARC-Challenge", partial(arc_items, "c", 25), by="normalised"),
        Choose("arc-e", "ARC-Easy", partial(arc_items, "e", 0)),
        Choose("hellaswag", "HellaSwag", hellaswag_items, by="normalised"),
        Choose("mmlu", "MMLU", mmlu_items),
        Choose("winogrande", "WinoGrande", winogrande_items),
    )
}
