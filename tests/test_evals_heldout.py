"""Held-out completions judged on a model whose answers are known."""

from __future__ import annotations

import pytest

pytest.importorskip("tree_sitter")

from evaldata import output_of
from vocabularies import small

from codegemma.data.documents import Document
from codegemma.evals import heldout
from codegemma.evals.task import Score
from codegemma.prompts import fim, parse_fim
from codegemma.tokenizer import Tokenizer

TEXT = "".join(
    f"def f{at}(a, b):\n    if a > b:\n        return a\n    total = a + {at}\n    return total * 2\n\n\n"
    for at in range(150)
)
DOCUMENTS = [Document(f"r{at}", f"p{at}.py", TEXT.replace("total", f"sum{at}"), "python") for at in range(24)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_sentencepiece(small())


class Oracle:
    """Right where the hole is on one line, else never ending; -2 nats a token without the suffix, -1 with
    it."""

    def __init__(self, tokenizer, holes):
        self.name, self.tokenizer = "oracle", tokenizer
        self.middles = {(hole.prefix, hole.suffix): hole.middle for hole in holes}

    def sample(self, prompts, decoding):
        for i in reversed(range(len(prompts))):
            parts = parse_fim(self.tokenizer, prompts[i])
            middle = self.middles[parts.prefix, parts.suffix]
            yield (
                i,
                0,
                output_of(middle) if "\n" not in middle else output_of(middle + "x" * len(middle), "length"),
            )

    def score(self, pairs):
        suffix, end = self.tokenizer.control.fim_suffix, self.tokenizer.control.file_separator
        return [
            Score([-1.0 if suffix in context else -2.0] * len(rest), rest != [end] or context[-1] % 2 == 0)
            for context, rest in pairs
        ]


def test_holes_are_of_every_kind_and_always_the_same(tokenizer):
    found = heldout.holes(DOCUMENTS, tokenizer, 30)
    assert (
        found
        == heldout.holes(DOCUMENTS[::-1], tokenizer, 30)
        != heldout.holes(DOCUMENTS, tokenizer, 30, seed=1)
    )
    assert [sum(hole.kind == kind for hole in found) for kind in heldout.KINDS] == [10, 10, 10]
    texts = {document.path: document.text for document in DOCUMENTS}
    assert any(hole.path for hole in found) and any(hole.path is None for hole in found)
    for hole in found:
        assert (
            any(hole.prefix + hole.middle + hole.suffix in text for text in texts.values())
            and hole.middle.strip()
        )
        assert (hole.kind == "multi-line") <= ("\n" in hole.middle)
        assert len(fim(tokenizer, hole.prefix, hole.suffix, hole.path).ids) < 384


def test_figures_are_those_of_the_answers(tokenizer):
    found = heldout.holes(DOCUMENTS, tokenizer, 30)
    report = heldout.measure(Oracle(tokenizer, found), found)
    for layout in ("psm", "spm"):
        right = sum("\n" not in hole.middle for hole in found)
        assert (
            report[layout]["all"]["exact"]["mean"] == report[layout]["all"]["stopped"]["mean"] == right / 30
        )
        wrong = [2 / 3 if "\n" in hole.middle else 1 for hole in found]  # 2 * n / (n + 2n) characters match
        assert report[layout]["all"]["similarity"]["mean"] == pytest.approx(sum(wrong) / 30)
        tokens = [len(tokenizer.encode(hole.middle)) for hole in found]
        assert report[layout]["all"]["gain"]["mean"] == sum(tokens) / 30
        ended = sum(tokenizer.encode(hole.middle)[-1] % 2 == 0 for hole in found)
        assert report[layout]["all"]["ended"]["mean"] == ended / 30
        single = report[layout]["single-line"]["exact"]
        assert single["low"] < single["mean"] <= single["high"]


def test_left_to_right_scores_everything_behind_bos_once(tokenizer):
    seen = []

    class Plain:
        def __init__(self):
            self.tokenizer = tokenizer

        def score(self, pairs):
            seen.extend(pairs)
            return [Score([-float(i) for i in range(len(rest))], False) for _, rest in pairs]

    assert heldout.left_to_right(Plain(), DOCUMENTS, 2, tokens=5) == [2.0, 2.0]
    assert [context for context, _ in seen] == [[tokenizer.control.bos]] * 2
    assert {tuple(rest) for _, rest in seen} <= {
        tuple(tokenizer.encode(document.text)[:5]) for document in DOCUMENTS
    }
