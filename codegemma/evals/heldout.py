"""Measures completions of files not trained on: are they right, do they stop, do they use the suffix?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain, islice
from typing import Any, Literal

from codegemma.data.documents import Document
from codegemma.data.draw import Draw
from codegemma.data.fim import FimRecipe, fim
from codegemma.evals.task import Decoding, EvaluatedModel, interval
from codegemma.prompts import Layout, fim_stops, fim_training, plain
from codegemma.prompts import fim as fim_prompt

Kind = Literal["single-line", "multi-line", "random", "word", "argument", "string"]
KINDS: tuple[Kind, ...] = ("single-line", "multi-line", "random")
EDITOR_KINDS: tuple[Kind, ...] = ("word", "argument", "string")  # what the cursor is in; see data/holes.py
MAX_TOKENS = 128
BATCH = 64  # holes that are completed, then scored while the cache still holds their prompts
LAYOUTS: tuple[Layout, ...] = ("psm", "spm")


@dataclass(frozen=True)
class Hole:
    """A file with a part taken out. `path` is None where the prompt does not give the file's path."""

    kind: Kind
    prefix: str
    middle: str
    suffix: str
    path: str | None
    language: str = ""

    def prompt(self, model: EvaluatedModel, layout: Layout) -> list[int]:
        """The ids of the fill-in-the-middle prompt; layout "prefix" leaves the suffix out."""
        suffix = "" if layout == "prefix" else self.suffix
        return fim_prompt(model.tokenizer, self.prefix, suffix, self.path, layout=layout).ids


