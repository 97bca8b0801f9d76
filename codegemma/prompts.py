r"""The only place that puts control ids in order: FIM documents, context files, chat turns; and stop ids.

A prompt is a list of spans, each a label and ids. Each text is encoded alone and the ids are joined, so no
token crosses the cursor and no text becomes a control id. A training document has the same spans, then the
middle and its terminator; the labels say which ids count in the loss.

Layouts of FIM (fill in the middle), with P for the prefix and S for the suffix; psm is from the CodeGemma
report (figures 2 and 4); spm is in no report: it is the order of the FIM documents that CodeGemma writes when
it is left to generate them.

    psm     [path\n]<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>
    spm     [path\n]<|fim_suffix|>S<|fim_prefix|>P<|fim_middle|>
    prefix  [path\n]P

Before it come <bos> and, for each context file, `path\n` + text + `<|file_separator|>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from codegemma.tokenizer import FIM_NAMES, Tokenizer

Layout = Literal["psm", "spm", "prefix"]
Role = Literal["system", "user", "assistant"]
# Our role for each role name that clients and datasets use. What a tool returns is read as the user's text.
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES |= {"model": "assistant", "tool": "user", "function": "user"}
FimLabel = Literal["context", "path", "sentinel", "prefix", "suffix", "middle", "terminator"]
Label = Literal[FimLabel, "bos", "raw", "turn", "user", "reply"]  # turn, user, reply: of chats
Ids = list[int]

_FIM = FIM_NAMES["fim_prefix"], FIM_NAMES["fim_suffix"], FIM_NAMES["fim_middle"]
_ORDERS: dict[Layout, tuple[Literal["prefix", "suffix"], ...]] = {
    "psm": ("prefix", "suffix"),
    "spm": ("suffix", "prefix"),
}

# The Jinja template of `chat` for transformers and llama.cpp, with the turns of `chat_turns`.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set open = namespace(role='', text='', system='') %}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}"
    "{% set open.system = open.system + message['content'] + '\n\n' %}"
    "{% else %}{% set text = message['content'] | trim %}"
    "{% set role = 'model' if message['role'] in ['assistant', 'model'] else 'user' %}"
    "{% if role == 'user' %}{% set text = open.system + text %}{% set open.system = '' %}{% endif %}"
    "{% if role != open.role %}"
    "{{ ('<end_of_turn>\n' if open.role else '') + '<start_of_turn>' + role + '\n' + text }}"
    "{% set open.text = text %}{% elif text %}{{ ('\n\n' if open.text else '') + text }}"
    "{% set open.text = text %}{% endif %}{% set open.role = role %}{% endif %}{% endfor %}"
    "{% if open.system | trim %}{% if open.role == 'user' %}{{ '\n\n' if open.text else '' }}"
    "{% else %}{{ ('<end_of_turn>\n' if open.role else '') + '<start_of_turn>user\n' }}{% endif %}"
    "{{ open.system | trim }}{% endif %}{{ '<end_of_turn>\n' }}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# One turn of a chat as a Go template, for Ollama.
_OLLAMA_TURN = (
    "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
    "<start_of_turn>model\n"
)
MAX_FILE_CHARACTERS = 8_000  # of a context file, from its start, where imports and declarations are
# The bytes inside a UTF-8 character, after its first.
_CONTINUATION = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))


@dataclass(frozen=True)
class File:
    """A file of the repository, as context for a completion."""

    path: str
    text: str


@dataclass(frozen=True)
class Message:
    """A message of a chat. Raises ValueError on a role that is not in Role; ROLES translates other names."""

    role: Role
    text: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"a message's role must be {', '.join(get_args(Role))}, got {self.role!r:.40}")


@dataclass(frozen=True)
class Prompt:
    """A prompt as labelled spans of ids, and the ids that end its answer."""

    spans: tuple[tuple[Label, Ids], ...]
    stops: frozenset[int]

    @cached_property
    def ids(self) -> Ids:
        return [token for _, ids in self.spans for token in ids]

    @cached_property
    def labels(self) -> list[Label]:
        """One label for each of `ids`."""
        return [label for label, ids in self.spans for _ in ids]


@dataclass(frozen=True)
class Parts:
    """The texts of a FIM prompt as ids; `head` and `tail` may shorten them before `assemble` joins them.

    `path` includes its newline; each item of `context` is a file: its path line, its text and the separator.
    """

    prefix: Ids
    suffix: Ids
    path: Ids
    context: tuple[Ids, ...] = ()

    @property
    def size(self) -> int:
        """The number of ids, without those of the path."""
        return len(self.prefix) + len(self.suffix) + sum(map(len, self.context))


@dataclass(frozen=True)
class ParsedFim:
    """The texts of a FIM document, parsed from its ids."""

    prefix: str
    suffix: str
    middle: str
    path: str | None
    layout: Layout


def fim_stops(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a completion: the FIM tokens (CodeGemma itself writes the file separator) and those of
    `chat_stops`."""
    control = tokenizer.control
    fim = {control.fim_prefix, control.fim_middle, control.fim_suffix, control.file_separator}
    return frozenset(token for token in fim | chat_stops(tokenizer) if token is not None)


