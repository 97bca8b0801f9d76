"""Completion at the cursor: the piece that it cuts, how the answer begins, how much of it is kept."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import TINY_TOKENIZER, Scripted, native
from tiny import tiny_config
from vocabularies import small_tokenizer

from codegemma.generate.completion import cut, is_loop, is_worth_showing
from codegemma.generate.cursor import indentation, typed_piece, with_comments
from codegemma.generate.engine import Batch, Engine
from codegemma.generate.request import Infill, Request
from codegemma.generate.resolve import resolve
from codegemma.generate.sampling import Sampling
from codegemma.prompts import File


def kept(text, prefix, suffix, trim="block", **fields):
    return cut(text, Infill(prefix, suffix, trim=trim, **fields))[0]


# ------------------------------------------------------------------------------------- the suffix's lines
GO = "func f(n int) {\n\tfor i := 0; i < n; i++ {\n\t\t"


@pytest.mark.parametrize("trim", ["auto", "none", "block"])
@pytest.mark.parametrize(
    "prefix, text, suffix",
    [
        # A line that the suffix has too, but in another block.
        ("def f(a, x):\n    ", "if not a:\n        return x\n    x = a + 1", "\n    return x\n"),
        ("f(a) {\n  ", "if (a)\n    return x;\n  g();", "\n  return x;\n}\n"),
        # A block that the answer opens and closes inside the suffix's.
        ("void f(int n) {\n\tif (n) {\n\t\tfor (;;) {\n\t\t\t", "g();\n\t\t}\n\t\tuse(n);", "\n\t}\n}\n"),
        ("int f(int n) {\n    int c = 0;\n    ", "for (;;) {\n        c++;\n    }\n    return c;", "\n}\n"),
        (GO, "if i > 1 {\n\t\t\tg(i)\n\t\t}\n\t\th(i)", "\n\t}\n}\n"),
        ("def f\n  ", "if a\n    b\n  end\n  c", "\nend\n"),
        ("function f()\n  ", "while a do\n    b()\n  end\n  c()", "\nend\n"),
        # Two blocks that begin in the same column: the suffix closes one of them.
        ("void f() {\nif (a) {\n", "b();\n}\nc();\n", "}\n"),
    ],
)
def test_lines_that_the_answer_needs_stay(prefix, text, suffix, trim):
    assert kept(text, prefix, suffix, trim).rstrip() == text.rstrip()


@pytest.mark.parametrize("trim", ["auto", "none", "block"])
@pytest.mark.parametrize(
    "prefix, text, suffix, expected",
    [
        ("def f(x):\n", "    y = 1\n    return x\n", "    return x\n", "    y = 1\n"),
        ("int f(int a) {\n\t", "return a;\n}", "\n}\n", "return a;"),
        ("def f\n  ", "b\nend\n\ndef g\n", "\nend\n\ndef h\n", "b"),
        ("if a; then\n  ", "b\nfi\nc", "\nfi\nd\n", "b"),
        ("f(\n    a,\n    ", "b,\n)\ng()", ")\ng()\n", "b,\n"),
        ("{\n  ", '"a": 1\n}', "\n}\n", '"a": 1'),
    ],
)
def test_lines_that_the_suffix_has_go(prefix, text, suffix, expected, trim):
    assert kept(text, prefix, suffix, trim) == expected


@pytest.mark.parametrize("trim", ["auto", "block"])
@pytest.mark.parametrize(
    "prefix, text, suffix, expected",
    [
        ("def f():\n    ", "x = 1\n", "\n", "x = 1"),
        ("a = 1\n", "b = 2\n\n", "\nc = 3\n", "b = 2"),
        ("x = ", "1\n", "\n", "1"),
        ("x = ", "1\n", "", "1\n"),
    ],
)
def test_the_suffix_ends_the_last_line(prefix, text, suffix, expected, trim):
    assert kept(text, prefix, suffix, trim) == expected


@pytest.mark.parametrize("path", [None, "a.txt"])
@pytest.mark.parametrize(
    "prefix, text, suffix",
    [
        ("class A\n  def abs(x)\n    if x < 0\n      ", "-x\n    end", "\n    x\n  end\nend\n"),
        ("def a\n  xs.each do |x|\n    ", "puts x\n  end", "\nend\n"),
        ("def a\n  y = if x\n    1\n  else\n    ", "2\n  end", "\nend\n"),
        ("function f(a)\n  if a then\n    ", "return 1\n  end", "\n  return 2\nend\n"),
        ("f(function(a)\n  g(function(b)\n    ", "h()\n  end)", "\nend)\n"),
        ("for f in *; do\n  if [ -f $f ]; then\n    ", "echo $f\n  fi", "\ndone\n"),
        ("if a; then\n  case $1 in\n  b)\n    ", "c\n    ;;\n  esac", "\nfi\n"),
        ("BEGIN\n  IF x THEN\n    ", "y := 1;\n  END IF;", "\nEND;\n"),
        ("defmodule A do\n  def f(x) do\n    ", "x + 1\n  end", "\nend\n"),
        ("function f(x)\n    for i in x\n        ", "println(i)\n    end", "\nend\n"),
        ("do i = 1, n\n  if (x) then\n    ", "y = 1\n  end if", "\nend do\n"),
        ("Sub A\n  While b\n    ", "c\n  End While", "\nEnd Sub\n"),
        ("if(X)\n  foreach(a b)\n    ", "message(a)\n  endforeach()", "\nendif()\n"),
        ("<div>\n  <ul>\n    ", "<li>a</li>\n  </ul>", "\n</div>\n"),
        ("{% if a %}\n  {% for b in c %}\n    ", "b\n  {% endfor %}", "\n{% endif %}\n"),
        # The suffix's first line stands at the cursor: it closes one of the two blocks, or of the three.
        ("def a\n  if b\n    ", "c\n  end\n", "end\n"),
        ("class A\n  def a\n    if b\n      ", "c\n    end\n", "end\n\n  def d\n    e\n  end\nend\n"),
        ("f(() => {\n  g(() => {\n    ", "x();\n  });\n", "});\n"),
        ("void f() {\n  if (b) {\n    ", "x();\n  }\n", "}\n"),
    ],
)
def test_words_close_blocks_as_brackets_do(prefix, text, suffix, path):
    assert kept(text + "\n", prefix, suffix, path=path).rstrip() == text.rstrip()


@pytest.mark.parametrize(
    "prefix, text, suffix, expected",
    [
        ("def a\n  if b\n    ", "c\n  end\n", "\n  end\nend\n", "c"),
        ("def a\n  if b\n    ", "c\n  end\n", "\n    d\n  end\nend\n", "c"),
        ("def a\n  if b\n    ", "c\n  end\n", "\n  else\n    d\n  end\nend\n", "c"),
        ("def a\n  if b\n    ", "c\n  end\n", "end\nend\n", "c\n"),
        ("class A\n  def a\n    ", "c\n  end\n", "end\n\n  def d\n    e\n  end\nend\n", "c\n"),
        ("for f in *; do\n  ", "a\ndone\n", "\ndone\n", "a"),
        ("if a; then\n  b\nfi\nif c; then\n  ", "d\nfi\n", "\nfi\n", "d"),
        ("BEGIN\n  IF x THEN\n    ", "y;\n  END IF;\n", "\n  END IF;\nEND;\n", "y;"),
        ("<ul>\n  ", "<li>\n</ul>\n", "\n</ul>\n", "<li>"),
        ("f(() => {\n  ", "x();\n});\n", "});\n", "x();\n"),
        ("f(() => {\n  ", "x();\n});\n", "\n});\n", "x();"),
    ],
)
def test_a_block_is_closed_by_one_word(prefix, text, suffix, expected):
    assert kept(text, prefix, suffix) == expected


@pytest.mark.parametrize(
    "language, prefix, text, suffix",
    [
        ("javascript", "f(() => {\n  g(() => {\n    ", "x();\n  });\n", "});\n"),
        ("c", "void f() {\n  if (b) {\n    ", "x();\n  }\n", "}\n"),
        ("c", "int f() {\n  for (;;) {\n    ", "x();\n  }\n", "}\n\nint g() { return 1; }\n"),
    ],
)
def test_a_grammar_tells_which_block_a_moved_bracket_closes(language, prefix, text, suffix):
    pytest.importorskip(f"tree_sitter_{language}")
    assert kept(text, prefix, suffix, language=language) == text
    one_block = prefix[: prefix.index("\n") + 3]
    assert kept(text.replace("\n  ", "\n"), one_block, suffix, language=language) == "x();\n"


@pytest.mark.parametrize(
    "text",
    ["/* ", "''' ", '""" ', "\\`", '\\"', "'\n/*", "{\n", "if a\n", "<a ", "do |", "end (", "function f("],
)
def test_literals_and_blocks_without_an_end_cost_no_time(text):
    prefix = text * (300_000 // len(text)) + "\nint f() {\n  if (n) {\n    for (;;) {\n      "
    start = time.perf_counter()
    assert kept("g();\n    }\n    }\n", prefix, "\n  }\n}\n" + text * 9999, path="a.zig").startswith("g();")
    kept("g()\n    end\n", prefix, "\n  end\n" + text * 9999)
    assert time.perf_counter() - start < 3


def test_a_syntax_tree_decides_where_columns_do_not():
    """Brackets in a regular expression mislead a count, not a grammar."""
    pytest.importorskip("tree_sitter_javascript")
    prefix, text, suffix = "function f(s) {\nif (s.match(/[{]/)) {\n", "g();\n}\nh();\n", "}\n"
    assert kept(text, prefix, suffix, language="javascript") == text
    one_block = "function f(s) {\n  return s.split(/[{]/);\n"
    assert kept("}\n", one_block, "}\n", language="javascript") == ""


@pytest.mark.parametrize(
    "prefix, suffix, answer, expected",
    [
        ("np.z", "s(3)", "ero", "ero"),
        ("np.z", "s(3)", "eros(3)", "ero"),
        ("x = re", "turn y", "", ""),
        ("x.app", "end(3)\n", "le, x.b", ""),  # would write `x.apple, x.bend(3)`
        ("x.app", "end(3)\n", "end(4)\ny", ""),
    ],
)
def test_an_answer_inside_a_word_is_the_rest_of_that_word(prefix, suffix, answer, expected):
    for trim in ("auto", "line", "block", "none"):
        assert kept(answer, prefix, suffix, trim) == expected


@pytest.mark.parametrize(
    "text, prefix, suffix, trim, expected",
    [
        ("x = 1\r\ny = 2\r\n", "a = 0\r\n", "z = 3\r\n", "line", "x = 1\r\n"),
        ("x = 1\ny = 2\n", "a = 0\r\n", "z = 3\r\n", "block", "x = 1\r\ny = 2\r\n"),
        ("x = 1\ny = 2\n", "a = 0\n", "z = 3\n", "block", "x = 1\ny = 2\n"),
        ("    y\n    return x\n", "def f(x):\r\n", "    return x\r\n", "block", "    y\r\n"),
    ],
)
def test_lines_end_as_the_files_do(text, prefix, suffix, trim, expected):
    assert kept(text, prefix, suffix, trim) == expected


@settings(deadline=None, max_examples=40)
@given(st.text("ab \n\r", max_size=12), st.text("ab \n\r", max_size=12))
def test_line_ends_do_not_change_the_prompt(prefix, suffix):
    unix = Infill(prefix.replace("\r", ""), suffix.replace("\r", ""))
    dos = Infill(unix.prefix.replace("\n", "\r\n"), unix.suffix.replace("\n", "\r\n"))
    engine = Engine(native("gemma-mqa", "Q8_0"), TINY_TOKENIZER)
    prompts = [resolve(engine, Request(infill), {"spm"}) for infill in (unix, dos)]
    assert prompts[0].prompt == prompts[1].prompt and prompts[0].begin == prompts[1].begin


# ------------------------------------------------------------------------------------- the piece before it
@pytest.mark.parametrize(
    "prefix, typed",
    [
        ("def f():\n    retu", "retu"),
        ("x = retu", " retu"),
        ("np.zer", "zer"),
        ("x = [1, 2", " 2"),
        ("print('Hel", "Hel"),
        ("x = ", ""),
        ("f(", ""),
        ("", ""),
        ("a\n", ""),
        ("a:\n           ", "           "),
        ("a:\n\t\t", "\t\t"),
        ("hash = '" + "0123456789abcdef" * 8, ""),  # data, not a word
        ("x = größ", " größ"),
    ],
)
def test_typed_piece(prefix, typed):
    tokenizer = small_tokenizer()
    infill, piece = typed_piece(tokenizer, Infill(prefix, "\n"))
    assert infill.prefix + piece == prefix
    assert piece.strip() == typed.strip() if typed.strip() else piece == typed


@settings(deadline=None)
@given(st.text(max_size=30))
def test_the_typed_piece_is_whole_characters(prefix):
    tokenizer = small_tokenizer()
    infill, piece = typed_piece(tokenizer, Infill(prefix))
    assert infill.prefix + piece == prefix and "\n" not in piece


@pytest.mark.parametrize(
    "typed, step, expected", [(0, 4, 0), (1, 4, 4), (4, 4, 4), (11, 4, 12), (13, 4, 16), (3, 2, 4)]
)
def test_indentation_is_a_whole_number_of_steps(typed, step, expected):
    file = "".join(f"{' ' * step * depth}a\n" for depth in (1, 2, 3, 1, 2))
    assert indentation(" " * typed, Infill(file)) == " " * expected


def test_indentation_without_a_step_stays():
    assert indentation("   ", Infill("a\n")) == "   " and indentation("\t ", Infill("\ta\n")) == "\t "


# ------------------------------------------------------------------------------------- how answers begin
@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=1, max_size=4))
def test_agreeing_tokens_are_those_that_a_scan_finds(data):
    tokenizer = small_tokenizer()
    spelled = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    expected = [
        i for i, text in enumerate(spelled) if text and (text.startswith(data) or data.startswith(text))
    ]
    assert sorted(tokenizer.ids_compatible_with(data)) == expected


