"""The holes of named recipes: each kind is what it says, in each language with a grammar; their shares."""

from __future__ import annotations

import io
import re
import tokenize
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("tree_sitter")

from hypothesis import given
from hypothesis import strategies as st
from vocabularies import small

from codegemma.data import fim, holes, splits, syntax
from codegemma.data.context import related_files
from codegemma.data.documents import Document
from codegemma.data.draw import Draw
from codegemma.data.folder import StoredDocument
from codegemma.data.recipe import RECIPES, BuildRecipe, even_strides, named_recipe
from codegemma.generate.request import Infill, Request
from codegemma.generate.resolve import resolve
from codegemma.prompts import File
from codegemma.tokenizer import Tokenizer

WORDS = "alpha béta gamma"  # of the string in each sample
SAMPLES = {
    "python": "def run(first, second):\n    if first:\n        CALL\n    return 1\n",
    "java": "class A {\n    int run(int a) {\n        CALL;\n        return 1;\n    }\n}\n",
    "kotlin": "fun run(a: Int): Int {\n    if (a > 1) {\n        CALL\n    }\n    return 1\n}\n",
    "javascript": "function run(a) {\n  if (a) {\n    CALL;\n  }\n  return 1;\n}\n",
    "jsx": "function Run(a) {\n  CALL;\n  return <b>{a}</b>;\n}\n",
    "typescript": "function run(a: number) {\n  if (a) {\n    CALL;\n  }\n  return 1;\n}\n",
    "tsx": "function Run(a: number) {\n  CALL;\n  return <b>{a}</b>;\n}\n",
    "go": "package a\n\nfunc run(a int) int {\n\tif a > 1 {\n\t\tCALL\n\t}\n\treturn 1\n}\n",
    "c": "int run(int a) {\n    if (a) {\n        CALL;\n    }\n    return 1;\n}\n",
    "cpp": "int A::run(int a) {\n    if (a) {\n        CALL;\n    }\n    return 1;\n}\n",
    "csharp": "class A {\n    int Run(int a) {\n        CALL;\n        return 1;\n    }\n}\n",
    "rust": "fn run(a: i32) -> i32 {\n    if a > 1 {\n        CALL;\n    }\n    1\n}\n",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_sentencepiece(small())


def code(language):
    """Some functions in a language, with texts that differ."""
    calls = (f'show("{WORDS}", second, {number})' for number in range(100, 112))
    return "\n".join(SAMPLES[language].replace("CALL", call) for call in calls)


def node_ends(text, language):
    """The offsets, in characters, at which a syntax node of a text ends, by a walk over the whole tree."""
    data, ends, stack = text.encode(), set(), [syntax.parse(text, language).root_node]
    while stack:
        node = stack.pop()
        stack += node.children
        ends.add(len(data[: node.end_byte].decode()))
    return ends


def test_every_language_with_a_grammar_has_a_sample():
    assert SAMPLES.keys() == syntax.GRAMMARS.keys()


@pytest.mark.parametrize("language", SAMPLES)
def test_each_kind_is_what_it_says(language):
    text = code(language)
    ends, strings = node_ends(text, language), set()
    for match in re.finditer(WORDS, text):
        strings |= {(match.start(), match.end())}
    for kind in holes.CUTS:
        for seed in range(60):
            within = range(150, 250)
            hole = holes.draw_hole(text, language, Draw(kind, seed), kind, within, 200)
            prefix, middle, suffix = text[: hole.start], text[hole.start : hole.end], text[hole.end :]
            line = prefix[prefix.rfind("\n") + 1 :]
            assert hole.kind == kind and 0 <= hole.start <= hole.end <= len(text)
            at_line_end = suffix[:1] in ("", "\n")
            match kind:
                case "line characters":
                    assert "\n" not in middle
                case "empty":
                    assert not middle and hole.start in range(150, 251)
                case "natural suffix":
                    assert hole.end in ends and hole.start in within
                case "argument":
                    assert re.search(r"[(,\[{ ]$", prefix) and suffix.lstrip()[:1] in (",", ")", "]", "}")
                case "string":
                    assert any(start <= hole.start < hole.end <= end for start, end in strings)
                case "ten lines":
                    assert not line and middle.endswith("\n") and 1 <= len(middle.split("\n")) - 1 <= 24
                    assert 1 <= sum(bool(each.strip()) for each in middle.split("\n")) <= 10
                case "line break":
                    assert middle[0] == "\n" and at_line_end and middle.strip()
                    assert 1 <= sum(bool(each.strip()) for each in middle.split("\n")) <= 10
                case "indentation":
                    assert not line.strip() and middle[0] in " \t" and at_line_end
                case "typed word":
                    assert re.match(r" ?\w", middle) and not re.search(
                        r"\w$", prefix[-1:] if middle[0] != " " else ""
                    )
                case "word":
                    assert re.search(r"\w$", prefix) and re.fullmatch(r"\w+", middle)
                case _:
                    raise AssertionError(f"{kind} has no law here")


def test_holes_in_strings_are_in_what_python_calls_strings():
    text = "import os\n" + "".join(
        f'name_{at} = f(r"raw {at}", \'one {at}\', """three\nlines {at}""", {at})\n' for at in range(20)
    )
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    strings = [
        (starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
        for t in tokens
        if t.type == tokenize.STRING
    ]
    for seed in range(200):
        hole = holes.draw_hole(text, "python", Draw(seed), "string")
        start, end = next(span for span in strings if span[0] <= hole.start < span[1])
        assert (
            hole.end < end and text[start : hole.start].strip("r") in ("'", '"', '"""') or hole.start > start
        )


def test_kinds_fall_back_to_characters_where_a_text_has_no_place_for_them():
    for kind in holes.CUTS:
        hole = holes.draw_hole("\n\n\n", "text", Draw(kind), kind)
        assert hole.kind in ("characters", "empty") and 0 <= hole.start <= hole.end <= 3


@pytest.mark.parametrize(
    ("prefix", "middle", "suffix", "begins", "ends"),
    [
        ("a = 1", "\nb = 2", "\n", "line break", "end of a line"),
        ("if a:\n  ", "  b()\n", "c()", "blanks in an indentation", "line break"),
        ("a =", " b", "c\n", "blanks in a line", "inside a word"),
        ("if a:\n    ", "b(", ")", "text of a line", "inside a line"),
        ("", "a", "", "text of a line", "end of a line"),
        ("na", "me", " = 1", "inside a word", "inside a line"),
        ("f(", "x", ")", "inside a line", "inside a line"),
        ("f(", "", ")", "nothing", "nothing"),
    ],
)
def test_what_holes_begin_and_end_with(prefix, middle, suffix, begins, ends):
    assert (holes.begins_with(prefix, middle), holes.ends_with(middle, suffix)) == (begins, ends)


def editor_examples(tokenizer, **changes):
    """Windows of the editor's recipe in all languages, as even as its builds make them."""
    documents = [Document("r", f"src/{name}", code(name) * 10, name) for name in SAMPLES]
    recipe = replace(RECIPES["editor"], **{"stride": 40, "fim_rate": 1.0} | changes)
    return [example for example in fim.fim(documents, tokenizer, recipe) if example.layout != "prefix"]


def test_kinds_have_their_weights_and_editors_what_they_ask_for(tokenizer):
    examples = editor_examples(tokenizer)
    kinds = Counter(example.split.kind for example in examples)
    count = len(examples)
    assert count > 3000 and kinds.keys() <= {*holes.EDITOR_HOLES, "lines"}
    for kind, weight in holes.EDITOR_HOLES.items():
        assert abs(kinds[kind] / count - weight) < 0.25 * weight + 4 * (weight / count) ** 0.5, kind
    begins, ends, rest_of_line, lines = Counter(), Counter(), 0, 0
    for example in examples:
        text = example.document.text[example.offset : example.offset + example.size]
        hole = example.split
        middle = text[hole.start : hole.end]
        begins[holes.begins_with(text[: hole.start], middle)] += 1
        ends[holes.ends_with(middle, text[hole.end :])] += 1
        starts_line = not text[: hole.start].rpartition("\n")[2].strip()
        rest_of_line += not starts_line and "\n" not in middle and text[hole.end : hole.end + 1] in ("", "\n")
        lines += starts_line and "\n" in middle.strip("\n")
    # The shares of 175 holes of held-out code: docs/log.md, phase X; inside words: a third of
    # benchmarks/cursor.py, whose prompts begin before the word or in it.
    assert begins["line break"] >= 0.07 * count
    assert begins["blanks in an indentation"] + begins["blanks in a line"] >= 0.075 * count
    assert begins["inside a word"] >= 0.15 * count and begins["nothing"] >= 0.02 * count
    assert ends["inside a line"] + ends["inside a word"] >= 0.25 * count
    assert rest_of_line >= 0.10 * count and lines >= 0.10 * count


def test_orders_have_any_ratio_and_codegemma_has_half(tokenizer):
    for rate in (0.0, 0.3, 1.0):
        layouts = Counter(example.layout for example in editor_examples(tokenizer, spm_rate=rate))
        total = layouts.total()
        assert abs(layouts["spm"] - rate * total) <= 4 * (total * rate * (1 - rate)) ** 0.5
    codegemma = RECIPES["codegemma"]
    assert (codegemma.fim_rate, codegemma.spm_rate, codegemma.length) == (0.8, 0.5, 8192)
    documents = [Document("r", f"src/{name}", code(name), name) for name in SAMPLES]
    for example in fim.fim(documents, tokenizer, replace(codegemma, fim_rate=1.0, length=2048)):
        hole, text = example.split, example.document.text[example.offset :][: example.size]
        assert hole.kind == "natural suffix"
        assert hole.end in node_ends(text, example.document.language)


# ------------------------------------------------------------------------------------------ files in front
class Engine:
    """What `resolve` asks of an engine, with room for every prompt."""

    prefill_rate, context = 1e9, 8192

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def cached(self, ids, adapter="none"):
        return 0


def test_files_in_front_are_framed_as_in_the_language_servers_prompts(tokenizer):
    files = [
        File("lib/a.py", "A = 1\n" * 9),
        File("lib/b.py", code("python")),
        File("lib/c.py", "def c():\n    pass\n"),
    ]
    document = Document("r", "src/main.py", code("python") * 10, "python")
    recipe = BuildRecipe(
        length=1024,
        window=(64, 200),
        stride=60,
        context_rate=1.0,
        path_rate=0.0,
        loss=("middle", "terminator"),
    )
    sizes, layouts = Counter(), Counter()
    for example in fim.fim([document], tokenizer, recipe, {document.name: files}):
        paths = example.context
        sizes[len(paths)] += 1
        layouts[example.layout] += 1
        assert len(example.ids_T) < 1024 and list(paths) == [
            file.path for file in files if file.path in paths
        ]
        ids = example.ids_T.tolist()
        ends = [i for i, token in enumerate(ids) if token == tokenizer.control.file_separator]
        assert len(ends) == len(paths) + 1 and ends[-1] == len(ids) - 1
        shown, start = [], 0
        for path, end in zip(paths, ends, strict=False):  # read back: a path, then whole lines of the file
            head, _, text = tokenizer.decode(ids[start:end]).partition("\n")
            whole = next(file.text for file in files if file.path == path)
            assert head == path and whole.startswith(text) and text.endswith("\n")
            shown.append(File(path, text))
            start = end + 1
        place = example.split
        text = document.text[example.offset : example.offset + example.size]
        prefix, suffix = text[: place.start], text[place.end :]
        if example.layout == "prefix":
            prefix, suffix = text, ""
        infill = Infill(prefix, suffix, document.path, shown, mode=example.layout, heal=False)
        prompt = resolve(Engine(tokenizer), Request(infill), {"psm", "spm"}).prompt
        answer = [] if example.layout == "prefix" else tokenizer.encode(text[place.start : place.end])
        assert [tokenizer.control.bos, *ids] == [*prompt, *answer, tokenizer.control.file_separator]
        learned = example.ids_T[example.loss_T].tolist()
        if example.layout != "prefix":
            assert learned == [*answer, tokenizer.control.file_separator]
    assert set(sizes) == {1, 2, 3} and set(layouts) == {"psm", "spm", "prefix"}


def test_a_share_of_the_windows_has_files_in_front(tokenizer):
    documents = [Document("r", f"m{at}.py", code("python"), "python") for at in range(40)]
    recipe = replace(RECIPES["editor"], stride=60)
    related = {document.name: [File("other.py", "x = 1\n")] for document in documents}
    with_files = [bool(example.context) for example in fim.fim(documents, tokenizer, recipe, related)]
    count = len(with_files)
    assert count > 500 and abs(sum(with_files) - count / 3) < 4 * (count * 2 / 9) ** 0.5
    bare = list(fim.fim(documents, tokenizer, recipe))
    assert len(bare) == count and not any(example.context for example in bare)


@pytest.mark.parametrize("words", [1, 30, 200])  # of a folder's name; the last two fill all the room
def test_a_long_path_leaves_no_room_for_files_in_front(tokenizer, words):
    document = Document("r", f"{' '.join(['folder'] * words)}/m.py", code("python"), "python")
    recipe = BuildRecipe(length=1024, window=(64, 200), stride=60, context_rate=1.0, context_tokens=48)
    related = {document.name: [File("other.py", "x = 1\n" * 100)]}
    shown = [example.context for example in fim.fim([document], tokenizer, recipe, related)]
    assert len(shown) > 3 and any(shown) == (words == 1)


def test_related_files_are_neighbours_then_tests_then_imports():
    names = ["app.py", "deep.py", "util.py", "alone.py", "test_app.py"]
    stored = [
        StoredDocument(Document("r", name, f"# {name}\n", "python"), group=0 if at < 3 else 1)
        for at, name in enumerate(names)
    ]
    edges = {("app.py", "util.py"): 1.0, ("app.py", "deep.py"): 3.0}
    related = related_files(stored, {"r": edges, "other": {("app.py", "alone.py"): 9.0}})
    paths = {name.removeprefix("r:"): [file.path for file in files] for name, files in related.items()}
    assert paths == {
        "app.py": ["test_app.py", "util.py", "deep.py"],  # deep.py is its neighbour too
        "deep.py": ["app.py", "util.py"],
        "util.py": ["deep.py"],
        "alone.py": ["test_app.py"],
        "test_app.py": ["alone.py", "app.py"],
    }


# ------------------------------------------------------------------------------------------------- recipes
@given(
    st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 10**8), min_size=1), st.integers(50, 5000)
)
def test_languages_have_even_shares_of_as_many_windows(characters, stride):
    strides = even_strides(characters, stride)
    windows = {language: size / strides[language] for language, size in characters.items()}
    most = max(windows.values())
    for language, count in windows.items():  # as many as the others, or all that its code gives
        assert count >= 0.98 * most - 1 or strides[language] == min(100, stride)
    wanted = sum(characters.values()) / stride
    assert sum(windows.values()) <= 1.02 * wanted + len(windows)
    if min(strides.values()) > 100:
        assert sum(windows.values()) >= 0.98 * wanted - len(windows)


