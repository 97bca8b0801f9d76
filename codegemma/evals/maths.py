"""GSM8K and MATH: a worked answer, compared as mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from codegemma.evals.records import Record, Records
from codegemma.evals.task import Completion, Generate, Item, Verdict, cut

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
STRICT = re.compile(r"#### ?(-?\$?[\d.,]+)")
GSM8K_STOPS = ("\nQuestion:",)
MATH_STOPS = ("\nProblem:",)


def gsm8k_items(records: Records) -> tuple[list[Item], str]:
    shots = "".join(f"{_gsm8k(r)} {r['answer']}\n\n" for r in records("gsm8k-train")[:5])
    items = [
        Item(f"gsm8k/{i}", shots + _gsm8k(r), target=r["answer"]) for i, r in enumerate(records("gsm8k-test"))
    ]
    return items, "5-shot from the train split; flexible: the last number"


def _gsm8k(r: Record) -> str:
    return f"Question: {r['question']}\nAnswer:"


def gsm8k_answers(text: str) -> dict[str, float | None]:
    """`strict`: the number after ####. `flexible`: the last number of all."""
    strict, numbers = STRICT.search(text), NUMBER.findall(text)
    return {
        "strict": _number(strict[1]) if strict else None,
        "flexible": _number(numbers[-1]) if numbers else None,
    }


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("$", "").rstrip("."))
    except ValueError:
        return None


def judge_gsm8k(items: Sequence[Item], completions: Sequence[Completion]) -> Iterator[tuple[int, Verdict]]:
    for i, (item, completion) in enumerate(zip(items, completions, strict=True)):
        wanted, said = gsm8k_answers(item.target)["strict"], gsm8k_answers(cut(completion, GSM8K_STOPS)[0])
        outcome = "+".join(rule for rule, value in said.items() if value == wanted) or "wrong"
        yield i, Verdict(said["flexible"] == wanted, outcome, output=f"wanted: {wanted:g}")


def math_items(records: Records) -> tuple[list[Item], str]:
    """The shots are the first problem of four subjects of the train split: the set may not be stored here."""
    first: dict[str, Record] = {}
    for r in records("math-train"):
        first.setdefault(r["type"], r)
    shots = "".join(f"{_math(r)} {r['solution']}\n\n" for _, r in sorted(first.items())[:4])
    items = [
        Item(f"math/{r['type']}/{i}", shots + _math(r), target=r["solution"])
        for i, r in enumerate(records("math-test"))
    ]
    return items, "4-shot: the first train problem of four subjects"


def _math(r: Record) -> str:
    return f"Problem: {r['problem']}\nSolution:"


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces balanced."""
    at = text.rfind("\\boxed{")
    depth, start = 0, at + len("\\boxed{")
    for i in range(start, len(text)) if at >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth < 0:
            return text[start:i]
    return None


def same_maths(wanted: str, said: str) -> bool:
    """Equal as mathematics, by math-verify. Raises ImportError with the way to install it."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError('MATH compares answers with math-verify: pip install "codegemma[eval]"') from error
    return bool(verify(parse(f"${wanted}$"), parse(f"${said}$")))


def judge_math(items: Sequence[Item], completions: Sequence[Completion]) -> Iterator[tuple[int, Verdict]]:
    for i, (item, completion) in enumerate(zip(items, completions, strict=True)):
        wanted, said = boxed(item.target) or "", boxed(cut(completion, MATH_STOPS)[0])
        passed = said is not None and (said == wanted or same_maths(wanted, said))
        yield (
            i,
            Verdict(
                passed,
                "equal" if passed else "different" if said else "no boxed answer",
                output=f"wanted: {wanted}",
            ),
        )


TASKS: dict[str, Generate] = {
    "gsm8k": Generate(
        "gsm8k", "GSM8K", gsm8k_items, judge_gsm8k, max_tokens=400, stop=GSM8K_STOPS, group="maths"
    ),
    "math": Generate("math", "MATH", math_items, judge_math, max_tokens=512, stop=MATH_STOPS, group="maths"),
}