def texts(engine, requests, together):
    """The text of each request's answer, with what it had to begin with."""
    if not together:
        return ["".join(step.text for step in engine.generate(request)) for request in requests]
    batch = Batch(engine)
    running = [batch.add(request) for request in requests]
    answers = {id(one): "" for one in running}
    while any(one.stop is None for one in running):
        for one, step in batch.step():
            answers[id(one)] += step.text
    return [answers[id(one)] for one in running]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, seed=3), Sampling(1.0, top_k=5, seed=1)]
)
def test_an_answer_begins_as_it_has_to(sampling):
    """Alone, together with others, and with speculation the same; the typed characters are left out."""
    engine = Engine(native("gemma-mqa", "Q8_0"), TINY_TOKENIZER)
    prompts = [[2, *TINY_TOKENIZER.encode(text)] for text in ("x = ", "def f", "return")]
    requests = [Request(ids, 12, sampling, begin="ret", typed=2) for ids in prompts]
    alone = texts(engine, requests, together=False)
    assert all(text.startswith("t") for text in alone)
    whole = texts(engine, [Request(ids, 12, sampling, begin="ret") for ids in prompts], together=False)
    assert [text[2:] for text in whole] == alone
    assert texts(engine, requests, together=True) == alone
    plain = [Request(ids, 12, sampling, begin="ret", typed=2, speculate=False) for ids in prompts]
    assert texts(engine, plain, together=False) == alone