def chat_stops(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end the model's turn: <end_of_turn>, <eos>, and those that the model's files state."""
    ends = tokenizer.control.end_of_turn, tokenizer.control.eos, *tokenizer.end_ids
    return frozenset(token for token in ends if token is not None)


def ollama_template(chats: bool, fim: Sequence[str] | None = _FIM, with_response: bool = False) -> str:
    """Ollama's TEMPLATE (Go): FIM for a prompt with a suffix, else a chat turn (`chats`) or the plain prompt.

    `fim` are the spellings of the prefix, suffix and middle tokens; with None there is no FIM branch.
    `with_response` adds the model's answer, as Modelfiles do.
    """
    text = _OLLAMA_TURN if chats else "{{ .Prompt }}"
    if chats and with_response:
        text += "{{ .Response }}<end_of_turn>\n"
    if fim is None:
        return text
    prefix, suffix, middle = fim
    infill = prefix + "{{ .Prompt }}" + suffix + "{{ .Suffix }}" + middle
    return "{{- if .Suffix }}" + infill + "{{- else }}" + text + "{{- end }}"


def fim(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str = "",
    path: str | None = None,
    context: Sequence[File] = (),
    layout: Layout = "psm",
) -> Prompt:
    """The prompt for the text between `prefix` and `suffix`, either of which may be empty.

    Layout "prefix" ignores the suffix. Raises ValueError on a path of several lines and, in the other
    layouts, on a vocabulary without FIM ids.
    """
    return assemble(tokenizer, encode_parts(tokenizer, prefix, suffix, path, context), layout)


def encode_parts(
    tokenizer: Tokenizer, prefix: str, suffix: str = "", path: str | None = None, context: Sequence[File] = ()
) -> Parts:
    """Encodes each text of a FIM prompt alone. Raises ValueError on a path of several lines."""
    separator, encode = _optional(tokenizer.control.file_separator), tokenizer.encode
    files = tuple(_path_line(tokenizer, file.path) + encode(file.text) + separator for file in context)
    return Parts(encode(prefix), encode(suffix), _path_line(tokenizer, path), files)


def file_head(text: str, limit: int = MAX_FILE_CHARACTERS) -> str:
    """The part of a context file that stands in a prompt: whole lines from its start, at most `limit`
    characters."""
    return text if len(text) <= limit else text[: text.rfind("\n", 0, limit) + 1]


def assemble(tokenizer: Tokenizer, parts: Parts, layout: Layout) -> Prompt:
    """Joins the parts of a FIM prompt. Raises ValueError where the layout needs FIM ids that the vocabulary
    lacks."""
    bos: tuple[Label, Ids] = ("bos", _optional(tokenizer.control.bos))
    return _prompt([bos, *_document_spans(tokenizer, parts, layout)], fim_stops(tokenizer))


def fim_training(
    tokenizer: Tokenizer,
    prefix: str,
    middle: str,
    suffix: str,
    path: str | None = None,
    layout: Layout = "psm",
    terminator: Literal["file_separator", "eos"] = "file_separator",
    context: Sequence[File] = (),
) -> Prompt:
    """A training document, without <bos>, behind its context files, as in the prompt of `fim`.

    Layout "prefix" is a document that is not split: it has no suffix.

    Raises ValueError on a suffix in layout "prefix" and on a vocabulary without the control ids."""
    if layout == "prefix" and suffix:
        raise ValueError('layout "prefix" has no place for a suffix: put all text into prefix and middle')
    end = getattr(tokenizer.control, terminator)
    if end is None:
        raise ValueError(f"this vocabulary has no {terminator} to end a document: use CodeGemma's or Gemma's")
    spans = _document_spans(tokenizer, encode_parts(tokenizer, prefix, suffix, path, context), layout)
    spans += [("middle", tokenizer.encode(middle)), ("terminator", [end])]
    return _prompt(spans, fim_stops(tokenizer))


def parse_fim(tokenizer: Tokenizer, ids: Sequence[int]) -> ParsedFim:
    """Parses the ids of `fim_training`, or of `fim` and an answer.

    Context files are skipped, except in layout "prefix", where they raise ValueError: nothing marks where the
    document begins. In that layout all text is the prefix, path included, since nothing marks where the path
    ends. Raises ValueError on an unknown order of FIM tokens and on ids after the document.
    """
    control = tokenizer.control
    body = list(ids)
    if body[:1] == [control.bos]:
        body = body[1:]
    if body and body[-1] in (control.file_separator, control.eos):
        body = body[:-1]
    names = {control.fim_prefix: "prefix", control.fim_suffix: "suffix", control.fim_middle: "middle"}
    marks = [(index, names[token]) for index, token in enumerate(body) if token in names]
    order = tuple(name for _, name in marks)
    layouts: dict[tuple[str, ...], Layout] = {(*parts, "middle"): layout for layout, parts in _ORDERS.items()}
    layout = layouts.get(order) if order else "prefix"
    if layout is None:
        raise ValueError(
            "a FIM document has its tokens in the order prefix, suffix, middle or suffix, prefix, middle; "
            f"these ids have {', '.join(order)}: parse one document at a time"
        )
    start = marks[0][0] if marks else 0
    if control.file_separator in body[start:]:
        raise ValueError("more than one document: split the ids after each file separator")
    if not marks:
        return ParsedFim(tokenizer.decode(body), "", "", None, layout)
    ends = [index for index, _ in marks[1:]] + [len(body)]
    texts = {name: tokenizer.decode(body[i + 1 : end]) for (i, name), end in zip(marks, ends, strict=True)}
    path = body[:start]
    while control.file_separator in path:
        path = path[path.index(control.file_separator) + 1 :]
    return ParsedFim(**texts, path=tokenizer.decode(path).removesuffix("\n") or None, layout=layout)


def plain(tokenizer: Tokenizer, text: str) -> Prompt:
    """<bos> and a text to continue."""
    bos = _optional(tokenizer.control.bos)
    return _prompt([("bos", bos), ("prefix", tokenizer.encode(text))], fim_stops(tokenizer))


def raw(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to continue, whose spelled control tokens become control ids. Adds <bos> if it is missing."""
    ids, bos = tokenizer.encode(text, control=True), _optional(tokenizer.control.bos)
    start = [] if ids[:1] == bos else bos
    return _prompt([("bos", start), ("raw", ids)], fim_stops(tokenizer))


def chat(tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True) -> Prompt:
    """The messages in Gemma's chat template, as the turns that `chat_turns` makes of them.

    `reply` opens a turn for the model to answer in; without it, the prompt is one training example, of which
    the model learns the "reply" spans. Raises ValueError as `chat_turns` does, and on a vocabulary without
    turns.
    """
    control = tokenizer.control
    if control.start_of_turn is None or control.end_of_turn is None:
        raise ValueError("this vocabulary has no <start_of_turn> and <end_of_turn>: it cannot chat")
    newline, model = tokenizer.encode("\n"), tokenizer.encode("model\n")
    spans: list[tuple[Label, Ids]] = [("bos", _optional(control.bos))]
    for turn in chat_turns(messages, reply):
        spans.append(("turn", [control.start_of_turn]))
        if turn.role == "user":
            spans += [("user", tokenizer.encode(f"user\n{turn.text}")), ("turn", [control.end_of_turn])]
        else:
            spans += [("turn", model), ("reply", [*tokenizer.encode(turn.text), control.end_of_turn])]
        spans.append(("turn", newline))
    if reply:
        spans.append(("turn", [control.start_of_turn, *model]))
    return _prompt(spans, chat_stops(tokenizer))


def chat_turns(messages: Sequence[Message], reply: bool = True) -> list[Message]:
    """The messages as turns of user and assistant that alternate, as Gemma was trained; either may be first.

    Texts are stripped. Consecutive messages of one role become one turn, with a blank line between them. A
    system text goes in front of the next user text, with a blank line between them; where none follows, it
    becomes user text at the end. Raises ValueError where there is no turn, or where `reply` is set and the
    last turn is not the user's.
    """
    turns: list[Message] = []
    system = ""
    for message in messages:
        if message.role == "system":
            system += message.text + "\n\n"
            continue
        text = message.text.strip()
        if message.role == "user":
            text, system = system + text, ""
        _add_turn(turns, message.role, text)
    if system.strip():
        _add_turn(turns, "user", system.strip())
    if not turns:
        raise ValueError("a chat must have a message that is not an empty system text: add a user's")
    if reply and turns[-1].role != "user":
        raise ValueError("a chat must end with a user's message for the model to answer: add one")
    return turns


def _add_turn(turns: list[Message], role: Role, text: str) -> None:
    """Appends a turn, or its text to the last turn where that has the same role."""
    if turns and turns[-1].role == role:
        text = "\n\n".join(part for part in (turns.pop().text, text) if part)
    turns.append(Message(role, text))


def tail(tokenizer: Tokenizer, ids: Ids, max_tokens: int, step: int = 1) -> Ids:
    """The last ids, at most `max_tokens`: the part of a prefix that is nearest to the cursor.

    Encoding their text again gives the same ids, as for every run of whole characters in a BPE encoding. The
    number of dropped ids is rounded up to a multiple of `step`, so that the edge rests while text is typed,
    and then to the start of a line, if one lies within the next `max_tokens` / 4 ids.
    """
    if len(ids) <= max_tokens:
        return ids
    drop = -(-(len(ids) - max_tokens) // step) * step
    if drop >= len(ids):
        drop = len(ids) - max_tokens
    near = range(drop, min(len(ids), drop + max_tokens // 4 + 1))
    return ids[_edge(tokenizer, ids, near, range(drop, len(ids)), len(ids)) :]


def head(tokenizer: Tokenizer, ids: Ids, max_tokens: int) -> Ids:
    """The first ids, at most `max_tokens`: the part of a suffix that is nearest to the cursor.

    As in `tail`, the edge is the start of a line if one is near.
    """
    if len(ids) <= max_tokens:
        return ids
    near = range(max_tokens, max_tokens - max_tokens // 4 - 1, -1)
    return ids[: _edge(tokenizer, ids, near, range(max_tokens, 0, -1), 0)]


def _edge(tokenizer: Tokenizer, ids: Ids, near: range, reach: range, default: int) -> int:
    """The first of `near` where a line starts, else of `reach` where a character does, else `default`."""
    for index in near:
        if index > 0 and tokenizer.decode_bytes(ids[index - 1 : index]).endswith(b"\n"):
            return index
    for index in reach:
        if tokenizer.decode_bytes(ids[index : index + 1])[:1] not in _CONTINUATION:
            return index
    return default


def _document_spans(tokenizer: Tokenizer, parts: Parts, layout: Layout) -> list[tuple[Label, Ids]]:
    control = tokenizer.control
    spans: list[tuple[Label, Ids]] = [("context", ids) for ids in parts.context]
    spans += [("path", parts.path)]
    if layout == "prefix":
        return [*spans, ("prefix", parts.prefix)]
    if layout not in _ORDERS:
        raise ValueError(f'layout must be "psm", "spm" or "prefix", got {layout!r}')
    if control.fim is None:
        names = ", ".join(FIM_NAMES.values())
        raise ValueError(f'this vocabulary has no FIM tokens ({names}): use layout="prefix"')
    for part in _ORDERS[layout]:
        sentinel = _optional(getattr(control, f"fim_{part}"))
        spans += [("sentinel", sentinel), (part, getattr(parts, part))]
    return [*spans, ("sentinel", _optional(control.fim_middle))]


def _prompt(spans: list[tuple[Label, Ids]], stops: frozenset[int]) -> Prompt:
    return Prompt(tuple((label, ids) for label, ids in spans if ids), stops)


def _optional(token: int | None) -> Ids:
    return [] if token is None else [token]


def _path_line(tokenizer: Tokenizer, path: str | None) -> Ids:
    if path is not None and ("\n" in path or "\r" in path):
        raise ValueError(f"a path must be one line, got {path!r:.80}: rename the file or leave its path out")
    return tokenizer.encode(path + "\n") if path else []
