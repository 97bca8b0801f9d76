"""The tasks HumanEval, MBPP and BabelCode: prompts, stop texts and test programs as published."""

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
from codegemma.evals.task import GenerationTask, Item, ItemLoader, ModelOutput, ProgramBuilder, Verdict, cut

HUMANEVAL_SECONDS = 3.0  # the limit of its published harness
MBPP_SECONDS = 10.0  # no limit is published, and a reference solution can take 3 s
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")  # of bigcode's harness


def humaneval_items(records: Records) -> tuple[list[Item], str]:
    """HumanEval's problems with the published prompts."""
    return [Item(r["task_id"], r["prompt"], target=r) for r in records("humaneval")], "0-shot"


def humaneval_program(item: Item, output: ModelOutput) -> str:
    """The prompt and the answer, followed by HumanEval's tests."""
    text, _ = cut(output, HUMANEVAL_STOPS)
    return f"{item.prompt}{text}\n{item.target['test']}\ncheck({item.target['entry_point']})"


def mbpp_items(records: Records) -> tuple[list[Item], str]:
    """MBPP's test split, with the three examples of its paper in each prompt."""
    rows = {r["task_id"]: r for r in records("mbpp")}
    solutions = ((rows[i], rows[i]["code"].replace("\r", "")) for i in (2, 3, 4))
    shots = "".join(f"{_mbpp_question(row)}{solution}\n[DONE]\n\n" for row, solution in solutions)
    tests = [(i, r) for i, r in sorted(rows.items()) if 11 <= i <= 510]
    items = [Item(f"MBPP/{i}", shots + _mbpp_question(r), target=r) for i, r in tests]
    return items, "3-shot (ids 2, 3, 4), test split 11-510"


