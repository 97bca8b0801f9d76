"""HumanEval, MBPP and BabelCode: prompts, stops and programs as published."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial

from codegemma import sandbox
from codegemma.evals.languages import LANGUAGES, Toolchain, python_version
from codegemma.evals.records import Record, Records
from codegemma.evals.task import Completion, Generate, Item, Program, Verdict, cut

HUMANEVAL_SECONDS = 3.0  # its harness's limit
MBPP_SECONDS = 10.0  # none is published, and a reference solution can take 3 s
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
PYTHON_STOPS = ("\ndef", "\n#", "\nif", "\nclass")
# BabelCode's stops, and what a stop cuts off a complete function. Kotlin has none there; ours is that of C++ and Rust.
BABELCODE_STOPS: dict[str, tuple[tuple[str, ...], str]] = {
    "cpp": (("\n}",), "\n}"),
    "rust": (("\n}",), "\n}"),
    "kotlin": (("\n}",), "\n}"),
    "csharp": (("\n    }\n",), "\n    }\n}"),
    "java": (("\n    }\n",), "\n    }\n}"),
    "go": (("\nfunc", "struct", "\n// "), ""),
    "javascript": (("\nfunction ", "\n/*", "\n//"), ""),
    "python": (PYTHON_STOPS, ""),
}


def humaneval_items(records: Records) -> tuple[list[Item], str]:
    return [Item(r["task_id"], r["prompt"], target=r) for r in records("humaneval")], "0-shot"


def humaneval_program(item: Item, completion: Completion) -> str:
    text, _ = cut(completion, HUMANEVAL_STOPS)
    return f"{item.prompt}{text}\n{item.target['test']}\ncheck({item.target['entry_point']})"


def mbpp_items(records: Records) -> tuple[list[Item], str]:
    rows = {r["task_id"]: r for r in records("mbpp")}
    shots = "".join(
        f"{_mbpp_question(rows[i])}{rows[i]['code'].replace(chr(13), '')}\n[DONE]\n\n" for i in (2, 3, 4)
    )
    items = [
        Item(f"MBPP/{i}", shots + _mbpp_question(r), target=r)
        for i, r in sorted(rows.items())
        if 11 <= i <= 510
    ]
    return items, "3-shot (ids 2, 3, 4), test split 11-510"


def _mbpp_question(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return (
        "You are an expert Python programmer, and here is your task: "
        f"{record['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def mbpp_program(item: Item, completion: Completion) -> str:
    text, _ = cut(completion, ("[DONE]",))
    return "\n".join([text, item.target["test_setup_code"], *item.target["test_list"]])


def judge_python(
    program: Program, seconds: float, items: Sequence[Item], completions: Sequence[Completion]
) -> Iterator[tuple[int, Verdict]]:
    """A program that reaches its end within the time has passed. Equal programs are run once."""
    sources = [program(item, completion) for item, completion in zip(items, completions, strict=True)]
    box = sandbox.default()
    with ThreadPoolExecutor(box.workers) as pool:
        running = {
            pool.submit(box.run_python, source, seconds=seconds): source for source in dict.fromkeys(sources)
        }
        places: dict[str, list[int]] = {}
        for i, source in enumerate(sources):
            places.setdefault(source, []).append(i)
        for done in as_completed(running):
            source, result = running[done], done.result()
            for i in places[source]:
                yield (
                    i,
                    Verdict(
                        result.outcome == "passed", result.outcome, source, result.stdout + result.stderr
                    ),
                )


def babelcode_items(dataset: str, key: str, records: Records) -> tuple[list[Item], str]:
    """BC-MBPP is the 342 problems of MBPP's prompt and train splits, the number that the report's figures fit."""
    rows = [r for r in records(dataset) if r["language"].lower() in (LANGUAGES[key].name.lower(), key)]
    if dataset == "babelcode-mbpp":
        rows = [r for r in rows if int(r["qid"]) <= 10 or int(r["qid"]) > 600]
    items = [Item(f"{r['title']}", r["signature_with_docstring"] + "\n", target=r) for r in rows]
    return items, "0-shot; records regenerated with BabelCode's generator" if "extension" in rows[
        0
    ] else "0-shot"


def babelcode_body(key: str, item: Item, completion: Completion) -> str:
    """The function, with the closing braces that a stop has cut off."""
    stops, closing = BABELCODE_STOPS[key]
    text, stopped = cut(replace(completion, text=completion.text + "\n"), stops)
    return item.prompt + text[: len(completion.text)] + (closing if stopped else "")


def babelcode_program(record: Record, body: str, nonce: str = "") -> str:
    """The test program around an answer. Test lines carry `nonce`, so that an answer cannot print its own verdict."""
    head, tail = record["test_code"].replace("TEST-", f"TEST-{nonce}").split("PLACEHOLDER_CODE_BODY")
    names = {"PLACEHOLDER_FN_NAME": record["entry_fn_name"], "PLACEHOLDER_CLS_NAME": record["entry_cls_name"]}
    head, tail = (re.sub("|".join(names), lambda match: names[match[0]], part) for part in (head, tail))
    return head + body + tail


def judge_babelcode(
    key: str, items: Sequence[Item], completions: Sequence[Completion]
) -> Iterator[tuple[int, Verdict]]:
    bodies = [
        babelcode_body(key, item, completion) for item, completion in zip(items, completions, strict=True)
    ]
    yield from run_babelcode(key, [item.target for item in items], bodies)


def run_babelcode(
    key: str, records: Sequence[Record], bodies: Sequence[str]
) -> Iterator[tuple[int, Verdict]]:
    """Every test id must have printed PASSED, once, and nothing else."""
    nonces = [secrets.token_hex(8) + "-" for _ in bodies]
    secret = [babelcode_program(*each) for each in zip(records, bodies, nonces, strict=True)]
    for i, result in toolchain(key).run_all(secret, seconds=float(records[0].get("timeouts", [10])[-1])):
        found = re.findall(rf"^TEST-{nonces[i]}(.+?)\.\.\.(.*)$", result.stdout, re.M)
        wanted = sorted((id, "PASSED") for id in records[i]["test_case_ids"])
        passed = result.outcome == "passed" and sorted((id, said.strip()) for id, said in found) == wanted
        outcome = "passed" if passed else "failed" if result.outcome == "passed" else result.outcome
        output = (result.stdout + result.stderr).replace(nonces[i], "")
        yield i, Verdict(passed, outcome, babelcode_program(records[i], bodies[i]), output)


toolchain = cache(Toolchain.find)


def _babelcode(dataset: str, prefix: str, title: str, key: str) -> Generate:
    return Generate(
        f"{prefix}{key}",
        f"{title} {LANGUAGES[key].name}",
        partial(babelcode_items, dataset, key),
        partial(judge_babelcode, key),
        stop=BABELCODE_STOPS[key][0],
        group=title,
        runs_on=lambda: toolchain(key).version,
    )


TASKS: dict[str, Generate] = {
    task.name: task
    for task in (
        Generate(
            "humaneval",
            "HumanEval",
            humaneval_items,
            partial(judge_python, humaneval_program, HUMANEVAL_SECONDS),
            stop=HUMANEVAL_STOPS,
            runs_on=python_version,
        ),
        Generate(
            "mbpp",
            "MBPP",
            mbpp_items,
            partial(judge_python, mbpp_program, MBPP_SECONDS),
            stop=("[DONE]",),
            runs_on=python_version,
        ),
        *(_babelcode("babelcode-humaneval", "babelcode-", "BabelCode HumanEval", key) for key in LANGUAGES),
        *(_babelcode("babelcode-mbpp", "babelcode-mbpp-", "BabelCode MBPP", key) for key in LANGUAGES),
    )
}
