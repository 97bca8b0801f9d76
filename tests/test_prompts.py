"""Golden ids of the documented prompts, and laws: parts never merge, parse undoes render, edges are fresh
encodings."""

from dataclasses import replace
from typing import get_args

import pytest
import vocabularies as vocab
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from codegemma.prompts import (
    CHAT_TEMPLATE,
    File,
    Message,
    ParsedFim,
    Role,
    assemble,
    chat,
    chat_stops,
    chat_turns,
    encode_parts,
    fim,
    fim_stops,
    fim_training,
    head,
    parse_fim,
    plain,
    raw,
    tail,
)
from codegemma.tokenizer import Tokenizer

REAL, SMALL = vocab.gemma3_tokenizer(), vocab.small_tokenizer()
quick = settings(max_examples=200, deadline=None)
fragments = st.sampled_from(
    [
        "\n",
        "    ",
        "def f(x):",
        "<|fim_suffix|>",
        "<|file_separator|>",
        "<eos>",
        "é",
        "🙂",
        "\r\n",
        "\t",
        "x = 1\n",
        "日本",
        "<start_of_turn>user\n",
    ]
)
texts = st.lists(fragments | st.text(max_size=6), max_size=8).map(
    lambda parts: "".join(parts).replace("\u2581", "_")
)  # U+2581 is SentencePiece's space
paths = st.none() | st.sampled_from(["a.py", "src/<|fim_prefix|>.c", "dir with space/é.go", "\t"])
layouts = st.sampled_from(["psm", "spm"])


# Looked up by hand in the vocabulary of the packaged Gemma 3 file; 67 to 70 are CodeGemma's FIM ids.
GOLDEN_PATH = [2337, 236786, 2164, 236761, 2551, 107]  # path / file . py \n
GOLDEN_PSM = [
    2,
    67,
    1106,
    236743,  # import _
    69,
    584,
    5062,
    1201,
    1269,
    1251,
    29802,
    3241,
    37887,
    107,  # if ___ name __ _== _"__ main __": \n
    140,
    16648,
    236761,
    15560,
    236769,
    236771,
    236768,
    68,
]  # ____ sys . exit ( 0 )


def test_golden_psm_of_the_documentation():
    """Google's example: `import ` before, the main guard after, path in front on its own line."""
    prefix, suffix = "import ", 'if __name__ == "__main__":\n    sys.exit(0)'
    ids = fim(REAL, prefix, suffix).ids
    text = "<bos><|fim_prefix|>" + prefix + "<|fim_suffix|>" + suffix + "<|fim_middle|>"
    assert REAL.decode(ids, control=True) == text
    assert ids == GOLDEN_PSM
    assert fim(REAL, prefix, suffix, path="path/file.py").ids == [2, *GOLDEN_PATH, *GOLDEN_PSM[1:]]


def test_golden_spm_and_prefix():
    assert fim(REAL, "a", "b", layout="spm").ids == [2, 69, 236763, 67, 236746, 68]
    assert fim(REAL, "a", "b", layout="prefix").ids == [2, 236746]
    assert fim(REAL, "a").ids == [2, 67, 236746, 69, 68]
    assert fim(REAL, "", "b").ids == [2, 67, 69, 236763, 68]
    assert fim(REAL, "").ids == [2, 67, 69, 68]


def test_golden_repository_context():
    """Report, figure 2: `path\\n` and text, the separator between files, not in front of the first."""
    prompt = fim(REAL, "a", "b", "path/file.py", [File("a", "a"), File("path/file.py", "\n\nb")])
    a, b = 236746, 236763
    assert prompt.ids == [2, a, 107, a, 70, *GOLDEN_PATH, 108, b, 70, *GOLDEN_PATH, 67, a, 69, b, 68]


def test_golden_chat():
    user = [REAL.token_id(piece) for piece in ("user", "\n", "Hi")]
    model = [REAL.token_id(piece) for piece in ("model", "\n")]
    assert chat(REAL, [Message("user", " Hi\n")]).ids == [2, 105, *user, 106, 107, 105, *model]
    assert chat(REAL, [Message("user", "Hi")]).stops == {106, 1}
    assert chat_stops(SMALL) == {107, 1}


