"""From an Infill to its prompt, and from the answer to the suggestion: `cut`, the window, the time budget."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import TINY_TOKENIZER, Scripted, native

from codegemma import prompts
from codegemma.generate.completion import cut, trimmed
from codegemma.generate.engine import Completion, Engine
from codegemma.generate.request import Infill, Request
from codegemma.generate.resolve import PromptBudget, infill_ids, layout_for, resolve, window
from codegemma.generate.running import Step
from codegemma.generate.sampling import Sampling
from codegemma.native import Cancel
from codegemma.prompts import File


def complete(engine, request, cancel=None):
    """The trimmed answer of a model that was not trained to fill in the middle, as Model.run gives it."""
    resolved = resolve(engine, request, ())
    return trimmed(engine.generate(resolved, cancel), request, resolved.layout)


def infill_prompt(engine, infill, layout, max_tokens, max_uncached=10**9):
    return infill_ids(engine, infill, layout, PromptBudget(max_tokens, max_uncached))[0]


def trimmed_text(text, prefix="", suffix="", trim="block"):
    return cut(text, Infill(prefix, suffix, trim=trim))[0]


# ---------------------------------------------------------------------------------------- trimming
@pytest.mark.parametrize(
    "prefix, text, suffix, expected",
    [
        # the rest of the cursor's line, and no more
        ("x = ", "1\ny = 2\n", "", "1"),
        ("x = foo(", "a)\nbar()\n", ")\n", "a"),
        ("def f():\n", "    return 1\n\ndef g():\n", "", "    return 1"),
        ("x = 1\n", "\ny = 2\nz = 3\n", "", "\ny = 2"),  # an empty line is no line
        ("", "a\nb\n", "c\n", "a\n"),  # a newline, since the suffix is the next line
        ("foo(", "a, b\nc", "d)\n", "a, b"),  # no newline, since the suffix continues the line
        ("    ", "a\n", "", "a"),
        ("", "", "", ""),
        ("x", "\n\n", "", ""),
    ],
)
def test_line(prefix, text, suffix, expected):
    assert trimmed_text(text, prefix, suffix, "line") == expected


@pytest.mark.parametrize(
    "prefix, text, suffix, expected",
    [
        # Python: ends where the indentation falls behind the cursor's line
        ("def f(x):\n", "    y = x\n    return y\n\n\ndef g():\n    pass\n", "", "    y = x\n    return y"),
        ("def f(x):", "\n    return x\n\nprint(f(1))\n", "", "\n    return x"),
        ("    if x:\n        ", "a()\n        b()\n    else:\n        c()\n", "", "a()\n        b()"),
        (
            "    if x:",
            "\n        a()\n    else:\n        b()\n    c()\n",
            "",
            "\n        a()\n    else:\n        b()",
        ),
        (
            "    x = 1\n    ",
            "y = 2\n\n    z = 3\n    return z\n\ndef g",
            "",
            "y = 2\n\n    z = 3\n    return z",
        ),
        (
            "def f(x):\n    ",
            "for y in x:\n        g(y)\n    return y\n\ndef g",
            "",
            "for y in x:\n        g(y)\n    return y",
        ),
        ("def ", "f(x):\n    return x\n\ndef g(x):\n", "", "f(x):\n    return x"),
        ("import os\n", "import sys\nimport re\n\ndef f():\n", "", "import sys\nimport re"),
        # brackets: the block's own closing line belongs to it
        ("int f() {", "\n  return 1;\n}\nint g() {\n", "", "\n  return 1;\n}"),
        ("x = [", "\n  1,\n  2,\n]\ny = 2\n", "", "\n  1,\n  2,\n]"),
        # what the suffix has already
        ("int f() {\n", "  return 1;\n}\n", "}\n", "  return 1;\n"),
        ("f() {\n", "  if (x) {\n    y\n  }\n  z\n}\n", "}\n\ng() {\n", "  if (x) {\n    y\n  }\n  z\n"),
        ("f() {\n  if (x) {\n", "    y\n  }\n  z\n}\n\ng() {", "  }\n  z\n}\n", "    y\n"),
        ("def f():\n    a = 1\n", "    b = 2\n    return a + b\n", "    return a + b\n", "    b = 2\n"),
        ("def f():\n    a = 1\n    ", "b = 2\n    return a + b\n    more", "\n    return a + b\n", "b = 2"),
        ("a = 1\n", "return a\nmore\n", "return a\n", ""),  # nothing is missing
        ("print(", '"hello")\nprint("world")\n', ")\n", '"hello"'),
        ("foo(", "a, b)", ")", "a, b"),
        ("foo(", "bar(a))", ")", "bar(a)"),
        ("foo(", "bar(a)", ")", "bar(a)"),
        ("foo(bar(\n    ", "a)", ")\n", "a)"),  # both brackets are needed: they opened above
        ("foo(  # :)\n    ", "a)", ")\n", "a"),
        ("x = [", "1, 2]", "]\n", "1, 2"),
        ("x = {", '"a": {}}', "}", '"a": {}'),
        ('s = "', 'abc"', '"\n', "abc"),
        ("foo(", "a);", ");\n", "a"),
        ("x = ", "1;", ";\n", "1"),
        ("x = y", "[0]", "[1]", "[0]"),
        ("def f(a, ", "b, c):\n    return a\n", "c):\n    return b\n", "b, "),
        ("", "", "return 1\n", ""),
        ("x", "", "", ""),
        ("a\r\n", "b\r\nc\r\n", "c\r\n", "b\r\n"),
        ("x = '", "\x0c\u2028a'\nb", "'\n", "\x0c\u2028a"),  # no line ends there
    ],
)
def test_block(prefix, text, suffix, expected):
    assert trimmed_text(text, prefix, suffix, "block") == expected


def test_none_drops_only_what_repeats():
    assert trimmed_text("a\n\n\nb\n", "", "", "none") == "a\n\n\nb\n"
    assert trimmed_text("a\nreturn 1\nb\n", "", "return 1\n", "none") == "a\n"


PARTS = st.sampled_from(
    ["a", "foo", "return x", "\n", "\n\n", "    ", "}", ")", "{", "(", "\r\n", '"', ";", "if x:", "é", "  b"]
    + ["end", "\nend", "\n  end\n", "if a\n", "\n  if b\n", "else", "<a>", "</a>", "/*", "*/"]
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@settings(deadline=None, max_examples=400)
@given(TEXTS, TEXTS, TEXTS, st.sampled_from(["auto", "none", "line", "block"]), st.data())
def test_the_trimmed_text_does_not_depend_on_the_tokens(text, prefix, suffix, trim, data):
    """However the answer is split into Steps, their texts are what `cut` keeps of the whole answer."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    steps = [Step(7, piece, 0.0) for piece in pieces] + [Step(1, "", 0.0, "end")]
    request = Request(Infill(prefix, suffix, trim=trim))
    shown = list(trimmed(Completion(iter(steps), None), request, "prefix"))
    assert "".join(step.text for step in shown) == trimmed_text(text, prefix, suffix, trim)
    assert [step.stop for step in shown[:-1]] == [None] * (len(shown) - 1) and shown[-1].stop == "end"


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.sampled_from(["auto", "none", "line", "block"]))
def test_a_suggestion_is_the_start_of_the_answer(text, prefix, suffix, trim):
    text, result = (t.replace("\r\n", "\n") for t in (text, trimmed_text(text, prefix, suffix, trim)))
    assert text.startswith(result) or text.startswith(result[:-1]) and result.endswith("\n")