def test_confidence_is_of_the_tokens_that_were_allowed():
    engine = Engine(native("gemma-mqa", "Q8_0"), TINY_TOKENIZER)
    ids = [2, *TINY_TOKENIZER.encode("x = ")]
    steps = list(engine.generate(Request(ids, 6)))
    expected = np.exp(np.cumsum([step.logprob for step in steps]) / np.arange(1, len(steps) + 1))
    np.testing.assert_allclose([step.confidence for step in steps], expected, rtol=1e-5)
    token = TINY_TOKENIZER.encode("def")[0]
    only = list(TINY_TOKENIZER.ids_compatible_with(b"def"))
    first = next(engine.generate(Request(ids, 6, begin="def")))
    logits = engine.logits(ids)[-1].astype(float)
    share = np.exp(logits[first.token]) / np.exp(logits[only]).sum()
    assert token in only and first.confidence == pytest.approx(share, rel=1e-4)


# ------------------------------------------------------------------------------------- other files
def test_files_are_comments_for_models_that_never_saw_any():
    infill = Infill("x = 1\n", "", "a.py", [File("b.py", "def g():\n    pass\n\n"), File("c.py", "y = 2")])
    assert with_comments(infill).prefix == "# b.py\n# def g():\n#     pass\n# c.py\n# y = 2\nx = 1\n"
    assert (
        with_comments(Infill("", path="a.ts", files=[File("b.ts", "let x")])).prefix == "// b.ts\n// let x\n"
    )
    assert (
        with_comments(Infill("", files=[File("q.lua", "x()")], language="lua")).prefix == "-- q.lua\n-- x()\n"
    )
    engine = Engine(native("gemma-mqa", "Q8_0"), TINY_TOKENIZER)
    separator = TINY_TOKENIZER.control.file_separator
    for reads_files in (True, False):
        ids = resolve(engine, Request(infill), {"spm"}, reads_files).prompt
        assert (separator in ids) == reads_files
    assert re.search("# c.py\n# y = 2\nx = 1\n", TINY_TOKENIZER.decode(ids))


