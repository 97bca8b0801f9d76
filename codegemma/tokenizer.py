"""Text <-> ids: one SentencePiece BPE vocabulary, and control ids that no text can spell.

A vocabulary from any source (GGUF's arrays, `tokenizer.model`, `tokenizer.json`) is turned into one canonical
SentencePiece model, so ids and fingerprint do not depend on the source. In it, all control pieces have the
type CONTROL, which no text matches. (Gemma's own files mark `<start_of_turn>`, the FIM tokens and `<unusedN>`
as user-defined: with them, a text that spells one becomes its id.)
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import operator
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from sentencepiece import SentencePieceProcessor

from codegemma.config import LIMITS
from codegemma.files import atomic_write, cache_dir

Numbers = Sequence[float] | np.ndarray

# Types of pieces, numbered alike in sentencepiece_model.proto and in GGUF's tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
_CONTROL_NAME = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>"
    r"|\[(@BOS@|multimodal)\]|<\|\w+\|>"
)
# Gemma's NormalizerSpec: no space put before the text, none removed, " " -> U+2581. SentencePiece ignores the
# spec's name; we set it to "lines" where no piece spans the end of a line, so that each line can be encoded,
# and cached, alone.
_GEMMA_NORMALIZER = b"\x18\x00\x20\x00"
_SEPARATE_LINES = b"\x0a\x05lines"

_FIM_FIELDS = ("fim_prefix", "fim_middle", "fim_suffix", "file_separator")  # of Control
FIM_NAMES = {field: f"<|{field}|>" for field in _FIM_FIELDS}
FIM_IDS = dict(zip(_FIM_FIELDS, range(67, 71), strict=True))  # CodeGemma's: 67 to 70

# Stands for a blank in pieces; where a text has this character itself, byte pieces spell it.
_BLANK = "\u2581"
_UNUSED_NAME = re.compile(r"<unused\d+>")
_SPELLING = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a control spelling looks like
_LINE = re.compile(rb"[^\n]*\n+|[^\n]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CACHE_VERSION = b"1"
MAX_ADDED = 65_536  # tokens that the JSON files beside a vocabulary may add to it; see `with_added`


@dataclass(frozen=True)
class Control:
    """The control ids of a vocabulary, None where it has none.

    `fim` tells where the four FIM ids come from. "named": the vocabulary spells them (CodeGemma).
    "convention": its ids 67 to 70 are `<unusedN>`, and we use them as CodeGemma does (Gemma 1, 2, 3), though
    the model may not have been trained with them. None: there are none.
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
    """A vocabulary, which `fingerprint` identifies. Immutable, safe to share between threads, and picklable.

    `model` is a canonical ModelProto of SentencePiece, which the class methods make from other sources.
    `end_ids` are the ids that, by a model's files, end every answer; ids outside the vocabulary are left out.
    Raises ValueError where `model` is damaged.
    """

    def __init__(self, model: bytes, end_ids: Iterable[int] = ()) -> None:
        try:
            self._engine = SentencePieceProcessor()
            self._engine.LoadFromSerializedProto(model)
            self.vocab_size: int = self._engine.get_piece_size()
        except (RuntimeError, IndexError, ValueError) as error:
            problem = f"SentencePiece cannot read this vocabulary ({error})"
            raise ValueError(f"tokenizer: {problem}: fetch the tokenizer file again") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.end_ids = frozenset(token for token in end_ids if 0 <= token < self.vocab_size)
        self._piece_bytes: dict[int, bytes] = {}
        self._separate_lines = _SEPARATE_LINES + _GEMMA_NORMALIZER in model[-64:]
        self._encode_line = lru_cache(maxsize=8192)(self._engine.encode)
        blank_ids = [self.token_id(f"<0x{byte:02X}>") for byte in _BLANK.encode()]
        self._blank_ids = [token for token in blank_ids if token is not None and self._engine.is_byte(token)]
        self.control = self._find_control()
        self._fim_ids = {name: getattr(self.control, field) for field, name in FIM_NAMES.items()}

    @classmethod
    def from_pieces(cls, pieces: Sequence[str], scores: Numbers, types: Numbers) -> Tokenizer:
        """From GGUF's tokenizer.ggml.tokens, .scores and .token_type.

        GGUF's add_space_prefix is not read: as with Gemma's own files, `encode` puts no space before a text.
        Takes 0.5 s for 262k pieces: wrap it in `cached`. Raises ValueError where the arrays do not fit
        together.
        """
        return cls(_canonical_model(pieces, scores, _mark_user_defined(pieces, types)))

    @classmethod
    def from_sentencepiece(cls, data: bytes) -> Tokenizer:
        """From the bytes of a `tokenizer.model`. Raises ValueError where it is damaged or not a BPE model."""
        return cls.cached(data, lambda: cls.read(data))

    @classmethod
    def read(cls, data: bytes) -> Tokenizer:
        """As `from_sentencepiece`, but without the cache."""
        return cls(_canonical_model(*_parse_model(data)))

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face `tokenizer.json`. Raises ValueError where it is damaged or its model is not BPE
        with byte fallback."""
        data = Path(path).read_bytes()
        return cls.cached(data, lambda: cls.read_json(data))

    @classmethod
    def read_json(cls, data: bytes) -> Tokenizer:
        """As `from_json`, but from the file's bytes and without the cache."""
        return cls(_read_json(data))

    @classmethod
    def cached(cls, source: bytes, build: Callable[[], Tokenizer]) -> Tokenizer:
        """Returns `build()`, or its result from an earlier call, stored in the user's cache directory.

        `source` is whatever determines the vocabulary, such as the bytes of a file; its hash names the cache
        file. A damaged cache file is rebuilt. Where the directory cannot be written, nothing is stored.
        """
        key = hashlib.sha256(_CACHE_VERSION + source).hexdigest()
        with contextlib.suppress(ValueError):
            if stored := _read_cache(key):
                return cls(stored)
        tokenizer = build()
        _write_cache(key, tokenizer.model)
        return tokenizer

    @property
    def model(self) -> bytes:
        """The vocabulary as a SentencePiece `tokenizer.model`."""
        return bytes(self._engine.serialized_model_proto())

    def pieces(self) -> tuple[list[str], list[float], list[int]]:
        """The names, scores and SentencePiece types of all pieces, in the order of their ids."""
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

    def with_end_ids(self, end_ids: Iterable[int]) -> Tokenizer:
        """The same vocabulary with other ids that end every answer."""
        other = object.__new__(Tokenizer)
        other.__dict__.update(self.__dict__)
        other.end_ids = frozenset(token for token in end_ids if 0 <= token < self.vocab_size)
        return other

    def with_added(self, added: Mapping[int, tuple[str, bool]]) -> Tokenizer:
        """The vocabulary with the tokens that JSON files beside it (tokenizer_config.json, tokenizer.json,
        added_tokens.json) add.

        `added` maps an id to (spelling, special); no text matches a special token. An id may follow the
        vocabulary, or be that of a control, user-defined or unused piece, which then gets the new spelling.
        All other pieces stay as they are. Raises ValueError on an id that is negative or too far behind the
        vocabulary.
        """
        pieces, scores, types, normalizer = _parse_model(self.model)
        first, last = min(added, default=0), max(added, default=0)
        if first < 0:
            raise ValueError(f"an added token has the id {first:,}, but ids begin at 0: the file is damaged")
        if last >= min(len(pieces) + MAX_ADDED, LIMITS["vocab"]):
            rule = f"but at most {MAX_ADDED:,} can follow the vocabulary's {len(pieces):,}"
            raise ValueError(f"an added token has the id {last:,}, {rule}: the file is damaged")
        missing = last + 1 - len(pieces)
        pieces, scores = pieces + [""] * missing, scores + [0.0] * missing
        types = types + [CONTROL] * missing
        for token, (spelling, special) in added.items():
            if types[token] in (CONTROL, USER_DEFINED, UNUSED):
                pieces[token], types[token] = spelling, CONTROL if special else USER_DEFINED
        return Tokenizer(_canonical_model(pieces, scores, types, normalizer), self.end_ids)

    def without_added(self, rows: int) -> Tokenizer:
        """The vocabulary cut to its first `rows` ids (the rows of an embedding), if only added tokens follow.

        Added tokens among the first `rows` ids stay. If ordinary text pieces come after the first `rows` ids,
        the vocabulary belongs to another model and is returned as it is.
        """

        def shortened() -> Tokenizer:
            pieces, scores, types, normalizer = _parse_model(self.model)
            if not {*types[rows:]} <= {CONTROL, USER_DEFINED, UNUSED}:
                return self
            return Tokenizer(_canonical_model(pieces[:rows], scores[:rows], types[:rows], normalizer))

        if self.vocab_size <= rows:
            return self
        return Tokenizer.cached(f"{rows} {self.fingerprint}".encode(), shortened).with_end_ids(self.end_ids)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, frozenset[int]]]:
        return Tokenizer, (self.model, self.end_ids)

    def encode(self, text: str, bos: bool = False, control: bool = False) -> list[int]:
        """The ids of a text, as SentencePiece encodes it. Control tokens spelled in it are plain text, and
        U+2581 is that character, not a blank.

        With `control=True`, spelled control tokens become control ids, for prompts that were rendered
        elsewhere (CodeGemma's FIM names too, where the FIM ids are only a convention). Raises ValueError on a
        lone surrogate, which UTF-8 cannot spell, and on bytes.
        """
        ids = self._encode_raw(text) if control else self._encode_text(text)
        if not bos:
            return ids
        if self.control.bos is None:
            raise ValueError("bos=True, but this vocabulary has no <bos>: pass bos=False")
        return [self.control.bos, *ids]

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD. Control ids give no text, or with
        `control=True` their spelling."""
        return self.decode_bytes(ids, control).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], control: bool = False) -> bytes:
        """The joined bytes of ids; an id's bytes do not depend on its neighbours. For `control` see `decode`.
        Raises ValueError on ids out of range."""
        if not control:
            return b"".join(map(self._decode_piece, ids))
        return b"".join(
            self._spell(token) if self.is_control(token) else self._decode_piece(token) for token in ids
        )

    def piece(self, token: int) -> str:
        """The vocabulary's spelling of an id, with U+2581 for a space. Raises ValueError on an id out of
        range."""
        return self._engine.id_to_piece(self._checked(token))

    def token_id(self, piece: str) -> int | None:
        """The id of the piece or control token with exactly this spelling; None where there is none."""
        token = self._engine.piece_to_id(piece)
        return token if self._engine.id_to_piece(token) == piece else None

    def ids_compatible_with(self, data: bytes) -> np.ndarray:
        """int32 ids of all tokens that a text beginning with `data` may start with: their bytes begin with
        `data`, or `data` begins with their bytes."""
        order = self._byte_order

        def index(part: bytes, find: Callable[..., int] = bisect_left) -> int:
            return find(order, part, key=lambda token: self._decode_piece(int(token)))

        stripped = data.rstrip(b"\xff")
        end = index(stripped[:-1] + bytes([stripped[-1] + 1])) if stripped else len(order)
        parts = (data[:size] for size in range(1, len(data)))
        shorter = [order[index(part) : index(part, bisect_right)] for part in parts]
        return np.concatenate([order[index(data) : end], *shorter])

    @cached_property
    def _byte_order(self) -> np.ndarray:
        """int32 [V]: all ids in the order of their bytes. Sorting takes half a second, so it is cached."""
        name = f"{self.fingerprint}.order"
        stored = _read_cache(name)
        if stored and len(stored) == 4 * self.vocab_size:
            return np.frombuffer(stored, np.int32)
        order = np.array(sorted(range(self.vocab_size), key=self._decode_piece), np.int32)
        _write_cache(name, order.tobytes())
        return order

    def is_control(self, token: int) -> bool:
        """True for ids that no text encodes to: control tokens (also FIM tokens) and the unknown token."""
        token = self._checked(token)
        return self._engine.is_control(token) or self._engine.is_unknown(token)

    def _encode_text(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"text to encode must be a str, got {type(text).__name__}: decode bytes first")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            raise ValueError(f"text has {surrogate}, which UTF-8 cannot spell: replace it") from error
        if self._blank_ids and _BLANK in text:  # SentencePiece would read it as a blank
            first, *others = map(self._encode_text, text.split(_BLANK))
            return first + [token for ids in others for token in (*self._blank_ids, *ids)]
        if not self._separate_lines:
            return self._engine.encode(data)
        ids: list[int] = []
        for line in _LINE.findall(data):  # cached, since a keystroke changes one line only
            ids += self._encode_line(line) if len(line) < 500 else self._engine.encode(line)
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
        if spelling in self._fim_ids:
            return self._fim_ids[spelling]
        token = self.token_id(spelling)
        return token if token is not None and self.is_control(token) else None

    def _spell(self, token: int) -> bytes:
        fim_names = (name for name, fim_id in self._fim_ids.items() if fim_id == token)
        return next(fim_names, self.piece(token)).encode()

    def _decode_piece(self, token: int) -> bytes:
        data = self._piece_bytes.get(token)
        if data is None:
            piece = self.piece(token)
            if self.is_control(token):
                data = b""
            elif self._engine.is_byte(token):
                data = bytes([int(piece[3:5], 16)])
            else:
                data = piece.replace("\u2581", " ").encode()
            self._piece_bytes[token] = data
        return data

    def _checked(self, token: int) -> int:
        try:
            index = operator.index(token)
        except TypeError as error:
            raise ValueError(f"a token id must be a whole number, got {token!r}") from error
        if not 0 <= index < self.vocab_size:
            problem = f"token id {index} is outside the vocabulary of {self.vocab_size:,}"
            raise ValueError(f"{problem}: use the tokenizer that belongs to the model")
        return index

    def _find_control(self) -> Control:
        def control_id(*spellings: str) -> int | None:
            tokens = (self.token_id(spelling) for spelling in spellings)
            return next((token for token in tokens if token is not None and self.is_control(token)), None)

        fim = {field: control_id(name) for field, name in FIM_NAMES.items()}
        source: Literal["named", "convention"] | None = None
        if None not in (fim["fim_prefix"], fim["fim_middle"], fim["fim_suffix"]):
            source = "named"
        elif self.vocab_size > 70 and all(
            _UNUSED_NAME.fullmatch(self.piece(token)) for token in FIM_IDS.values()
        ):
            fim, source = {**FIM_IDS}, "convention"
        names = ("pad", "unk", "start_of_turn", "end_of_turn")
        others = {name: control_id(f"<{name}>") for name in names}
        bos, eos = control_id("<bos>", "<s>"), control_id("<eos>", "</s>")
        return Control(bos=bos, eos=eos, **others, **fim, fim=source)


def without_surrogates(text: str) -> str:
    """The text with UTF-16 surrogate pairs replaced by their characters, and lone surrogates by U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Decodes token by token: the joined texts of `push` and `flush` are `decode` of the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; "" where it ends within a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """U+FFFD for an incomplete last character, or "". Afterwards a new text can begin."""
        return self._decoder.decode(b"", final=True)


