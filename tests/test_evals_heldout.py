"""The measures of held-out completions, on a model whose answers are known."""

from __future__ import annotations

from dataclasses import replace

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
    f"def f{i}(a, b):\n    if a > b:\n        return a\n    total = a + {i}\n    return total * 2\n\n\n"
    for i in range(150)
)
DOCUMENTS = [Document(f"r{i}", f"p{i}.py", TEXT.replace("total", f"sum{i}"), "python") for i in range(24)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_sentencepiece(small())


class Oracle:
    """Completes a hole of one line exactly, and any other without end. Each token has a log-probability of -2
    without the suffix and of -1 with it.
    """

    def __init__(self, tokenizer, holes):
        self.name, self.tokenizer = "oracle", tokenizer
        self.middles = {(hole.prefix, hole.suffix): hole.middle for hole in holes}

    def sample(self, prompts, decoding):
        for i in reversed(range(len(prompts))):
            parts = parse_fim(self.tokenizer, prompts[i])
            middle = self.middles[parts.prefix, parts.suffix]
            endless = output_of(middle + "x" * len(middle), "length")
            yield i, 0, endless if "\n" in middle else output_of(middle)

    def score(self, pairs):
        suffix, end = self.tokenizer.control.fim_suffix, self.tokenizer.control.file_separator
        return [
            Score([-1.0 if suffix in context else -2.0] * len(rest), rest != [end] or context[-1] % 2 == 0)
            for context, rest in pairs
        ]


def test_holes_are_of_every_kind_and_always_the_same(tokenizer):
    holes = heldout.holes(DOCUMENTS, tokenizer, 30)
    assert holes == heldout.holes(DOCUMENTS[::-1], tokenizer, 30)
    assert holes != heldout.holes(DOCUMENTS, tokenizer, 30, seed=1)
    assert [sum(hole.kind == kind for hole in holes) for kind in heldout.KINDS] == [10, 10, 10]
    assert any(hole.path for hole in holes) and any(hole.path is None for hole in holes)
    for hole in holes:
        window = hole.prefix + hole.middle + hole.suffix
        assert any(window in document.text for document in DOCUMENTS) and hole.middle.strip()
        assert (hole.kind == "multi-line") <= ("\n" in hole.middle)
        assert len(fim(tokenizer, hole.prefix, hole.suffix, hole.path).ids) < 384


def test_means_are_those_of_the_answers(tokenizer):
    holes = heldout.holes(DOCUMENTS, tokenizer, 30)
    report = heldout.measure(Oracle(tokenizer, holes), holes)
    for layout in ("psm", "spm"):
        means = {name: row["mean"] for name, row in report[layout]["all"].items()}
        exact = sum("\n" not in hole.middle for hole in holes)
        assert means["exact"] == means["stopped"] == exact / 30
        similarity = [
            2 / 3 if "\n" in hole.middle else 1 for hole in holes
        ]  # 2 * n / (n + 2n) characters match
        assert means["similarity"] == pytest.approx(sum(similarity) / 30)
        tokens = [len(tokenizer.encode(hole.middle)) for hole in holes]
        assert means["gain"] == sum(tokens) / 30
        ended = sum(tokenizer.encode(hole.middle)[-1] % 2 == 0 for hole in holes)
        assert means["ended"] == ended / 30
        single = report[layout]["single-line"]["exact"]
        assert single["low"] < single["mean"] <= single["high"]


def test_holes_inside_words_arguments_and_strings(tokenizer):
    text = TEXT.replace("return a\n", "return max(a, b, key='the larger one')\n")
    documents = [replace(each, text=text.replace("max", f"max{i}")) for i, each in enumerate(DOCUMENTS)]
    holes = heldout.holes(documents, tokenizer, 30, kinds=heldout.EDITOR_KINDS)
    assert [sum(hole.kind == kind for hole in holes) for kind in heldout.EDITOR_KINDS] == [10, 10, 10]
    for hole in holes:
        around = hole.prefix[-1:] + hole.middle
        assert {
            "word": around.isidentifier() or around.isalnum(),
            "argument": hole.suffix[:1] in ",)" and "\n" not in hole.middle,
            "string": "'" in hole.suffix.split("\n")[0] and "\n" not in hole.middle,
        }[hole.kind], hole
    report = heldout.measure(Oracle(tokenizer, holes), holes)
    assert report["psm"]["word"]["exact"]["mean"] == report["spm"]["python"]["exact"]["mean"] == 1


def test_what_the_prefix_alone_gives_is_cut_at_the_true_length(tokenizer):
    holes = heldout.holes(DOCUMENTS, tokenizer, 30)

    class Model:
        """Goes on as the file does, without end; past a hole of several lines with something else."""

        def __init__(self):
            self.tokenizer = tokenizer

        def sample(self, prompts, decoding):
            for i, hole in enumerate(holes):
                assert not parse_fim(tokenizer, prompts[i]).suffix
                yield i, 0, output_of("\0" * ("\n" in hole.middle) + hole.middle + hole.suffix, "length")

    answers = heldout.left_to_right_cut(Model(), holes)
    assert [answer["exact"] for answer in answers] == ["\n" not in hole.middle for hole in holes]
    assert all(len(answer["text"]) == len(hole.middle) for answer, hole in zip(answers, holes, strict=True))


def test_left_to_right_scores_each_token_after_bos_once(tokenizer):
    scored = []

    class Model:
        def __init__(self):
            self.tokenizer = tokenizer

        def score(self, pairs):
            scored.extend(pairs)
            return [Score([-float(i) for i in range(len(ids))], False) for _, ids in pairs]

    assert heldout.left_to_right(Model(), DOCUMENTS, 2, tokens=5) == [2.0, 2.0]
    assert [context for context, _ in scored] == [[tokenizer.control.bos]] * 2
    starts = [tokenizer.encode(document.text)[:5] for document in DOCUMENTS]
    assert all(ids in starts for _, ids in scored)