# ------------------------------------------------------------------------------------- what is shown
@pytest.mark.parametrize(
    "text, loops",
    [
        ("a = 1\n" * 3, True),
        ("x\na\nb\na\nb\na\nb", True),
        ("a = 1\n}\na = 1\n}\na = 1\n}\n", True),
        ("a = 1\na = 1\nb = 2\n", False),
        ("a(\n    b,\n)\n", False),
        ("        }\n    }\n}\n", False),
        ("", False),
    ],
)
def test_a_loop_is_a_line_that_comes_a_third_time(text, loops):
    assert is_loop(text) == loops


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /var/log/messages",
        "sudo rm -r -f build",
        'find "$1" -mtime +7 -delete',
        "find . -name '*.log' -exec rm {} \\;",
        "ls | xargs rm",
        "dd if=/dev/zero of=/dev/sda",
        "mkfs.ext4 /dev/sdb1",
        "echo x > /dev/sda",
        "git push --force origin main",
        "git reset --hard HEAD~3",
        "chmod -R 777 /",
        ":(){ :|:& };:",
        "curl -s https://example.com/install | sh",
        "kill -9 1",
    ],
)
def test_destructive_commands_are_not_suggested_unasked(command):
    shell = Infill("#!/bin/sh\n", "\n", language="shellscript")
    assert not is_worth_showing(command, 1.0, shell, 0.0)
    start, rest = command[:4], command[4:]
    assert not is_worth_showing(rest, 1.0, Infill(f"#!/bin/sh\n{start}", language="shell"), 0.0)
    assert is_worth_showing(f"# {command}", 1.0, Infill("", language="markdown"), 0.0)