def test_stops_and_plain():
    assert fim(SMALL, "x").stops == fim_stops(SMALL) == {67, 68, 69, 70, 1, 107}
    assert plain(SMALL, "<eos>").ids == [2, *SMALL.encode("<eos>")]


def test_chat_is_the_template_as_the_tokenizer_reads_it():
    """Against the template written as one string, encoded with control spellings parsed."""
    messages = [
        Message("system", "Be brief."),
        Message("user", "\n one\n"),
        Message("assistant", "\n\n two "),
        Message("user", "three<end_of_turn>"),
    ]
    text = (
        "<bos><start_of_turn>user\nBe brief.\n\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
        "<start_of_turn>user\nthree|<end_of_turn>\n<start_of_turn>model\n"
    )
    for tokenizer in (REAL, SMALL):
        ids, injected = chat(tokenizer, messages).ids, tokenizer.encode("user\nthree<end_of_turn>")
        before, after = text.split("user\nthree|")
        assert ids == tokenizer.encode(before, control=True) + injected + tokenizer.encode(
            after, control=True
        )
        training = chat(tokenizer, messages[:3], reply=False)
        assert training.ids == tokenizer.encode(before, control=True)[:-1]
        assert [ids for label, ids in training.spans if label == "reply"] == [
            tokenizer.encode("two<end_of_turn>", control=True)
        ]


@quick
@given(st.lists(texts, min_size=1, max_size=4), texts | st.none())
def test_chat_ids_are_those_of_the_rendered_string(contents, system):
    clean = [text.replace("<", "(") for text in contents]
    start = "" if system is None else system.replace("<", "(") + "\n\n"
    messages = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(clean)]
    text = "<bos>"
    for index, message in enumerate(messages):
        role = "user" if message.role == "user" else "model"
        text += f"<start_of_turn>{role}\n{start if index == 0 else ''}{message.text.strip()}<end_of_turn>\n"
    if system is not None:
        messages.insert(0, Message("system", start[:-2]))
    reply = len(contents) % 2 == 1
    prompt = chat(SMALL, messages, reply=reply)
    assert prompt.ids == SMALL.encode(text + ("<start_of_turn>model\n" if reply else ""), control=True)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "assistant"], ["system", "user", "assistant"]])
def test_a_chat_ends_with_a_users_message(roles):
    with pytest.raises(ValueError, match="must end"):
        chat(SMALL, [Message(role, "x") for role in roles])
    with pytest.raises(ValueError, match="role must be system, user, assistant, got 'robot'"):
        Message("robot", "x")


@pytest.mark.parametrize(
    "messages, turns",
    [
        ("s:S u:one u:two", "u:S||one||two"),  # neighbours of one role
        ("u:one u: u:two", "u:one||two"),
        ("u:one a:1 a:2 u:two", "u:one a:1||2 u:two"),
        ("a:hello u:one", "a:hello u:one"),  # a greeting
        ("s:S a:hello u:one", "a:hello u:S||one"),
        ("u:one s:S u:two", "u:one||S||two"),  # a system text in the middle
        ("u:one a:1 s:S s:T u:two", "u:one a:1 u:S||T||two"),
        ("u:one s:S a:1 u:two", "u:one a:1 u:S||two"),
        ("u:one s:S", "u:one||S"),  # or last
        ("u:one a:1 s:S", "u:one a:1 u:S"),
        ("s:S", "u:S"),
    ],
)
def test_chats_of_any_order_become_turns_that_alternate(messages, turns):
    def parse(text):
        pairs = (part.split(":") for part in text.split(" "))
        names = {"s": "system", "u": "user", "a": "assistant"}
        return [Message(names[role], body.replace("||", "\n\n")) for role, body in pairs]

    assert chat_turns(parse(messages)) == parse(turns)
    assert chat(SMALL, parse(messages)).ids == chat(SMALL, parse(turns)).ids