def holes(
    documents: Iterable[Document],
    tokenizer: Any,
    count: int,
    seed: int = 0,
    tokens: tuple[int, int] = (192, 384),
    kinds: tuple[Kind, ...] = KINDS,
) -> list[Hole]:
    """`count` holes, as many of each of `kinds` (KINDS or EDITOR_KINDS), in prompts of tokens[0] to tokens[1]
    tokens.

    They depend on the documents and the seed alone, not on the order of the documents.
    """
    shares: Any = () if kinds == KINDS else tuple((kind, 1 / len(kinds)) for kind in kinds)
    recipe = FimRecipe(1.0, 0.5, tokens[1] + 1, seed, -1, window=tokens, stride=1500, kinds=shares)
    drawn = [
        (Draw("hole", seed, example.document.name, example.offset).uniform(), example)
        for example in fim(documents, tokenizer, recipe)
    ]
    by_kind: dict[str, list[Hole]] = {kind: [] for kind in kinds}
    for uniform, example in sorted(drawn, key=lambda pair: pair[0]):
        text, split = example.document.text[example.offset : example.offset + example.size], example.split
        middle = text[split.start : split.end]
        kind: Any = "multi-line" if "\n" in middle.strip("\n") else "single-line"
        if kinds != KINDS:
            kind = split.kind
        elif split.kind == "characters":
            kind = "random"
        if kind in by_kind and len(by_kind[kind]) < -(-count // len(kinds)):
            # Half of the holes name their path, by the draw's 6th decimal: the first decimals have already
            # decided which holes are taken.
            path = example.document.path if uniform * 1e6 % 2 < 1 else None
            language = example.document.language
            by_kind[kind].append(Hole(kind, text[: split.start], middle, text[split.end :], path, language))
    return list(chain.from_iterable(by_kind.values()))[:count]


def complete(model: EvaluatedModel, holes: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """Greedy completions. For each hole: text, exact, stopped (by a control id) and similarity (0 to 1)."""
    prompts = [hole.prompt(model, layout) for hole in holes]
    answers: list[dict[str, Any]] = [{} for _ in holes]
    for i, _, output in model.sample(prompts, Decoding(MAX_TOKENS, fim_stops(model.tokenizer))):
        middle = holes[i].middle
        answers[i] = {
            "text": output.text,
            "exact": output.text == middle,
            "stopped": output.stop_reason == "token",
            "similarity": _similarity(output.text, middle),
        }
    return answers


def left_to_right_cut(model: EvaluatedModel, holes: Sequence[Hole]) -> list[dict[str, Any]]:
    """Greedy continuations of the prefix alone, cut at the middle's length: exact and similarity.

    What a model that knows no suffix can do at most, as it is told how long the middle is.
    """
    answers = complete(model, holes, "prefix")
    for hole, answer in zip(holes, answers, strict=True):
        text = answer["text"][: len(hole.middle)]
        answer |= {"text": text, "exact": text == hole.middle, "similarity": _similarity(text, hole.middle)}
    return [{key: answer[key] for key in ("text", "exact", "similarity")} for answer in answers]


def likelihood(model: EvaluatedModel, holes: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """For each hole: logp (nats) and tokens of its middle, and ended.

    "ended" is whether the terminator is the likeliest token after the middle.
    """
    terminator = fim_training(model.tokenizer, "", "", "").ids[-1]
    pairs: list[tuple[list[int], list[int]]] = []
    for hole in holes:
        prompt, middle = hole.prompt(model, layout), model.tokenizer.encode(hole.middle)
        pairs += [(prompt, middle), ([*prompt, *middle], [terminator])]
    scores = iter(model.score(pairs))
    return [
        {"logp": sum(middle.logprobs), "tokens": len(middle.logprobs), "ended": end.greedy}
        for middle, end in zip(scores, scores, strict=True)
    ]


def left_to_right(
    model: EvaluatedModel, documents: Iterable[Document], count: int, tokens: int = 256
) -> list[float]:
    """The mean loss in nats of the first `tokens` tokens of each of `count` documents, after <bos>."""
    start = plain(model.tokenizer, "").ids
    chosen = islice(sorted(documents, key=lambda doc: Draw("left to right", doc.name).uniform()), count)
    texts = [model.tokenizer.encode(document.text[: 8 * tokens])[:tokens] for document in chosen]
    scores = model.score([(start, ids) for ids in texts])
    return [-sum(score.logprobs) / len(score.logprobs) for score in scores]


def answers(model: EvaluatedModel, holes: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """The results of `complete` and `likelihood` for each hole; in batches, so that a prompt is run once."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(holes), BATCH):
        batch = holes[start : start + BATCH]
        pairs = zip(complete(model, batch, layout), likelihood(model, batch, layout), strict=True)
        rows += [completed | scored for completed, scored in pairs]
    return rows


def measure(
    model: EvaluatedModel, holes: Sequence[Hole], layouts: Sequence[Layout] = LAYOUTS
) -> dict[str, Any]:
    """Means with 95 % intervals by layout, kind of hole and language, and the figures of each hole ("each").

    "gain" is how much likelier (nats) a hole's middle is when the model sees the suffix.
    """
    without_suffix = likelihood(model, holes, "prefix")
    report: dict[str, Any] = {"holes": len(holes), "prefix_logp": [row["logp"] for row in without_suffix]}
    for layout in layouts:
        rows = answers(model, holes, layout)
        for row, other in zip(rows, without_suffix, strict=True):
            row["gain"] = row["logp"] - other["logp"]
        report[layout] = {"all": _means(rows)}
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row, hole in zip(rows, holes, strict=True):
            groups[hole.kind].append(row)
            groups[hole.language].append(row)
        report[layout] |= {name: _means(group) for name, group in groups.items() if name}
        report[layout]["each"] = rows
    return report


def _similarity(text: str, middle: str) -> float:
    """The share of equal characters, 0 to 1."""
    return SequenceMatcher(None, text, middle, autojunk=False).ratio()


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    means = {}
    for name in ("exact", "similarity", "stopped", "ended", "gain"):
        values = [float(row[name]) for row in rows]
        low, high = interval(values)
        means[name] = {"mean": sum(values) / len(values), "low": low, "high": high}
    return means