def _read_cache(name: str) -> bytes | None:
    """A file of the user's cache directory; None where it is missing or damaged."""
    with contextlib.suppress(OSError):
        stored = (cache_dir() / "tokenizers" / name).read_bytes()
        if hashlib.sha256(stored[32:]).digest() == stored[:32]:
            return stored[32:]
    return None


def _write_cache(name: str, data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError), atomic_write(cache_dir() / "tokenizers" / name) as out:
        out.write(hashlib.sha256(data).digest() + data)


def _canonical_model(
    pieces: Sequence[str], scores: Numbers, types: Numbers, normalizer: bytes = _GEMMA_NORMALIZER
) -> bytes:
    """The canonical ModelProto of a vocabulary. Raises ValueError where the arrays do not fit together."""
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
        problem = f"piece {error.object!r} is no Unicode text"
        raise ValueError(f"tokenizer: {problem}: the file is damaged") from error
    trainer = b"\x18\x02" + (b"\x98\x02\x01" if BYTE in kinds else b"")  # model_type BPE, byte_fallback
    with_newline = [(name, kind) for name, kind in zip(names, kinds, strict=True) if "\n" in name]
    if all(kind == USER_DEFINED and not name.strip("\n") for name, kind in with_newline):
        normalizer = _SEPARATE_LINES + normalizer
    return rows + _field(0x12, trainer) + _field(0x1A, normalizer)


