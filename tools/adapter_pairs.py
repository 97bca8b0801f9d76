"""Makes pairs for preference training from a model's own answers, to teach it where a middle ends.

    python tools/adapter_pairs.py ROWS... --out pairs.jsonl [--adapter NAME] [--holes 2000] [--samples 2]
    codegemma train --preferences pairs.jsonl --adapter ADAPTER --likelihood 1 --out preferred

ROWS are folders of training rows, never of evaluation. The true middle with its terminator is `chosen`. Of
the model's answers, greedy and sampled, those that run on, are cut short or repeat the suffix are `rejected`.
The same rows, model and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codegemma import load
from codegemma.config import DEFAULT_MODEL
from codegemma.data.draw import Draw
from codegemma.data.pack import Rows
from codegemma.evals.local import LocalModel
from codegemma.evals.task import Decoding
from codegemma.files import atomic_write
from codegemma.prompts import fim_stops
from codegemma.tokenizer import Tokenizer

TEMPERATURE = 0.8
BATCH = 256  # holes that are answered between two notes of progress
MIN_LINE = 6  # characters of the suffix's first line, below which its repetition says nothing


@dataclass(frozen=True)
class Hole:
    """A hole of a training row: the ids of its prompt, with <bos>, and of its middle with the terminator."""

    prompt: list[int]
    middle: list[int]
    suffix: str


def holes(rows: Rows, tokenizer: Tokenizer, max_tokens: int) -> Iterator[tuple[tuple[int, int], Hole]]:
    """((row, token at which the middle begins), hole) of each middle of at most `max_tokens` tokens."""
    control, stops = tokenizer.control, sorted(fim_stops(tokenizer))
    fim = {control.fim_prefix, control.fim_suffix, control.fim_middle}
    for number in range(len(rows)):
        row = rows[number]
        tokens_T, segments_T = row["tokens"], row["segments"]
        stops_at = np.flatnonzero(np.isin(tokens_T, stops))
        former = 0  # the end of the middle before
        for mark in np.flatnonzero(tokens_T == control.fim_middle).tolist():
            start = max(former, int(np.argmax(segments_T == segments_T[mark])))
            former = end = int(stops_at[np.searchsorted(stops_at, mark, "right")]) + 1
            prompt = tokens_T[start : mark + 1].tolist()
            if prompt[0] != control.bos:
                prompt.insert(0, control.bos)
            after = prompt[prompt.index(control.fim_suffix) + 1 :]
            suffix = after[: next(i for i, token in enumerate(after) if token in fim)]
            if end - mark - 2 <= max_tokens:
                hole = Hole(prompt, tokens_T[mark + 1 : end].tolist(), tokenizer.decode(suffix))
                yield (number, mark + 1), hole


def choose(
    folders: Sequence[Path], tokenizer: Tokenizer, count: int, seed: int, max_tokens: int
) -> list[Hole]:
    """`count` holes of all the folders, drawn by the seed."""
    drawn = [
        (Draw("pairs", seed, folder.name, *place).uniform(), hole)
        for folder in folders
        for place, hole in holes(Rows(folder), tokenizer, max_tokens)
    ]
    return [hole for _, hole in sorted(drawn, key=lambda pair: pair[0])[:count]]


def fault(answer: str, middle: str, suffix: str, stopped: bool) -> str | None:
    """What is wrong with where an answer ends; None where that is right, or cannot be told."""
    line = next((line.strip() for line in suffix.splitlines() if line.strip()), "")
    if len(line) >= MIN_LINE and line in answer and line not in middle:
        return "repeats the suffix"
    if not stopped or answer != middle and answer.startswith(middle):
        return "runs on"
    return "cut short" if answer != middle and middle.startswith(answer) else None


def pairs(
    model: LocalModel, holes: Sequence[Hole], max_tokens: int, samples: int, seed: int
) -> Iterator[dict[str, object]]:
    """A line of the file for each different faulty answer, in the order of the holes."""
    tokenizer, stops = model.tokenizer, fim_stops(model.tokenizer)
    decodings = [Decoding(max_tokens, stops)]
    if samples:
        decodings.append(Decoding(max_tokens, stops, temperature=TEMPERATURE, seed=seed, samples=samples))
    prompts = [hole.prompt for hole in holes]
    answers = [
        ((i, temperature, number), output)
        for temperature, decoding in enumerate(decodings)
        for i, number, output in model.sample(prompts, decoding)
    ]
    seen = set()
    for (i, _, _), output in sorted(answers, key=lambda pair: pair[0]):
        hole, stopped = holes[i], output.stop_reason == "token"
        wrong = fault(output.text, tokenizer.decode(hole.middle[:-1]), hole.suffix, stopped)
        if wrong and (i, *output.ids) not in seen:
            seen.add((i, *output.ids))
            yield {"prompt": hole.prompt, "chosen": hole.middle, "rejected": output.ids, "fault": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", "-m", default=DEFAULT_MODEL)
    parser.add_argument("--adapter", default="auto", help="auto, none, a name or a path")
    parser.add_argument("--holes", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=2, help="answers drawn beside the greedy one")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer; of a middle, half of it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    engine = load(args.model)
    model = LocalModel(engine, engine.adapter_at(args.adapter))
    chosen = choose(args.rows, engine.tokenizer, args.holes, args.seed, args.max_tokens // 2)
    faults = Counter[str]()
    with atomic_write(args.out) as file:
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            for line in pairs(model, batch, args.max_tokens, args.samples, args.seed):
                faults[str(line["fault"])] += 1
                file.write(json.dumps(line).encode() + b"\n")
            print(f"{start + len(batch):,} of {len(chosen):,} holes: {dict(faults)}", flush=True)


if __name__ == "__main__":
    main()