@pytest.mark.parametrize("kind", sorted({*holes.CUTS, *splits.KINDS, *splits.WINDOW_KINDS}))
def test_every_kind_can_be_cut_from_a_blank_text(kind):
    for text in ("\n", "\n" * 99, " \t\r\n"):
        split = holes.draw_hole(text, "python", Draw(kind), kind)
        assert 0 <= split.start <= split.end <= len(text)


def test_kinds_of_the_named_recipes_add_up_and_are_explained():
    from codegemma.data.show import WHY

    for recipe in RECIPES.values():
        kinds = dict(recipe.kinds)
        assert kinds.keys() <= WHY.keys() and (not kinds or abs(sum(kinds.values()) - 1) < 1e-9)
    assert named_recipe("default") == BuildRecipe()
    random_kinds = ("characters", "line characters", "natural suffix", "word", "empty")
    assert sum(holes.EDITOR_HOLES[kind] for kind in random_kinds) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="recipe must be one of default, codegemma, editor, got 'fast'"):
        named_recipe("fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": (("node", 0.5), ("nodes", 0.5))}, "kinds: nodes not known; known are node, siblings"),
        ({"kinds": (("node", 0.5),)}, "kinds: shares must be above 0 and add up to 1"),
        ({"kinds": (("node", 0.5), ("node", 0.5))}, "kinds: node stands twice"),
        ({"kinds": (("node", 1.0), ("word", float("nan")))}, "kinds: shares must be above 0 and add up to 1"),
        ({"mix": (("code", float("nan")),)}, "mix: shares must be above 0 and add up to 1"),
        ({"context_rate": 0.5}, "context-rate 0.5 needs a window"),
        ({"context_rate": 0.5, "window": (64, 200), "length": 512}, "from 48 to the 311 that a row of 512"),
        ({"context_rate": 2}, "context-rate must lie from 0 to 1, got 2"),
        ({"even_languages": True}, "even-languages needs a window"),
    ],
)
def test_recipes_that_cannot_be_cut(changes, message):
    with pytest.raises(ValueError, match=message):
        BuildRecipe(**changes)