def _mark_user_defined(pieces: Sequence[str], types: Numbers) -> list[int]:
    """The types, corrected: NORMAL pieces before the first byte piece become USER_DEFINED. SentencePiece's
    trainer puts only user-defined pieces there, but Google's GGUF files mark them as NORMAL."""
    first_byte = next((i for i, piece in enumerate(pieces) if _BYTE_NAME.fullmatch(piece)), 0)
    return [USER_DEFINED if i < first_byte and kind == NORMAL else int(kind) for i, kind in enumerate(types)]


def _parse_model(data: bytes) -> tuple[list[str], list[float], list[int], bytes]:
    """Pieces, scores, types and normalizer of a `tokenizer.model`. Raises ValueError on a damaged file and on
    a model that is not BPE.

    ModelProto has the fields 1 pieces, 2 TrainerSpec (whose field 3 is model_type) and 3 NormalizerSpec. It
    is read without the protobuf package, since sentencepiece's generated module would fix its version.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
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
        problem = f"tokenizer.model is no SentencePiece model ({error})"
        raise ValueError(f"{problem}: fetch the file again") from error
    if trainer.get(3, 1) != 2:
        raise ValueError("tokenizer.model is not a BPE model (model_type 2): Gemma's are")
    flags = b"".join(bytes([number << 3, bool(normalizer.get(number, 1))]) for number in (3, 4))
    flags += b"" if normalizer.get(5, 1) else b"\x28\x00"
    charsmap = _field(0x12, normalizer[2]) if normalizer.get(2) else b""
    return pieces, scores, types, charsmap + flags


def _read_json(data: bytes) -> bytes:
    """The canonical ModelProto of a Hugging Face `tokenizer.json`. Raises ValueError where it is damaged or
    its model is not BPE with byte fallback.

    A piece's score is the negative rank of the first merge that makes it. One difference from Hugging Face's
    own encoding remains: that looks for added tokens before it replaces spaces by U+2581, and so never finds
    the tokens of several spaces.
    """
    try:
        document = json.loads(data)
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
            raise ValueError(f"its ids must lie from 0 to {LIMITS['vocab'] - 1:,}")
        score: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            score.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), -rank)
        kinds = {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
        pieces = [names.get(i, "") for i in range(max(names) + 1)]
        scores = [score.get(piece, -len(model["merges"])) for piece in pieces]
        return _canonical_model(pieces, scores, [kinds.get(i, NORMAL) for i in range(len(pieces))])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer.json has wrong fields ({error}): fetch the file again") from error
    except ValueError as error:
        raise ValueError(f"tokenizer.json: {error}") from error


def _canonical_pieces(pieces: Sequence[str], types: list[int]) -> tuple[list[str], list[int]]:
    """Names and types as in Gemma's own tokenizer.model, except that control pieces have the type CONTROL.

    Removes the differences between sources. GGUF files spell the spaces of user-defined pieces as " ", mark
    `<unk>` as CONTROL, and may pad the vocabulary with repeated or empty pieces to the embedding's number of
    rows. Old Gemma files of Hugging Face spell `<0x09>` as a tab.
    """
    names = [piece.replace(" ", "\u2581") for piece in pieces]
    if "<0x09>" not in names and "<0x08>" in names and "\t" in names:
        names[names.index("\t")] = "<0x09>"
    used: set[str] = set()
    kinds = []
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        if not name or name in used:
            names[i], kind = f"[PAD{i}]", CONTROL
        elif name == "<unk>":
            kind = UNKNOWN
        elif _BYTE_NAME.fullmatch(name):
            kind = BYTE
        elif kind in (NORMAL, USER_DEFINED) and _CONTROL_NAME.fullmatch(name):
            kind = CONTROL
        used.add(names[i])
        kinds.append(kind)
    return names, kinds


def _ranks(names: list[str], kinds: list[int], scores_V: np.ndarray) -> np.ndarray:
    """The scores to store: 0, -1, -2, ... for pieces that merges make, since for BPE only their order
    matters; 0 for all others."""
    pairs = enumerate(zip(names, kinds, strict=True))
    merged = [i for i, (name, kind) in pairs if kind in (NORMAL, UNUSED) and len(name) > 1]
    rank_V = np.zeros(len(names), np.float32)
    rank_V[merged] = -np.unique(-scores_V[merged], return_inverse=True)[1]
    return rank_V


def _piece_field(name: str, score: float, kind: int) -> bytes:
    """A piece of a ModelProto: the fields 1 name, 2 score, 3 type."""
    score_and_type = b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
    return _field(0x0A, _field(0x0A, name.encode()) + score_and_type)


def _field(tag: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, varint = len(payload), bytearray()
    while size > 127:
        varint.append(size & 127 | 128)
        size >>= 7
    varint.append(size)
    return bytes([tag]) + bytes(varint) + payload


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: int for a varint, bytes for other types."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        number, wire = divmod(_varint(stream), 8)
        if wire == 0:
            yield number, _varint(stream)
            continue
        size = _varint(stream) if wire == 2 else {1: 8, 5: 4}.get(wire)
        if size is None:
            raise ValueError(f"wire type {wire} at byte {stream.tell()}")
        if size > len(data) - stream.tell():
            raise ValueError(f"a field of {size:,} bytes at byte {stream.tell():,} of {len(data):,}")
        yield number, stream.read(size)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError(f"a number of more than 64 bits at byte {stream.tell()}")
