"""BoolQ, PIQA, TriviaQA, ARC, HellaSwag, MMLU and WinoGrande: likelihoods of choices, and exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from codegemma.evals.records import Record, Records
from codegemma.evals.task import ChoiceTask, GenerationTask, Item, ModelOutput, Task, Verdict, cut


@dataclass(frozen=True)
class Question:
    """A record as a question: the text before the answer, the choices and the index of the right one."""

    text: str
    choices: Sequence[str]
    target: int
    id_prefix: str = ""  # such as "anatomy/"

    def solved(self) -> str:
        """The question with its answer, as an example in a prompt."""
        return f"{self.text} {self.choices[self.target]}\n\n"

    def item(self, name: str, index: int, examples: str) -> Item:
        """The question as an item, behind solved examples."""
        choices = tuple((examples + self.text, f" {text}") for text in self.choices)
        return Item(f"{name}/{self.id_prefix}{index}", choices=choices, target=self.target)


def split_shots(
    records: Records, scored: str, others: Sequence[str], count: int
) -> tuple[list[Record], list[Record], str]:
    """(`count` records to show as examples, records to score, note). The examples are the first records of
    the first set in `others` that has enough.

    Where none has, the examples are taken from the scored set, and are not scored. They are spread over it,
    because its first records may all be of one source, as HellaSwag's are.
    """
    rows = records(scored)
    if not count:
        return [], rows, "0-shot"
    for name in others:
        if len(examples := records.maybe(name)) >= count:
            return examples[:count], rows, f"{count}-shot from {name}"
    chosen = {i * len(rows) // count for i in range(count)}
    examples = [rows[i] for i in sorted(chosen)]
    note = f"{count}-shot: {count} items of {scored} spread over the set, which are not scored"
    return examples, [row for i, row in enumerate(rows) if i not in chosen], note


def choice_items(
    name: str,
    question: Callable[[Record], Question],
    scored: str,
    others: Sequence[str],
    shots: int,
    records: Records,
) -> tuple[list[Item], str]:
    """The items of a benchmark, each with the same solved examples (see split_shots) before its question."""
    shown, rows, note = split_shots(records, scored, others, shots)
    examples = "".join(question(r).solved() for r in shown)
    return [question(r).item(name, i, examples) for i, r in enumerate(rows)], note


def _boolq(r: Record) -> Question:
    return Question(f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ("no", "yes"), int(r["answer"]))


def _piqa(r: Record) -> Question:
    return Question(f"Question: {r['goal']}\nAnswer:", (r["sol1"], r["sol2"]), r["label"])


def _arc(r: Record) -> Question:
    if "query" in r:  # the form in which evaluation harnesses publish it, with "Question: " in front
        return Question(f"{r['query']}\nAnswer:", r["choices"], r["gold"])
    texts, labels = r["choices"]["text"], r["choices"]["label"]
    return Question(f"Question: {r['question']}\nAnswer:", texts, labels.index(r["answerKey"]))


def _hellaswag(r: Record) -> Question:
    text = _clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")
    return Question(text, [_clean(ending) for ending in r["endings"]], int(r["label"]), f"{r['ind']}/")


def _clean(text: str) -> str:
    """Removes WikiHow's [header] marks, which are artefacts of the crawl."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _mmlu(r: Record) -> Question:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", r["choices"], strict=True))
    text = f"{r['question'].strip()}{options}\nAnswer:"
    return Question(text, "ABCD", r["answer"], f"{r['subject']}/")


def mmlu_items(records: Records) -> tuple[list[Item], str]:
    """Four-choice questions, with the five examples of the question's subject in front."""
    title = "The following are multiple choice questions (with answers) about {}.\n\n"
    examples: dict[str, str] = {}
    for r in records("mmlu-dev"):
        before = examples.get(r["subject"]) or title.format(r["subject"].replace("_", " "))
        examples[r["subject"]] = before + _mmlu(r).solved()
    rows = enumerate(records("mmlu-test"))
    return [_mmlu(r).item("mmlu", i, examples[r["subject"]]) for i, r in rows], "5-shot from the dev split"


def winogrande_items(records: Records) -> tuple[list[Item], str]:
    """Partial scoring: the likelihood of the text after the blank, given each option in the blank."""
    shown, rows, note = split_shots(records, "winogrande", ("winogrande-train",), 5)
    examples = "".join(f"{r['sentence'].replace('_', r['option' + r['answer']])}\n\n" for r in shown)
    items = []
    for i, r in enumerate(rows):
        before, after = r["sentence"].split("_")
        choices = tuple((examples + before + r[f"option{n}"], f" {after.strip()}") for n in (1, 2))
        items.append(Item(f"winogrande/{i}", choices=choices, target=int(r["answer"]) - 1))
    return items, note


def triviaqa_items(records: Records) -> tuple[list[Item], str]:
    """Questions whose answer is a name, a date or the like."""
    shown, rows, note = split_shots(records, "triviaqa", ("triviaqa-train",), 5)
    examples = "".join(f"{_trivia(r)} {r['answer']['value']}\n\n" for r in shown)
    items = [
        Item(r.get("question_id") or f"triviaqa/{i}", examples + _trivia(r), target=r["answer"])
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
    """An answer is right if its first line equals one of the aliases, both normalised."""
    for i, (item, output) in enumerate(zip(items, outputs, strict=True)):
        answer = normalise(cut(output, ("\n",))[0])
        aliases = {normalise(text) for text in [item.target["value"], *item.target["aliases"]]}
        passed = answer in aliases | set(item.target.get("normalized_aliases", []))
        outcome = "matched" if passed else "no match"
        yield i, Verdict(passed, outcome, output=f"wanted: {item.target['value']}")


BOOLQ = partial(choice_items, "boolq", _boolq, "boolq", (), 0)
PIQA = partial(choice_items, "piqa", _piqa, "piqa", (), 0)
ARC_C = partial(choice_items, "arc-c", _arc, "arc-c-test", ("arc-c-train", "arc-c-validation"), 25)
ARC_E = partial(choice_items, "arc-e", _arc, "arc-e-test", (), 0)
HELLASWAG = partial(choice_items, "hellaswag", _hellaswag, "hellaswag", ("hellaswag-train",), 10)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ChoiceTask("boolq", "BoolQ", BOOLQ),
        ChoiceTask("piqa", "PIQA", PIQA),
        GenerationTask(
            "triviaqa", "TriviaQA", triviaqa_items, judge_trivia, 32, stop=("\n",), group="language"
        ),
        ChoiceTask("arc-c", "ARC-Challenge", ARC_C, rule="normalised"),
        ChoiceTask("arc-e", "ARC-Easy", ARC_E),
        ChoiceTask("hellaswag", "HellaSwag", HELLASWAG, rule="normalised"),
        ChoiceTask("mmlu", "MMLU", mmlu_items),
        ChoiceTask("winogrande", "WinoGrande", winogrande_items),
    )
}