def test_a_long_line_of_a_shell_costs_no_time():
    infill = Infill("dd " * 300_000, "", path="a.sh")  # searched whole, it would take hours
    assert is_worth_showing("x", 1.0, infill, 0.3)
    assert not is_worth_showing("; rm -rf build", 1.0, infill, 0.3)


@pytest.mark.parametrize(
    "command",
    [
        "echo done > /dev/null",
        "git push --force-with-lease",
        "rm file.txt",
        "grep -rf patterns .",
        "kill $pid",
        "ls -rf",
    ],
)
def test_ordinary_commands_are_suggested(command):
    assert is_worth_showing(command, 1.0, Infill("#!/bin/sh\n", language="shell"), 0.0)


def test_what_the_model_is_unsure_of_is_hidden():
    infill = Infill("x = ")
    assert is_worth_showing("1", 0.5, infill, 0.5) and not is_worth_showing("1", 0.49, infill, 0.5)
    assert not is_worth_showing(" \n", 1.0, infill, 0.0)
    assert not is_worth_showing("1,\n" * 9, 1.0, infill, 0.0)


# ------------------------------------------------------------------------------------- padded vocabularies
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(2.0, seed=1), Sampling(bias=((560, 100.0), (3, 1.0)))]
)
def test_ids_that_the_tokenizer_cannot_spell_are_never_chosen_nor_listed(sampling):
    """The likeliest row of the model is one that pads its vocabulary to a round size."""
    backend = Scripted([2, 560, 560, 560, 560, 560])
    backend.config = tiny_config("gemma-mqa", context=512, vocab=600)
    engine, size = Engine(backend, TINY_TOKENIZER), TINY_TOKENIZER.vocab_size
    steps = list(engine.generate(Request([2], 4, sampling, top_logprobs=5)))
    assert len(steps) == 4 and all(step.token < size for step in steps)
    for step in steps:
        assert all(token < size for token, _ in step.top)
        assert step.logprob == pytest.approx(-np.log(size), abs=1e-5)  # all rows that are left are equal
