"""Completions of files that training never saw: how often they are right, stop by themselves, and use the suffix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from typing import Any, Literal

from codegemma.data.documents import Document
from codegemma.data.fim import Draw, Recipe, fim
from codegemma.evals.task import Model, interval, stop_ids
from codegemma.prompts import Layout, fim_training, plain
from codegemma.prompts import fim as fim_prompt

Kind = Literal["single-line", "multi-line", "random"]
KINDS: tuple[Kind, ...] = ("single-line", "multi-line", "random")
MAX_TOKENS = 128
TOGETHER = 64  # holes whose prompts are still cached when their likelihoods are asked for
LAYOUTS: tuple[Layout, ...] = ("psm", "spm")


@dataclass(frozen=True)
class Hole:
    """A file with a part taken out. `path` is None where the prompt does not name it."""

    kind: Kind
    prefix: str
    middle: str
    suffix: str
    path: str | None


def holes(
    documents: Iterable[Document],
    tokenizer: Any,
    count: int,
    seed: int = 0,
    tokens: tuple[int, int] = (192, 384),
) -> list[Hole]:
    """`count` holes, a third of each kind, in prompts of `tokens` tokens; always the same for the same documents."""
    recipe = Recipe(1.0, 0.5, tokens[1] + 1, seed, -1, window=tokens, stride=1500)
    made = [
        (Draw("hole", seed, each.document.name, each.offset).uniform(), each)
        for each in fim(documents, tokenizer, recipe)
    ]
    found: dict[Kind, list[Hole]] = {kind: [] for kind in KINDS}
    for share, each in sorted(made, key=lambda pair: pair[0]):
        text, split = each.document.text[each.offset : each.offset + each.size], each.split
        middle = text[split.start : split.end]
        kind: Kind = (
            "random"
            if split.kind == "characters"
            else "multi-line"
            if "\n" in middle.strip("\n")
            else "single-line"
        )
        if len(found[kind]) < -(-count // len(KINDS)):
            path = each.document.path if share * 1e6 % 2 < 1 else None
            found[kind].append(Hole(kind, text[: split.start], middle, text[split.end :], path))
    return [hole for group in found.values() for hole in group][:count]


def complete(model: Model, found: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """Of each hole, greedy: the text, whether it is exact, how similar (0 to 1), and whether it stopped by itself."""
    asked = [
        fim_prompt(model.tokenizer, hole.prefix, hole.suffix, hole.path, layout=layout).ids for hole in found
    ]
    answers: list[dict[str, Any]] = [{} for _ in found]
    for at, _, said in model.sample(
        asked,
        max_tokens=MAX_TOKENS,
        stop_ids=stop_ids(model.tokenizer),
        stop=[],
        temperature=0.0,
        top_p=1.0,
        seed=0,
        n=1,
    ):
        middle = found[at].middle
        answers[at] = {
            "text": said.text,
            "exact": said.text == middle,
            "stopped": said.stop_reason == "token",
            "similarity": SequenceMatcher(None, said.text, middle, autojunk=False).ratio(),
        }
    return answers


def likelihood(model: Model, found: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """Of each hole: the natural log-probability of its middle, and whether the end is the likeliest token behind it."""
    end = fim_training(model.tokenizer, "", "", "").ids[-1]
    pairs: list[tuple[list[int], list[int]]] = []
    for hole in found:
        suffix = "" if layout == "prefix" else hole.suffix
        prompt = fim_prompt(model.tokenizer, hole.prefix, suffix, hole.path, layout=layout).ids
        middle = model.tokenizer.encode(hole.middle)
        pairs += [(prompt, middle), ([*prompt, *middle], [end])]
    scores = iter(model.score(pairs))
    return [
        {"logp": sum(middle.logprobs), "tokens": len(middle.logprobs), "ended": ended.greedy}
        for middle, ended in zip(scores, scores, strict=True)
    ]


def left_to_right(model: Model, documents: Iterable[Document], count: int, tokens: int = 256) -> list[float]:
    """Nats a token of the first `tokens` tokens of `count` documents, behind <bos>: what plain continuation costs."""
    start = plain(model.tokenizer, "").ids
    chosen = islice(sorted(documents, key=lambda doc: Draw("left to right", doc.name).uniform()), count)
    texts = [model.tokenizer.encode(document.text[: 8 * tokens])[:tokens] for document in chosen]
    return [
        -sum(score.logprobs) / len(score.logprobs) for score in model.score([(start, ids) for ids in texts])
    ]


def answers(model: Model, found: Sequence[Hole], layout: Layout) -> list[dict[str, Any]]:
    """What `complete` and `likelihood` say of each hole; the prompts of a part are read once for both."""
    parts = [found[at : at + TOGETHER] for at in range(0, len(found), TOGETHER)]
    return [
        a | b
        for part in parts
        for a, b in zip(complete(model, part, layout), likelihood(model, part, layout), strict=True)
    ]


def measure(model: Model, found: Sequence[Hole], layouts: Sequence[Layout] = LAYOUTS) -> dict[str, Any]:
    """All of it by layout and kind, as means with their 95 % intervals, and each hole's own figures for comparisons."""
    alone = likelihood(model, found, "prefix")
    report: dict[str, Any] = {"holes": len(found), "prefix_logp": [each["logp"] for each in alone]}
    for layout in layouts:
        each = answers(model, found, layout)
        for one, other in zip(each, alone, strict=True):
            one["gain"] = one["logp"] - other["logp"]
        kinds = {"all": each} | {
            kind: [one for one, hole in zip(each, found, strict=True) if hole.kind == kind] for kind in KINDS
        }
        report[layout] = {
            kind: {
                name: _mean([float(one[name]) for one in group])
                for name in ("exact", "similarity", "stopped", "ended", "gain")
            }
            for kind, group in kinds.items()
            if group
        } | {"each": each}
    return report


def _mean(values: list[float]) -> dict[str, float]:
    low, high = interval(values)
    return {"mean": sum(values) / len(values), "low": low, "high": high}
