"""GSM8K and MATH: worked solutions, whose final answer is compared as a number or as mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from codegemma.evals.records import Record, Records
from codegemma.evals.task import GenerationTask, Item, ModelOutput, Verdict, cut
from codegemma.extras import require

DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
MARKUP = r"[ \t*_\\$€£({\[=:~]*"  # that may stand before a number or its sign
NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-−](?:\\?[$€£])?|[$€£][-−]?)?{DIGITS}")  # in 16-18, - is no sign
STRICT = re.compile(rf"####{MARKUP}(?:(?:boxed|text){MARKUP})?([-−]?){MARKUP}({DIGITS})")
NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Q|Problem):")
GSM8K_STOPS = ("\nQuestion:",)
MATH_STOPS = ("\nProblem:",)


def gsm8k_items(records: Records) -> tuple[list[Item], str]:
    """Word problems; the first five of the train split are the examples."""
    shots = "".join(f"{_gsm8k(r)} {r['answer']}\n\n" for r in records("gsm8k-train")[:5])
    rows = enumerate(records("gsm8k-test"))
    items = [Item(f"gsm8k/{i}", shots + _gsm8k(r), target=r["answer"]) for i, r in rows]
    return items, "5-shot from the train split; the number after ####"


def _gsm8k(r: Record) -> str:
    return f"Question: {r['question']}\nAnswer:"


def gsm8k_answers(text: str) -> dict[str, float | None]:
    """`strict` is the number after ####, `flexible` the last number; None where there is none.

    An answer ends with the line of its ####, or where the next question begins.
    """
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    if strict := STRICT.search(text):
        text = text[: strict.end()] + text[strict.end() :].split("\n")[0]
    numbers = [match[0] for match in NUMBER.finditer(text)]
    return {
        "strict": _number(strict[1] + strict[2]) if strict else None,
        "flexible": _number(numbers[-1]) if numbers else None,
    }


def _number(text: str) -> float:
    return float(re.sub(r"[,$€£\\]", "", text).replace("−", "-"))


def judge_gsm8k(items: Sequence[Item], outputs: Sequence[ModelOutput]) -> Iterator[tuple[int, Verdict]]:
    """An answer passes by the published rule, strict; its outcome names every rule by which it is right."""
    for i, (item, output) in enumerate(zip(items, outputs, strict=True)):
        wanted = gsm8k_answers(item.target)["strict"]
        answers = gsm8k_answers(cut(output, GSM8K_STOPS)[0])
        outcome = "+".join(rule for rule, value in answers.items() if value == wanted) or "wrong"
        yield i, Verdict(answers["strict"] == wanted, outcome, output=f"wanted: {wanted:g}")


def math_items(records: Records) -> tuple[list[Item], str]:
    """Competition problems; the first of each of four subjects of the train split are the examples."""
    first: dict[str, Record] = {}
    for r in records("math-train"):
        first.setdefault(r["type"], r)
    shots = "".join(f"{_math(r)} {r['solution']}\n\n" for _, r in sorted(first.items())[:4])
    rows = enumerate(records("math-test"))
    items = [Item(f"math/{r['type']}/{i}", shots + _math(r), target=r["solution"]) for i, r in rows]
    return items, "4-shot: the first train problem of four subjects"


def _math(r: Record) -> str:
    return f"Problem: {r['problem']}\nSolution:"


def boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...}, \boxed ... or \fbox of a text; None where there is none.

    Inner braces belong to the contents. Without braces, the contents end with the formula or the line.
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        contents = re.split(r"\$|\n|\\[)\]]", text[start:], maxsplit=1)[0]
        return contents.strip(" .,;") or None
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i].strip("$")
    return None


def same_maths(wanted: str, answer: str) -> bool:
    """Whether two answers are equal as mathematics. Raises ValueError where math-verify is not installed."""
    library = require("math_verify", "MATH's answers", "eval")
    return bool(library.verify(library.parse(f"${wanted}$"), library.parse(f"${answer}$")))


def judge_math(items: Sequence[Item], outputs: Sequence[ModelOutput]) -> Iterator[tuple[int, Verdict]]:
    """An answer passes if its boxed part equals the solution's, as text or as mathematics."""
    for i, (item, output) in enumerate(zip(items, outputs, strict=True)):
        wanted, answer = boxed(item.target) or "", boxed(cut(output, MATH_STOPS)[0])
        passed = answer is not None and (answer == wanted or same_maths(wanted, answer))
        outcome = "equal" if passed else "different" if answer else "no boxed answer"
        yield i, Verdict(passed, outcome, output=f"wanted: {wanted}")


TASKS: dict[str, GenerationTask] = {
    "gsm8k": GenerationTask(
        "gsm8k", "GSM8K", gsm8k_items, judge_gsm8k, max_tokens=400, stop=GSM8K_STOPS, group="maths"
    ),
    "math": GenerationTask(
        "math", "MATH", math_items, judge_math, max_tokens=512, stop=MATH_STOPS, group="maths"
    ),
}
