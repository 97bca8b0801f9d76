"""Text <-> ids: one SentencePiece BPE vocabulary, and control ids that no text can spell.

Every source (GGUF's arrays, `tokenizer.model`, `tokenizer.json`) becomes one canonical SentencePiece model,
so ids and fingerprint do not depend on it. In it control pieces are CONTROL, which text never matches: Gemma
marks `<start_of_turn>`, the FIM tokens and `<unusedN>` as user-defined, and SentencePiece matches these
inside text.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import operator
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentencepiece import SentencePieceProcessor

from codegemma.config import LIMITS
from codegemma.files import atomic_write, cache_dir

# Types of pieces, numbered alike in sentencepiece_model.proto and in GGUF's tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CONTROL = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>"
    r"|\[(@BOS@|multimodal)\]|<\|\w+\|>"
)
# NormalizerSpec: no dummy space, no space removed, " " -> U+2581, as Gemma's. The free-form name says that no
# piece reaches across the end of a line, so that lines can be encoded, and remembered, one by one.
_GEMMA_NORMALIZER = b"\x18\x00\x20\x00"
_SEPARATE_LINES = b"\x0a\x05lines"

FIM_NAMES = {
    "fim_prefix": "<|fim_prefix|>",
    "fim_middle": "<|fim_middle|>",
    "fim_suffix": "<|fim_suffix|>",
    "file_separator": "<|file_separator|>",
}
FIM_IDS = {"fim_prefix": 67, "fim_middle": 68, "fim_suffix": 69, "file_separator": 70}  # CodeGemma's

_UNUSED = re.compile(r"<unused\d+>")
_SPELLING = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a control spelling looks like
_LINE = re.compile(rb"[^\n]*\n+|[^\n]+")
_CACHE_VERSION = b"1"


@dataclass(frozen=True)
class Control:
    """Ids that steer the model, None where the vocabulary has none.

    `fim` tells where the four FIM ids come from: "named", the vocabulary spells them (CodeGemma);
    "convention", its ids 67 to 70 are `<unusedN>` and stand in for CodeGemma's (Gemma 1, 2, 3), which says
    nothing of training; None, no FIM.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    start_of_turn: int | None
    end_of_turn: int | None
    fim_prefix: int | None
    fim_middle: int | None
    fim_suffix: int | None
    file_separator: int | None
    fim: Literal["named", "convention"] | None