def test_a_finished_suggestion_stops_the_work():
    answer = "a = 1\n" + "b = 2\n" * 50
    script = [2, *TINY_TOKENIZER.encode("x\n"), *TINY_TOKENIZER.encode(answer)]
    engine = Engine(Scripted(script), TINY_TOKENIZER)
    steps = list(complete(engine, Request(Infill("x\n", "z\n", trim="line"), 300, speculate=False)))
    assert "".join(step.text for step in steps) == "a = 1\n" and steps[-1].stop == "end"
    assert len(steps) == len(TINY_TOKENIZER.encode("a = 1\n"))


# ---------------------------------------------------------------------------------------- prompts and windows
CODE = "".join(f"def name_{i}(x):\n    return x + {i}\n\n" for i in range(400))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(CODE)), st.sampled_from([1, 2, 16, 100, 257, 1000, 3000]))
def test_windows_fit_and_are_fresh_encodings_nearest_to_the_cursor(cursor, size):
    parts = prompts.encode_parts(
        TINY_TOKENIZER, CODE[:cursor], CODE[cursor:], None, [File("a.py", "A" * 50), File("b.py", "B" * 30)]
    )
    shortened = window(TINY_TOKENIZER, parts, size)
    prefix, suffix = TINY_TOKENIZER.decode(shortened.prefix), TINY_TOKENIZER.decode(shortened.suffix)
    assert CODE[:cursor].endswith(prefix) and CODE[cursor:].startswith(suffix)
    assert (
        TINY_TOKENIZER.encode(prefix) == shortened.prefix
        and TINY_TOKENIZER.encode(suffix) == shortened.suffix
    )
    used = len(shortened.prefix) + len(shortened.suffix)
    assert used + sum(map(len, shortened.context)) <= size
    assert shortened.context in ((), parts.context[1:], parts.context)  # the last is the nearest
    assert used >= min(size, len(parts.prefix) + len(parts.suffix)) / 2 or size < 64
    assert len(shortened.prefix) >= min(len(parts.prefix), size * 3 // 8) or size < 64


def test_all_is_kept_where_it_fits():
    parts = prompts.encode_parts(TINY_TOKENIZER, "a" * 10, "b" * 300, None, [File("c.py", "c" * 20)])
    total = len(parts.prefix) + len(parts.suffix) + len(parts.context[0])
    assert window(TINY_TOKENIZER, parts, total) == parts
    assert window(TINY_TOKENIZER, parts, total - 1) == prompts.Parts(parts.prefix, parts.suffix, parts.path)


@pytest.mark.parametrize(
    "prefix, suffix",
    [
        ("", ""),
        ("x = ", ""),
        ("", "y\n"),
        ("a\r\nb", "\r\nc\r\n"),
        ("😀é\t", "漢\u2028"),
        ("x" * 20_000, "y" * 20_000),
        ("<|fim_prefix|>", "<eos>"),
    ],
)
@pytest.mark.parametrize("layout", ["psm", "spm", "prefix"])
def test_any_text_makes_a_prompt_that_fits(prefix, suffix, layout):
    engine = Engine(Scripted([2, 1], context=400), TINY_TOKENIZER)
    ids = infill_prompt(engine, Infill(prefix, suffix, "dir/file.py"), layout, 300)
    assert ids[0] == 2 and ids.count(2) == 1 and len(ids) <= 300
    parsed = prompts.parse_fim(TINY_TOKENIZER, ids)
    assert parsed.layout == layout
    if len(prefix) < 1000:
        path = "dir/file.py\n" if layout == "prefix" else ""
        assert (parsed.prefix, parsed.suffix) == (path + prefix, suffix if layout != "prefix" else "")
    list(complete(engine, Request(Infill(prefix, suffix, mode=layout), max_tokens=3)))


@pytest.mark.parametrize("layout", ["psm", "spm", "prefix"])
@pytest.mark.parametrize("max_tokens", [100, 300, 8000])
def test_what_a_prompt_leaves_out_is_counted(layout, max_tokens):
    engine = Engine(Scripted([2, 1], context=8192), TINY_TOKENIZER)
    infill = Infill(CODE[:1500], CODE[1500:2500], "a.py", [File("b.py", "y = 2\n")])
    everything, nothing = infill_ids(engine, infill, layout, PromptBudget(10**9, 10**9))
    ids, left_out = infill_ids(engine, infill, layout, PromptBudget(max_tokens, 10**9))
    assert nothing == 0 and left_out == len(everything) - len(ids)
    assert (left_out > 0) == (max_tokens < len(everything))


def typing_trace(layout, max_tokens, start, text):
    """Tokens that were not in the cache, for a request after each typed character."""
    engine = Engine(Scripted([2, 1], context=8192), TINY_TOKENIZER)
    fresh = []
    for end in range(1, len(text) + 1):
        ids = infill_prompt(engine, Infill(CODE[:start] + text[:end], CODE[start:]), layout, max_tokens)
        steps = engine.generate(Request(ids, 1))
        fresh.append(len(ids) - steps.cached_tokens)
        list(steps)
    return fresh[1:]


TYPED = "\ndef other_name(value):\n    total = value + name_3(value)\n    return total * total\n"


@pytest.mark.parametrize("max_tokens", [8000, 1000, 300])
@pytest.mark.parametrize("start", [0, 500, len(CODE) // 2, len(CODE)])
def test_typing_computes_only_the_last_pieces_in_spm_order(start, max_tokens):
    """The window's edges move in coarse steps, so that few requests read the whole window again."""
    start = CODE.rfind("\n", 0, start) + 1
    fresh = typing_trace("spm", max_tokens, start, TYPED)
    # A typed character changes the last pieces of its line, at most `return`'s, and the sentinel after them.
    assert sorted(fresh)[len(fresh) * 9 // 10] <= 8
    again = [count for count in fresh if count > 16]
    assert len(again) <= 1 + len(TINY_TOKENIZER.encode(TYPED)) // max(16, max_tokens // 8)


def test_psm_order_reads_the_suffix_again():
    """In PSM order each keystroke computes the suffix again, which SPM avoids."""
    start = CODE.rfind("\n", 0, len(CODE) // 2) + 1
    assert min(typing_trace("psm", 1000, start, TYPED[:20])) > 100


def test_a_time_budget_takes_what_is_affordable_and_what_is_cached():
    engine = Engine(Scripted([2, 1], context=8192), TINY_TOKENIZER)
    infill = Infill(CODE[:3000], CODE[3000:6000])
    full = infill_prompt(engine, infill, "spm", 8000)
    sizes = [
        len(infill_prompt(engine, infill, "spm", 8000, max_uncached))
        for max_uncached in (10_000, 1100, 300, 140, 1)
    ]
    assert sizes[0] == len(full) > sizes[1] > sizes[2] > sizes[3] == sizes[4] > 60
    assert sizes[1] <= 1100 and sizes[2] <= 300
    small = infill_prompt(engine, infill, "spm", 8000, 300)
    list(engine.generate(Request(small, 1)))
    assert infill_prompt(engine, infill, "spm", 8000, 20) == small  # now it costs one token
    list(engine.generate(Request(full, 1)))
    assert infill_prompt(engine, infill, "spm", 8000, 20) == full


def test_the_budget_follows_the_measured_speed():
    class Slow(Scripted):
        def run(self, slices, cancel=None):
            time.sleep(sum(len(part.ids) for part in slices) / 5000)
            return super().run(slices, cancel)

    engine = Engine(Slow([2, 1], context=8192), TINY_TOKENIZER)
    infill = Infill(CODE[:6000], CODE[6000:], mode="spm")
    for _ in range(16):
        engine.cache.forget_all()
        steps = complete(engine, Request(infill, max_tokens=1, prompt_seconds=0.2))
        list(steps)
    assert 1000 < engine.prefill_rate < 5000  # a busy machine is slower still
    assert 60 < steps.prompt_tokens <= 1100


def test_context_files_stand_before_the_file():
    engine = Engine(Scripted([2, 1]), TINY_TOKENIZER)
    ids = infill_prompt(engine, Infill("a", "b", "c.py", [File("d.py", "e"), File("f.py", "g")]), "psm", 300)
    assert TINY_TOKENIZER.decode(ids, control=True) == (
        "<bos>d.py\ne<|file_separator|>f.py\ng<|file_separator|>c.py\n"
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    )


# ---------------------------------------------------------------------------------------- the boundary
@pytest.mark.parametrize(
    "mode, fim_orders, layout",
    [
        ("auto", {"psm"}, "psm"),
        ("auto", {"psm", "spm"}, "spm"),
        ("auto", (), "prefix"),
        ("spm", (), "spm"),
        ("prefix", {"psm", "spm"}, "prefix"),
    ],
)
def test_layout_for(mode, fim_orders, layout):
    assert layout_for(mode, fim_orders) == layout


def test_bad_input_is_refused_at_once():
    with pytest.raises(ValueError, match='trim must be "auto", "none", "line" or "block"'):
        Infill("a", trim="word")
    with pytest.raises(ValueError, match="mode must be"):
        Infill("a", mode="mps")
    with pytest.raises(ValueError, match="came without a tokenizer"):
        complete(Engine(Scripted([2, 1])), Request(Infill("a")))


def test_a_completion_can_be_cancelled():
    cancel = Cancel()
    engine = Engine(Scripted([2, *TINY_TOKENIZER.encode("abcdefgh" * 9)]), TINY_TOKENIZER)
    steps = complete(engine, Request(Infill("", "x", trim="block")), cancel)
    next(steps)
    cancel.set()
    assert list(steps)[-1].stop == "cancelled"


def test_a_sentinel_ends_the_answer_without_text():
    engine = Engine(native("gemma-mqa", "Q8_0"), TINY_TOKENIZER)
    for seed in range(3):
        infill = Infill("def f", "return", "a.py", mode="psm")
        steps = complete(engine, Request(infill, 40, Sampling(temperature=3.0, seed=seed))).steps
        text = "".join(step.text for step in steps)
        assert not re.search(r"<\|(fim|file)_", text)
        assert steps[-1].stop in ("end", "length")
