r"""In what order control ids stand: FIM documents, context files, chat turns, and what ends each. Nowhere else.

A prompt is a row of segments, each a label and the ids of one text encoded alone, so that no piece merges across the
cursor, no text becomes a control id, and assembling is concatenation. Training rows are the same segments with the
middle and its terminator behind them; loss masks are made from the labels.

Layouts (CodeGemma report, figures 2 and 4; SPM has no published form, this is the one its run-on output shows):

    psm     [path\n]<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>
    spm     [path\n]<|fim_suffix|>S<|fim_prefix|>P<|fim_middle|>
    prefix  [path\n]P

in front of it, for each context file, `path\n` + text + `<|file_separator|>`, and <bos> first of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from codegemma.tokenizer import FIM_NAMES, Tokenizer

Layout = Literal["psm", "spm", "prefix"]
Role = Literal["system", "user", "assistant"]
Label = Literal[
    "bos",
    "context",
    "path",
    "sentinel",
    "prefix",
    "suffix",
    "middle",
    "terminator",  # FIM
    "raw",
    "turn",
    "user",
    "reply",
]  # raw text, chat
Ids = list[int]

_CONTINUATION = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))  # of a UTF-8 character


@dataclass(frozen=True)
class File:
    """A file of the repository: context for a completion."""

    path: str
    text: str


@dataclass(frozen=True)
class Message:
    role: Role
    text: str


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and the ids that end its answer."""

    segments: tuple[tuple[Label, Ids], ...]
    stops: frozenset[int]

    @cached_property
    def ids(self) -> Ids:
        return [token for _, ids in self.segments for token in ids]

    @cached_property
    def labels(self) -> list[Label]:
        """One label for each of `ids`."""
        return [label for label, ids in self.segments for _ in ids]


@dataclass(frozen=True)
class Parts:
    """A FIM prompt's texts as ids, before assembly: measure with `len`, shorten with `replace` and `head` or `tail`.

    `path` holds the newline after the path; each of `context` holds one file with its path and separator.
    """

    prefix: Ids
    suffix: Ids
    path: Ids
    context: tuple[Ids, ...] = ()


@dataclass(frozen=True)
class Document:
    """A FIM document read back from ids."""

    prefix: str
    suffix: str
    middle: str
    path: str | None
    layout: Layout