def _mbpp_question(record: Record) -> str:
    tests = "\n".join(record["test_list"])
    return (
        "You are an expert Python programmer, and here is your task: "
        f"{record['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def mbpp_program(item: Item, output: ModelOutput) -> str:
    """The answer, followed by MBPP's tests."""
    text, _ = cut(output, ("[DONE]",))
    return "\n".join([text, item.target["test_setup_code"], *item.target["test_list"]])


def judge_python(
    build_program: ProgramBuilder, seconds: float, items: Sequence[Item], outputs: Sequence[ModelOutput]
) -> Iterator[tuple[int, Verdict]]:
    """Yields (index, verdict) as programs end. A program passes if it reaches its end within `seconds`; equal
    programs run once.
    """
    sources = [build_program(item, output) for item, output in zip(items, outputs, strict=True)]
    indices: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        indices.setdefault(source, []).append(i)
    box = sandbox.default()
    with ThreadPoolExecutor(box.workers) as pool:
        running = {pool.submit(box.run_python, source, seconds=seconds): source for source in indices}
        for future in as_completed(running):
            source, result = running[future], future.result()
            printed = result.stdout + result.stderr
            for i in indices[source]:
                yield i, Verdict(result.outcome == "passed", result.outcome, source, printed)


def babelcode_items(dataset: str, key: str, records: Records) -> tuple[list[Item], str]:
    """The problems of one language. Those of MBPP are the 342 of its prompt and train splits, because the
    figures in CodeGemma's report are multiples of 1/342.
    """
    rows = [r for r in records(dataset) if r["language"].lower() in (LANGUAGES[key].name.lower(), key)]
    if dataset == "babelcode-mbpp":
        rows = [r for r in rows if int(r["qid"]) <= 10 or int(r["qid"]) > 600]
    items = [Item(f"{r['title']}", r["signature_with_docstring"] + "\n", target=r) for r in rows]
    regenerated = (
        "; records regenerated with BabelCode's generator" if any("extension" in r for r in rows) else ""
    )
    return items, f"0-shot{regenerated}"


def babelcode_body(key: str, item: Item, output: ModelOutput) -> str:
    """The prompt and the answer, which make up the function. Closing braces that a stop text cut off are
    put back."""
    language = LANGUAGES[key]
    text, stopped = cut(replace(output, text=output.text + "\n"), language.stop)
    return item.prompt + text[: len(output.text)] + (language.closing if stopped else "")


def babelcode_program(record: Record, body: str, nonce: str = "") -> str:
    """The test program around an answer. It prints `nonce`, which no answer can know, with each result."""
    parts = record["test_code"].replace("TEST-", f"TEST-{nonce}").split("PLACEHOLDER_CODE_BODY")
    names = {"PLACEHOLDER_FN_NAME": record["entry_fn_name"], "PLACEHOLDER_CLS_NAME": record["entry_cls_name"]}
    before, after = (re.sub("|".join(names), lambda match: names[match[0]], part) for part in parts)
    return before + body + after


def judge_babelcode(
    key: str, items: Sequence[Item], outputs: Sequence[ModelOutput]
) -> Iterator[tuple[int, Verdict]]:
    """Yields (index, verdict) as programs end; see `run_babelcode`."""
    bodies = [babelcode_body(key, item, output) for item, output in zip(items, outputs, strict=True)]
    return run_babelcode(key, [item.target for item in items], bodies)


def run_babelcode(
    key: str, records: Sequence[Record], bodies: Sequence[str]
) -> Iterator[tuple[int, Verdict]]:
    """Yields (index, verdict). A program passes if it prints PASSED for each test, and no other result."""
    if not records:
        return
    nonces = [secrets.token_hex(8) + "-" for _ in bodies]
    programs = [babelcode_program(*row) for row in zip(records, bodies, nonces, strict=True)]
    seconds = float(records[0].get("timeouts", [10])[-1])
    for i, result in toolchain(key).run_all(programs, seconds=seconds):
        printed = re.findall(rf"^TEST-{nonces[i]}(.+?)\.\.\.(.*)$", result.stdout, re.M)
        tests = sorted((id, text.strip()) for id, text in printed)
        wanted = sorted((id, "PASSED") for id in records[i]["test_case_ids"])
        passed = result.outcome == "passed" and tests == wanted
        outcome = "passed" if passed else "failed" if result.outcome == "passed" else result.outcome
        output = (result.stdout + result.stderr).replace(nonces[i], "")
        yield i, Verdict(passed, outcome, babelcode_program(records[i], bodies[i]), output)


toolchain = cache(Toolchain.find_working)


def _babelcode_task(dataset: str, prefix: str, title: str, key: str) -> GenerationTask:
    return GenerationTask(
        prefix + key,
        f"{title} {LANGUAGES[key].name}",
        partial(babelcode_items, dataset, key),
        partial(judge_babelcode, key),
        stop=LANGUAGES[key].stop,
        group=title,
        toolchain_version=lambda: toolchain(key).version,
    )


def _python_task(
    name: str,
    title: str,
    load_items: ItemLoader,
    build_program: ProgramBuilder,
    seconds: float,
    stop: tuple[str, ...],
) -> GenerationTask:
    judge = partial(judge_python, build_program, seconds)
    return GenerationTask(name, title, load_items, judge, stop=stop, toolchain_version=python_version)


TASKS: dict[str, GenerationTask] = {
    task.name: task
    for task in (
        _python_task(
            "humaneval", "HumanEval", humaneval_items, humaneval_program, HUMANEVAL_SECONDS, HUMANEVAL_STOPS
        ),
        _python_task("mbpp", "MBPP", mbpp_items, mbpp_program, MBPP_SECONDS, ("[DONE]",)),
        *(
            _babelcode_task("babelcode-humaneval", "babelcode-", "BabelCode HumanEval", key)
            for key in LANGUAGES
        ),
        *(_babelcode_task("babelcode-mbpp", "babelcode-mbpp-", "BabelCode MBPP", key) for key in LANGUAGES),
    )
}