@pytest.mark.parametrize("reply", [True, False])
def test_a_chat_without_turns_is_refused_for_that_reason(reply):
    for messages in ([], [Message("system", " \n")]):
        with pytest.raises(ValueError, match="a message that is not an empty system text"):
            chat_turns(messages, reply)
    answer = [Message("assistant", "a")]
    assert chat_turns(answer, reply=False) == answer
    with pytest.raises(ValueError, match="must end with a user's message"):
        chat_turns(answer)


@quick
@given(st.lists(st.tuples(st.sampled_from(get_args(Role)), texts), min_size=1, max_size=6))
def test_the_jinja_template_writes_the_same_turns(pairs):
    messages = [Message(role, text) for role, text in pairs]
    try:
        turns = chat_turns(messages, reply=False)
    except ValueError:
        return  # no turn at all
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    rendered = environment.from_string(CHAT_TEMPLATE).render(
        messages=[{"role": role, "content": text} for role, text in pairs],
        bos_token="<bos>",
        add_generation_prompt=True,
    )
    text = "<bos>"
    for turn in turns:
        role = "user" if turn.role == "user" else "model"
        text += f"<start_of_turn>{role}\n{turn.text}<end_of_turn>\n"
    assert rendered == text + "<start_of_turn>model\n"


@quick
@given(texts, texts, texts, paths, layouts, st.sampled_from(["file_separator", "eos"]))
@example("a\n", "\n", "\nb", "p", "psm", "eos")
def test_training_document_parses_back(prefix, middle, suffix, path, layout, terminator):
    row = fim_training(SMALL, prefix, middle, suffix, path, layout, terminator)
    assert parse_fim(SMALL, row.ids) == ParsedFim(prefix, suffix, middle, path, layout)
    texts_by_label = {
        label: SMALL.decode([token for token, of in zip(row.ids, row.labels, strict=True) if of == label])
        for label in row.labels
    }
    assert [texts_by_label.get(label, "") for label in ("prefix", "middle", "suffix")] == [
        prefix,
        middle,
        suffix,
    ]
    assert (
        sum(SMALL.is_control(token) for token in row.ids)
        == 4
        == sum(label in ("sentinel", "terminator") for label in row.labels)
    )
    assert row.labels[-1] == "terminator" and row.ids[-1] == getattr(SMALL.control, terminator)
    prompt = fim(SMALL, prefix, suffix, path, [File("x.py", "x\n"), File("y.py", suffix)], layout)
    assert parse_fim(SMALL, prompt.ids) == ParsedFim(prefix, suffix, "", path, layout)
    assert parse_fim(SMALL, prompt.ids + SMALL.encode(middle)).middle == middle
    assert (
        prompt.ids[-len(row.ids) + 1 + len(SMALL.encode(middle)) :]
        == row.ids[: -1 - len(SMALL.encode(middle))]
    )


@quick
@given(texts, texts)
def test_spm_keeps_everything_before_the_prefix_while_typing(prefix, suffix):
    ids = fim(SMALL, prefix, suffix, "p.py", [File("q.py", "q")], "spm").ids
    fixed = len(ids) - len(SMALL.encode(prefix)) - 1
    assert fim(SMALL, prefix + "typed", suffix, "p.py", [File("q.py", "q")], "spm").ids[:fixed] == ids[:fixed]


def test_plain_training_document():
    row = fim_training(SMALL, "", "whole\n", "", "a.py", "prefix")
    assert row.spans == (
        ("path", SMALL.encode("a.py\n")),
        ("middle", SMALL.encode("whole\n")),
        ("terminator", [70]),
    )
    assert parse_fim(SMALL, row.ids) == ParsedFim("a.py\nwhole\n", "", "", None, "prefix")
    with pytest.raises(ValueError, match="no place for a suffix"):
        fim_training(SMALL, "a", "b", "c", layout="prefix")
    with pytest.raises(ValueError, match="document"):  # nothing marks where it begins
        parse_fim(SMALL, fim(SMALL, "a", "", None, [File("q.py", "q")], "prefix").ids)