def fim_stops(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a completion: any FIM token (the model's own terminator is the separator), <eos>, <end_of_turn>."""
    control = tokenizer.control
    ends = (
        control.fim_prefix,
        control.fim_middle,
        control.fim_suffix,
        control.file_separator,
        control.eos,
        control.end_of_turn,
    )
    return frozenset(token for token in ends if token is not None)


def chat_stops(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(
        token for token in (tokenizer.control.end_of_turn, tokenizer.control.eos) if token is not None
    )


def fim(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str = "",
    path: str | None = None,
    context: Sequence[File] = (),
    layout: Layout = "psm",
) -> Prompt:
    """The prompt to complete between `prefix` and `suffix`, either of which may be empty; layout "prefix" leaves the
    suffix out. Raises ValueError: a path of several lines, or a vocabulary without FIM ids."""
    return assemble(tokenizer, encode_parts(tokenizer, prefix, suffix, path, context), layout)


def encode_parts(
    tokenizer: Tokenizer, prefix: str, suffix: str = "", path: str | None = None, context: Sequence[File] = ()
) -> Parts:
    """Every text of a FIM prompt encoded once and alone."""
    files = tuple(
        _path_line(tokenizer, file.path) + tokenizer.encode(file.text) + _separator(tokenizer)
        for file in context
    )
    return Parts(tokenizer.encode(prefix), tokenizer.encode(suffix), _path_line(tokenizer, path), files)


def assemble(tokenizer: Tokenizer, parts: Parts, layout: Layout) -> Prompt:
    """The prompt of `parts`; concatenation only."""
    context: list[tuple[Label, Ids]] = [("context", ids) for ids in parts.context]
    return _prompt(
        [("bos", _bos(tokenizer)), *context, *_fim_segments(tokenizer, parts, layout)], fim_stops(tokenizer)
    )


def fim_training(
    tokenizer: Tokenizer,
    prefix: str,
    middle: str,
    suffix: str,
    path: str | None = None,
    layout: Layout = "psm",
    terminator: Literal["file_separator", "eos"] = "file_separator",
) -> Prompt:
    """One document of a training row, without <bos>. Layout "prefix" is a file that is not FIM: no suffix."""
    if layout == "prefix" and suffix:
        raise ValueError(
            'layout "prefix" has no place for a suffix: put the whole text into prefix and middle'
        )
    end = getattr(tokenizer.control, terminator)
    if end is None:
        raise ValueError(
            f"this vocabulary has no {terminator} token to end a document: use CodeGemma's or Gemma's"
        )
    segments = _fim_segments(tokenizer, encode_parts(tokenizer, prefix, suffix, path), layout)
    return _prompt(
        [*segments, ("middle", tokenizer.encode(middle)), ("terminator", [end])], fim_stops(tokenizer)
    )


def parse_fim(tokenizer: Tokenizer, ids: Sequence[int]) -> Document:
    """The document that `fim_training`, or `fim` with an answer behind it, spelled as `ids`; context files are skipped.

    Without sentinels all of it is prefix, path included: only sentinels mark where a path ends. Raises ValueError
    where the sentinels stand in no known order or a second document follows.
    """
    control = tokenizer.control
    body = list(ids)
    if body[:1] == [control.bos]:
        body = body[1:]
    if body and body[-1] in (control.file_separator, control.eos):
        body = body[:-1]
    marks = {control.fim_prefix: "prefix", control.fim_suffix: "suffix", control.fim_middle: "middle"}
    found = [(at, marks[token]) for at, token in enumerate(body) if token in marks]
    layouts: dict[tuple[str, ...], Layout] = {
        ("prefix", "suffix", "middle"): "psm",
        (): "prefix",
        ("suffix", "prefix", "middle"): "spm",
    }
    layout = layouts.get(tuple(name for _, name in found))
    if layout is None:
        raise ValueError(
            "a FIM document has its tokens in the order prefix, suffix, middle or suffix, prefix, middle; "
            f"these ids have {', '.join(name for _, name in found)}: parse one document at a time"
        )
    start = found[0][0] if found else 0
    if control.file_separator in body[start:]:
        raise ValueError("more than one document: split the ids after each file separator")
    head = body[:start]
    while control.file_separator in head:
        head = head[head.index(control.file_separator) + 1 :]
    edges = [at for at, _ in found] + [len(body)]
    texts = {
        name: tokenizer.decode(body[at + 1 : edge]) for (at, name), edge in zip(found, edges[1:], strict=True)
    }
    return Document(
        texts.get("prefix", tokenizer.decode(body) if not found else ""),
        texts.get("suffix", ""),
        texts.get("middle", ""),
        tokenizer.decode(head).removesuffix("\n") or None,
        layout,
    )


def plain(tokenizer: Tokenizer, text: str) -> Prompt:
    """<bos> and text to be continued."""
    return _prompt([("bos", _bos(tokenizer)), ("prefix", tokenizer.encode(text))], fim_stops(tokenizer))


def raw(tokenizer: Tokenizer, text: str) -> Prompt:
    """For clients that spell control tokens themselves: the spellings become ids; one <bos>, theirs or ours."""
    ids = tokenizer.encode(text, control=True)
    start = [] if ids[:1] == _bos(tokenizer) else _bos(tokenizer)
    return _prompt([("bos", start), ("raw", ids)], fim_stops(tokenizer))


def chat(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> Prompt:
    """Gemma's chat template: turns trimmed, the system text before the first user text with a blank line between.

    `reply` opens the model's turn for it to answer; `reply=False` is for training rows, whose "reply" segments are what
    the model is to learn. Raises ValueError unless user and assistant alternate, the user first, and last with `reply`.
    """
    control = tokenizer.control
    if control.start_of_turn is None or control.end_of_turn is None:
        raise ValueError("this vocabulary has no <start_of_turn> and <end_of_turn>: it cannot chat")
    system, turns = split_system(messages, reply)
    newline = tokenizer.encode("\n")
    segments: list[tuple[Label, Ids]] = [("bos", _bos(tokenizer))]
    for message in turns:
        segments.append(("turn", [control.start_of_turn]))
        text = message.text.strip()
        if message.role == "user":
            segments += [("user", tokenizer.encode(f"user\n{system}{text}")), ("turn", [control.end_of_turn])]
            system = ""
        else:
            segments += [
                ("turn", tokenizer.encode("model\n")),
                ("reply", [*tokenizer.encode(text), control.end_of_turn]),
            ]
        segments.append(("turn", newline))
    if reply:
        segments.append(("turn", [control.start_of_turn, *tokenizer.encode("model\n")]))
    return _prompt(segments, chat_stops(tokenizer))


def tail(tokenizer: Tokenizer, ids: Ids, most: int, step: int = 1) -> Ids:
    """The end of `ids` in at most `most` tokens: what is nearest to the cursor of a prefix.

    The result is a fresh encoding of its own text, as every run of whole characters within a BPE encoding is: no merge
    crossed its edges. The number of dropped tokens is rounded up to a multiple of `step`, so that the edge stays put
    while one types; it moves on to the start of a line where that costs at most a quarter of `most`.
    """
    if len(ids) <= most:
        return ids
    drop = -(-(len(ids) - most) // step) * step
    if drop >= len(ids):
        drop = len(ids) - most
    reach = range(drop, min(len(ids), drop + most // 4 + 1))
    return ids[_edge(tokenizer, ids, reach, range(drop, len(ids)), len(ids)) :]


def head(tokenizer: Tokenizer, ids: Ids, most: int) -> Ids:
    """The start of `ids` in at most `most` tokens: what is nearest to the cursor of a suffix; edges as in `tail`."""
    if len(ids) <= most:
        return ids
    return ids[: _edge(tokenizer, ids, range(most, most - most // 4 - 1, -1), range(most, 0, -1), 0)]


def _edge(tokenizer: Tokenizer, ids: Ids, lines: range, characters: range, nothing: int) -> int:
    """The first index that starts a line, else the first that starts a character, else `nothing`."""

    def starts_line(at: int) -> bool:
        return at > 0 and tokenizer.decode_bytes(ids[at - 1 : at]).endswith(b"\n")

    def starts_character(at: int) -> bool:
        return tokenizer.decode_bytes(ids[at : at + 1])[:1] not in _CONTINUATION

    found = [next(filter(starts_line, lines), None), next(filter(starts_character, characters), None)]
    return next((at for at in found if at is not None), nothing)


def _fim_segments(tokenizer: Tokenizer, parts: Parts, layout: Layout) -> list[tuple[Label, Ids]]:
    path: tuple[Label, Ids] = ("path", parts.path)
    prefix: tuple[Label, Ids] = ("prefix", parts.prefix)
    suffix: tuple[Label, Ids] = ("suffix", parts.suffix)
    if layout == "prefix":
        return [path, prefix]
    opens_prefix, opens_suffix, opens_middle = _sentinels(tokenizer)
    if layout == "psm":
        return [path, opens_prefix, prefix, opens_suffix, suffix, opens_middle]
    if layout == "spm":
        return [path, opens_suffix, suffix, opens_prefix, prefix, opens_middle]
    raise ValueError(f'layout must be "psm", "spm" or "prefix", got {layout!r}')


def _sentinels(tokenizer: Tokenizer) -> Iterable[tuple[Label, Ids]]:
    control = tokenizer.control
    if control.fim is None:
        raise ValueError(
            f'this vocabulary has no FIM tokens ({", ".join(FIM_NAMES.values())}): use layout="prefix"'
        )
    return [
        ("sentinel", [token])
        for token in (control.fim_prefix, control.fim_suffix, control.fim_middle)
        if token is not None
    ]


def _prompt(segments: list[tuple[Label, Ids]], stops: frozenset[int]) -> Prompt:
    return Prompt(tuple((label, ids) for label, ids in segments if ids), stops)


def _bos(tokenizer: Tokenizer) -> Ids:
    return [] if tokenizer.control.bos is None else [tokenizer.control.bos]


def _separator(tokenizer: Tokenizer) -> Ids:
    return [] if tokenizer.control.file_separator is None else [tokenizer.control.file_separator]


def _path_line(tokenizer: Tokenizer, path: str | None) -> Ids:
    if path is not None and ("\n" in path or "\r" in path):
        raise ValueError(
            f"a path must stand on one line, got {path!r}: rename the file or leave its path out"
        )
    return tokenizer.encode(path + "\n") if path else []


def split_system(messages: Sequence[Message], reply: bool) -> tuple[str, Sequence[Message]]:
    """The system text with its blank line, and the turns, checked."""
    system, turns = "", messages
    if messages and messages[0].role == "system":
        system, turns = messages[0].text + "\n\n", messages[1:]
    for at, message in enumerate(turns):
        expected = "assistant" if at % 2 else "user"
        if message.role != expected:
            raise ValueError(
                f"chat turn {at + 1} must be the {expected}'s, got {message.role!r}: user and assistant "
                "alternate, the user first; one system message may stand before them"
            )
    if not turns or (reply and turns[-1].role != "user"):
        raise ValueError("a chat must end with a user's message for the model to answer: add one")
    return system, turns
