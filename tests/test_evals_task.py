import itertools
import re

import pytest
from evaldata import Letters, output_of
from scipy.stats import binomtest

from codegemma.evals.language import normalise
from codegemma.evals.maths import boxed, gsm8k_answers, judge_gsm8k, judge_math
from codegemma.evals.task import Item, Score, compare, cut, encode_choice, interval, pass_at_k, rank, subset


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 4), (5, 3, 3)]:
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(1, 1, 10)


def test_intervals_are_wilsons():
    for right, n in [(0, 10), (3, 10), (60, 164), (164, 164)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        bounds = interval([1.0] * right + [0.0] * (n - right))
        assert bounds == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_intervals_of_other_values_are_normal():
    low, high = interval([0.25, 0.5, 0.75, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.2041241 / 2, abs=1e-4)


def test_comparison_is_paired():
    before = {str(i): float(i < 10) for i in range(40)}
    after = {str(i): float(2 <= i < 20) for i in range(40)} | {"other": 1.0}
    result = compare(before, after)
    assert (result.items, len(result.gained), result.lost) == (40, 10, ["0", "1"])
    assert result.difference == pytest.approx(8 / 40)
    assert result.p == pytest.approx(binomtest(2, 12).pvalue)
    assert result.low < 0.2 < result.high and compare(before, before).p == 1.0
    with pytest.raises(ValueError, match="share no item"):
        compare(before, {"x": 1.0})


def test_ranking_raw_and_by_length():
    item = Item("x", choices=(("c", " ab"), ("c", " abcdefgh")))
    assert rank(item, [Score([-2.0], False), Score([-2.0, -1.0], False)]) == {"raw": 0, "normalised": 1}


def test_choices_are_encoded_as_one_text():
    context, continuation = encode_choice(Letters(), ("hello", " yes"))
    assert (Letters().decode(context), Letters().decode(continuation)) == ("hello", " yes")
    assert context[0] == Letters.control.bos

    class Merge:
        control, end_ids = Letters.control, Letters.end_ids

        def encode(self, text):  # "ab" is one token, which belongs to the continuation
            return [300 if piece == "ab" else ord(piece) for piece in re.findall("ab|.", text)]

    assert encode_choice(Merge(), ("xa", "b")) == ([256, ord("x")], [300])


def test_subset_is_fixed_and_in_order():
    items = [Item(str(i)) for i in range(100)]
    chosen = [item.id for item in subset(items, 10)]
    assert chosen == sorted(chosen, key=int) == [i.id for i in subset(list(items), 10)] and len(chosen) == 10
    assert set(chosen) <= {i.id for i in subset(items, 20)} and chosen != [str(i) for i in range(10)]
    assert subset(items, None) == subset(items, 1000) == items


def test_cutting_at_the_first_stop():
    assert cut(output_of("a\ndef b\nclass"), ["\nclass", "\ndef"]) == ("a", True)
    assert cut(output_of("abc"), ["\n"]) == ("abc", False)
    assert cut(output_of("abc", "stop"), ["\n"]) == ("abc", True)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("The  Sunset, Boulevard!", "sunset boulevard"), ("U.S.A", "u s"), ("a_b", "b"), ("an apple", "apple")],
)
def test_trivia_normalisation(text, normalised):
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3 + 4 = 7\n#### 7", 7, 7),
        ("it costs $1,234.50.", None, 1234.5),
        ("#### -5 and then 6", -5, 6),
        ("none", None, None),
        ("it is 12.", None, 12),
        ("#### 18\n\nQ: next\nA: 5", 18, 18),
        ("#### 18\n\nThat is it. I have 5 more.", 18, 18),
        ("it is 18\n\nQuestion: 5 what?", None, 18),
        ("pages 16-18", None, 18),
        ("from 2023-05-18 (16 - 18)", None, 18),
        ("5*x - -3", None, -3),
        ("a loss (-5)", None, -5),
        ("a loss of -$5, \u22126", None, -6),
        (".5 of it: .25", None, 0.25),
        ("#### $-5", -5, -5),
        ("#### -$1,234.50", -1234.5, -1234.5),
        ("#### -\\$5", -5, -5),
        ("#### **18**", 18, 18),
        ("####  18", 18, 18),
        ("####18.", 18, 18),
        ("#### \\$18", 18, 18),
        ("#### $\\boxed{18}$", 18, 18),
        ("#### so 18", None, 18),
    ],
)
def test_gsm8k_answers(text, strict, flexible):
    assert gsm8k_answers(text) == {"strict": strict, "flexible": flexible}


def test_gsm8k_verdicts():
    """An item passes by the published rule, strict, whatever the other rule says."""
    items = [Item("x", target="so it is\n#### 1,000")] * 4
    texts = ["... #### 1000\nQuestion: next #### 5", "the answer is 1000", "#### 10", "#### 1000, in 2 parts"]
    verdicts = [verdict for _, verdict in judge_gsm8k(items, list(map(output_of, texts)))]
    assert [verdict.outcome for verdict in verdicts] == ["strict+flexible", "flexible", "wrong", "strict"]
    assert [verdict.passed for verdict in verdicts] == [True, False, False, True]


@pytest.mark.parametrize(
    ("wanted", "answer", "equal"),
    [
        (r"\frac{1}{2}", r"0.5", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(1,2)", "(2,1)", False),
        ("12", "13", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("7", "", False),
    ],
)
def test_math_answers_are_compared_as_mathematics(wanted, answer, equal):
    pytest.importorskip("math_verify")
    item = Item("x", target=rf"We find \boxed{{{wanted}}}.")
    text = rf"Thus \boxed{{{answer}}}." if answer else "I do not know"
    [(_, verdict)] = judge_math([item], [output_of(text)])
    assert verdict.passed is equal


def test_boxed_balances_braces():
    assert boxed(r"\boxed{1} and \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert boxed("none") is None and boxed(r"\boxed{open") is None


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"so $x=\boxed 2$.", "2"),
        (r"$\fbox{2}$", "2"),
        (r"\boxed {2}", "2"),
        (r"$\boxed2$", "2"),
        (r"\boxed 12", "12"),
        (r"it is \boxed 12.", "12"),
        (r"\[\boxed\frac12\] and so on", r"\frac12"),
        (r"\(\boxed x\), which is 5", "x"),
        (r"\fbox{$x^{2}$}", "x^{2}"),
        (r"\boxed{1} or \fbox{2}", "2"),
        ("\\boxed\n{2}", "2"),
        (r"\boxed", None),
        (r"\boxedness{2}", None),
    ],
)
def test_boxes_of_every_form(text, contents):
    assert boxed(text) == contents