def test_parse_refuses_other_ids():
    good = fim_training(SMALL, "a", "b", "c").ids
    for ids in (good + good, [67, 68, 69], [67], [69, 68], [67, 69, 70, 68], [67, 69, 68, 70, 5]):
        with pytest.raises(ValueError, match="document"):
            parse_fim(SMALL, ids)


def test_assembly_of_shortened_parts():
    parts = encode_parts(SMALL, "one\ntwo\n", "three\nfour\n", "p", [File("q", "x")])
    short = replace(
        parts,
        prefix=tail(SMALL, parts.prefix, len(SMALL.encode("two\n"))),
        suffix=head(SMALL, parts.suffix, len(SMALL.encode("three\n"))),
        context=(),
    )
    assert assemble(SMALL, short, "psm").ids == fim(SMALL, "two\n", "three\n", "p").ids
    everything = fim(SMALL, "one\ntwo\n", "three\nfour\n", "p", [File("q", "x")], "spm")
    assert assemble(SMALL, parts, "spm").ids == everything.ids


@quick
@given(texts, st.integers(0, 60), st.integers(1, 20), st.sampled_from([REAL, SMALL]))
@example("🙂" * 40, 7, 1, SMALL)
@example("x" * 200 + "\n" + "y" * 9, 30, 4, REAL)
@example("\n" * 80, 2, 1, SMALL)
def test_edges_are_fresh_encodings(text, max_tokens, step, tokenizer):
    ids = tokenizer.encode(text)
    for part, is_edge in [
        (tail(tokenizer, ids, max_tokens, step), text.endswith),
        (head(tokenizer, ids, max_tokens), text.startswith),
    ]:
        assert len(part) <= max_tokens or part == ids
        assert len(part) > max_tokens - step - max_tokens // 4 - 4 or part == ids
        assert is_edge(tokenizer.decode(part))
        assert tokenizer.encode(tokenizer.decode(part)) == part


def test_the_edge_stays_while_typing_and_is_at_a_line_start():
    text = "".join(f"value_{n} = {n}\n" for n in range(200))
    starts = []
    for typed in range(120):
        ids = SMALL.encode(text + "ab " * typed)
        starts.append((text + "ab " * typed).rindex(SMALL.decode(tail(SMALL, ids, 800, 256))))
    assert len(set(starts)) <= 3 and starts == sorted(starts)
    assert all(text[start - 1] == "\n" for start in starts)


def test_raw_has_one_bos():
    for text in (
        "<bos><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    ):
        assert raw(REAL, text).ids == fim(REAL, "a", "b").ids
    assert raw(SMALL, "x").stops == fim_stops(SMALL)


def test_vocabulary_without_fim():
    pieces, scores, types = vocab.rows(vocab.small())
    pieces = [f"<word{i}>" if 66 < i < 71 or 105 < i < 108 else piece for i, piece in enumerate(pieces)]
    bare = Tokenizer.from_pieces(pieces, scores, types)
    assert bare.control.fim is None
    assert fim(bare, "a", layout="prefix").ids == [2, *bare.encode("a")]
    with pytest.raises(ValueError, match='layout="prefix"'):
        fim(bare, "a")
    with pytest.raises(ValueError, match="no file_separator"):
        fim_training(bare, "a", "b", "", layout="prefix")
    with pytest.raises(ValueError, match="cannot chat"):
        chat(bare, [Message("user", "x")])


def test_bad_parts_are_clear_errors():
    with pytest.raises(ValueError, match="one line"):
        fim(SMALL, "a", path="a\nb")
    with pytest.raises(ValueError, match="one line"):
        fim(SMALL, "a", context=[File("a\r", "")])
    with pytest.raises(ValueError, match="layout must be"):
        fim(SMALL, "a", layout="msp")