class Tokenizer:
    """Immutable and safe to share between threads; pickles as its vocabulary. `fingerprint` names the
    vocabulary.

    Raises ValueError where `model` (bytes of a SentencePiece ModelProto, made by the constructors below) is
    damaged.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._engine = SentencePieceProcessor()
            self._engine.LoadFromSerializedProto(model)
            self.vocab_size: int = self._engine.get_piece_size()
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"tokenizer: SentencePiece cannot read this vocabulary ({error}): "
                "fetch the tokenizer file again"
            ) from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._bytes: dict[int, bytes] = {}
        self._separate_lines = _has_separate_lines(model)
        self._remember_line = lru_cache(maxsize=8192)(self._engine.encode)
        self.control = self._find_control()

    @classmethod
    def from_pieces(
        cls, pieces: Sequence[str], scores: Sequence[float] | np.ndarray, types: Sequence[int] | np.ndarray
    ) -> Tokenizer:
        """From GGUF's tokenizer.ggml.tokens, .scores and .token_type, without a dummy space in front of the
        text.

        About 0.5 s for 262k pieces: wrap it in `cached`. Raises ValueError where the arrays contradict each
        other.
        """
        return cls(_canonical_model(pieces, scores, _mark_user_defined(pieces, types)))

    @classmethod
    def from_sentencepiece(cls, data: bytes) -> Tokenizer:
        """From the bytes of a `tokenizer.model`. Raises ValueError where it is damaged or no BPE model."""
        return cls.cached(data, lambda: cls(_read_sentencepiece(data)))

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> Tokenizer:
        """From a Hugging Face `tokenizer.json`, by path or parsed. Raises ValueError on all but byte BPE."""
        if isinstance(source, dict):
            return cls(_read_json(source))
        data = Path(source).read_bytes()
        return cls.cached(data, lambda: cls(_read_json(data)))

    @classmethod
    def cached(cls, source: bytes, build: Callable[[], Tokenizer]) -> Tokenizer:
        """What `build()` gives, kept in the user's cache directory under the hash of `source`.

        `source` is whatever determines the vocabulary, such as the bytes of a file. A damaged cache file is
        rebuilt; a directory that cannot be written is no error.
        """
        key = hashlib.sha256(_CACHE_VERSION + source).hexdigest()
        file = cache_dir() / "tokenizers" / key
        with contextlib.suppress(OSError, ValueError):
            stored = file.read_bytes()
            if hashlib.sha256(stored[32:]).digest() == stored[:32]:
                return cls(stored[32:])
        tokenizer = build()
        model = tokenizer._engine.serialized_model_proto()
        with contextlib.suppress(OSError), atomic_write(file) as out:
            out.write(hashlib.sha256(model).digest() + model)
        return tokenizer

    @property
    def model(self) -> bytes:
        """The vocabulary as a SentencePiece `tokenizer.model`."""
        return bytes(self._engine.serialized_model_proto())

    def pieces(self) -> tuple[list[str], list[float], list[int]]:
        """Names, scores and SentencePiece types of all ids."""
        engine, ids = self._engine, range(self.vocab_size)
        kinds = {
            UNKNOWN: engine.is_unknown,
            CONTROL: engine.is_control,
            UNUSED: engine.is_unused,
            BYTE: engine.is_byte,
        }
        types = [next((kind for kind, matches in kinds.items() if matches(i)), NORMAL) for i in ids]
        names = [engine.id_to_piece(i) for i in ids]
        return names, [engine.get_score(i) for i in ids], _mark_user_defined(names, types)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model,)

    def encode(self, text: str, bos: bool = False, control: bool = False) -> list[int]:
        """Ids of `text`, as SentencePiece gives them; a control token spelled in it is plain text.

        `control=True` is for clients that render prompts themselves: control spellings become control ids
        (the FIM names also where the ids are FIM by convention). Raises ValueError for a lone surrogate: it
        has no UTF-8.
        """
        start = [self._required_bos()] if bos else []
        return start + (self._encode_raw(text) if control else self._encode_text(text))

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD; control ids vanish, or show with
        `control=True`."""
        return self.decode_bytes(ids, control).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], control: bool = False) -> bytes:
        """Bytes of `ids`, piece by piece: needs no context. Raises ValueError on ids out of range."""
        if not control:
            return b"".join(map(self._piece_bytes, ids))
        return b"".join(
            self._spell(token) if self.is_control(token) else self._piece_bytes(token) for token in ids
        )

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id, with U+2581 for a space. ValueError: id out of range."""
        return self._engine.id_to_piece(self._checked(token))

    def token_id(self, piece: str) -> int | None:
        """The id of a piece, control pieces too, as the vocabulary spells it; None where there is none."""
        token = self._engine.piece_to_id(piece)
        return token if self._engine.id_to_piece(token) == piece else None

    def is_control(self, token: int) -> bool:
        """True for ids no text encodes to: control tokens, the unknown token, and FIM ids."""
        token = self._checked(token)
        return self._engine.is_control(token) or self._engine.is_unknown(token)

    def _encode_text(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"text to encode must be a str, got {type(text).__name__}: decode bytes first")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text to encode has a lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which UTF-8 cannot spell: replace it"
            ) from error
        if not self._separate_lines:
            return self._engine.encode(data)
        ids: list[int] = []
        for line in _LINE.findall(data):  # while one types, all lines but one are remembered
            ids += self._remember_line(line) if len(line) < 500 else self._engine.encode(line)
        return ids

    def _encode_raw(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in _SPELLING.finditer(text):
            token = self._control_id(match.group())
            if token is not None:
                ids += [*self._encode_text(text[start : match.start()]), token]
                start = match.end()
        return ids + self._encode_text(text[start:])

    def _control_id(self, spelling: str) -> int | None:
        for field, name in FIM_NAMES.items():
            if spelling == name:
                return getattr(self.control, field)
        token = self.token_id(spelling)
        return token if token is not None and self.is_control(token) else None

    def _spell(self, token: int) -> bytes:
        for field, name in FIM_NAMES.items():
            if token == getattr(self.control, field):
                return name.encode()
        return self.piece(token).encode()

    def _piece_bytes(self, token: int) -> bytes:
        data = self._bytes.get(token)
        if data is None:
            piece = self.piece(token)
            if self.is_control(token):
                data = b""
            elif self._engine.is_byte(token):
                data = bytes([int(piece[3:5], 16)])
            else:
                data = piece.replace("\u2581", " ").encode()
            self._bytes[token] = data
        return data

    def _checked(self, token: int) -> int:
        try:
            index = operator.index(token)
        except TypeError as error:
            raise ValueError(f"a token id must be a whole number, got {token!r}") from error
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"token id {index} is outside the vocabulary of {self.vocab_size:,}: "
                "use the tokenizer that belongs to the model"
            )
        return index

    def _required_bos(self) -> int:
        if self.control.bos is None:
            raise ValueError("bos=True, but this vocabulary has no <bos>: pass bos=False")
        return self.control.bos

    def _find_control(self) -> Control:
        def named(*spellings: str) -> int | None:
            tokens = (self.token_id(spelling) for spelling in spellings)
            return next((token for token in tokens if token is not None and self.is_control(token)), None)

        fim = {field: named(name) for field, name in FIM_NAMES.items()}
        source: Literal["named", "convention"] | None = None
        if None not in (fim["fim_prefix"], fim["fim_middle"], fim["fim_suffix"]):
            source = "named"
        elif self.vocab_size > 70 and all(_UNUSED.fullmatch(self.piece(token)) for token in FIM_IDS.values()):
            fim, source = {**FIM_IDS}, "convention"
        return Control(
            named("<bos>", "<s>"),
            named("<eos>", "</s>"),
            named("<pad>"),
            named("<unk>"),
            named("<start_of_turn>"),
            named("<end_of_turn>"),
            **fim,
            fim=source,
        )


class StreamDecoder:
    """Decodes token by token: the texts of `push` and `flush`, joined, are `decode` of the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: never half a character, so it may be ""."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """U+FFFD for a character left unfinished, or ""; the stream can be used again."""
        return self._decoder.decode(b"", final=True)


def _has_separate_lines(model: bytes) -> bool:
    """Whether no piece of a canonical model reaches across the end of a line."""
    return _SEPARATE_LINES + _GEMMA_NORMALIZER in model[-64:]


def _canonical_model(
    pieces: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    types: Sequence[int] | np.ndarray,
    normalizer: bytes = _GEMMA_NORMALIZER,
) -> bytes:
    """The canonical ModelProto of pieces. Raises ValueError where the arrays contradict each other."""
    V = len(pieces)
    if not 0 < V <= LIMITS["vocab"] or not V == len(scores) == len(types):
        raise ValueError(
            f"tokenizer: pieces, scores and types must be equally many, 1 to {LIMITS['vocab']:,}; "
            f"got {V:,}, {len(scores):,} and {len(types):,}: the file is damaged"
        )
    scores_V, types_V = np.asarray(scores, np.float64), np.asarray(types, np.int64)
    if not np.isfinite(scores_V).all() or not ((types_V >= NORMAL) & (types_V <= BYTE)).all():
        raise ValueError("tokenizer: scores must be finite and types from 1 to 6: the file is damaged")
    names, kinds = _canonical_pieces(pieces, types_V.tolist())
    rank_V = _ranks(names, kinds, scores_V)
    try:
        rows = b"".join(map(_piece_field, names, rank_V.tolist(), kinds))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"tokenizer: piece {error.object!r} is no Unicode text: the file is damaged"
        ) from error
    trainer = b"\x18\x02" + (b"\x98\x02\x01" if BYTE in kinds else b"")  # model_type BPE, byte_fallback
    with_newline = [(name, kind) for name, kind in zip(names, kinds, strict=True) if "\n" in name]
    if all(kind == USER_DEFINED and not name.strip("\n") for name, kind in with_newline):
        normalizer = _SEPARATE_LINES + normalizer
    return rows + _field(0x12, trainer) + _field(0x1A, normalizer)


def _mark_user_defined(pieces: Sequence[str], types: Sequence[int] | np.ndarray) -> list[int]:
    """Types with the user-defined pieces that Google's own GGUF files mark as NORMAL: SentencePiece's trainer
    writes them before the bytes, and learned pieces after."""
    first_byte = next((i for i, piece in enumerate(pieces) if _BYTE.fullmatch(piece)), 0)
    return [USER_DEFINED if i < first_byte and kind == NORMAL else int(kind) for i, kind in enumerate(types)]


def _read_sentencepiece(data: bytes) -> bytes:
    """The canonical ModelProto of a `tokenizer.model`; its normaliser is kept. Raises ValueError on a damaged
    file and on a model that is not BPE.

    ModelProto has the fields 1 pieces, 2 TrainerSpec (3 model_type), 3 NormalizerSpec. It is read without
    protobuf's run time, whose version sentencepiece's generated module would otherwise dictate to every other
    package.
    """
    pieces, scores, types = [], [], []
    specs: dict[int, bytes] = {2: b"", 3: b""}
    try:
        for number, block in _fields(data):
            if number == 1:
                piece = dict(_fields(block))
                pieces.append(piece.get(1, b"").decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, NORMAL))
            elif number in specs:
                specs[number] = block
        trainer, normalizer = dict(_fields(specs[2])), dict(_fields(specs[3]))
    except (struct.error, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"tokenizer.model is no SentencePiece model ({error}): fetch the file again"
        ) from error
    if trainer.get(3, 1) != 2:
        raise ValueError("tokenizer.model is not a BPE model (model_type 2): Gemma's are")
    flags = b"".join(bytes([number << 3, bool(normalizer.get(number, 1))]) for number in (3, 4))
    flags += b"" if normalizer.get(5, 1) else b"\x28\x00"
    charsmap = _field(0x12, normalizer[2]) if normalizer.get(2) else b""
    return _canonical_model(pieces, scores, types, charsmap + flags)


def _read_json(source: bytes | dict[str, Any]) -> bytes:
    """The canonical ModelProto of a Hugging Face `tokenizer.json`, as bytes or parsed. Raises ValueError on
    any but BPE with byte fallback.

    It keeps ranks of merges where SentencePiece keeps scores of pieces: the first merge that makes a piece
    gives its score. Not copied: it looks for added tokens before normalisation, and so misses runs of spaces.
    """
    try:
        document = source if isinstance(source, dict) else json.loads(source)
    except ValueError as error:
        raise ValueError(f"tokenizer.json is not JSON ({error}): fetch the file again") from error
    try:
        model, added = document["model"], document.get("added_tokens") or []
        if model["type"] != "BPE" or not model.get("byte_fallback"):
            raise ValueError("its model must be BPE with byte_fallback, as Gemma's are")
        if document.get("normalizer") != {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            raise ValueError('its normalizer must only replace " " by U+2581, as Gemma\'s does')
        names = {token: piece for piece, token in model["vocab"].items()}
        names |= {token["id"]: token["content"] for token in added}
        if not names or not 0 <= min(names) <= max(names) < LIMITS["vocab"]:
            raise ValueError(f"its ids must lie from 0 to {LIMITS['vocab']:,}")
        score: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            score.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), -rank)
        kinds = {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
        pieces = [names.get(i, "") for i in range(max(names) + 1)]
        scores = [score.get(piece, -len(model["merges"])) for piece in pieces]
        return _canonical_model(pieces, scores, [kinds.get(i, NORMAL) for i in range(len(pieces))])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer.json lacks or misuses {error}: fetch the file again") from error
    except ValueError as error:
        raise ValueError(f"tokenizer.json: {error}") from error


def _canonical_pieces(pieces: Sequence[str], types: list[int]) -> tuple[list[str], list[int]]:
    """Names and types as Gemma's own tokenizer.model has them, except that control pieces are CONTROL.

    Undone here: GGUF files spell user-defined spaces as " ", mark `<unk>` as CONTROL, and may pad the
    vocabulary to the embedding's rows with repeated or empty pieces; old Gemma files of Hugging Face spell
    `<0x09>` as a tab.
    """
    names = [piece.replace(" ", "\u2581") for piece in pieces]
    if "<0x09>" not in names and "<0x08>" in names and "\t" in names:
        names[names.index("\t")] = "<0x09>"
    known: set[str] = set()
    kinds = []
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        if not name or name in known:
            names[i], kind = f"[PAD{i}]", CONTROL
        elif name == "<unk>":
            kind = UNKNOWN
        elif _BYTE.fullmatch(name):
            kind = BYTE
        elif kind in (NORMAL, USER_DEFINED) and _CONTROL.fullmatch(name):
            kind = CONTROL
        known.add(names[i])
        kinds.append(kind)
    return names, kinds


def _ranks(names: list[str], kinds: list[int], scores_V: np.ndarray) -> np.ndarray:
    """Scores 0, -1, -2, ... in the order of `scores_V` for the pieces BPE can merge: only order matters."""
    pairs = enumerate(zip(names, kinds, strict=True))
    merged = [i for i, (name, kind) in pairs if kind in (NORMAL, UNUSED) and len(name) > 1]
    rank_V = np.zeros(len(names), np.float32)
    rank_V[merged] = -np.unique(-scores_V[merged], return_inverse=True)[1]
    return rank_V


def _piece_field(name: str, score: float, kind: int) -> bytes:
    return _field(
        0x0A, _field(0x0A, name.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
    )


def _field(tag: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, varint = len(payload), bytearray()
    while size > 127:
        varint.append(size & 127 | 128)
        size >>= 7
    varint.append(size)
    return bytes([tag]) + bytes(varint) + payload


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: int for a varint, bytes for anything longer."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        wire = key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {offset}")
        size, offset = _varint(data, offset) if wire == 2 else ({1: 8, 5: 4}[wire], offset)
        if offset + size > len(data):
            raise ValueError(f"a field of {size:,} bytes at byte {offset:,} of {len(data):,}")
        yield key >> 3, data[offset : offset + size]
        offset += size


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A varint and the offset after it."""
    value = shift = 0
    while shift < 64:
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
        shift += 7
    raise ValueError(f"a number of more than 64 bits at byte {offset}")
