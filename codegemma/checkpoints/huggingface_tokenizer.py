"""The tokenizer files of a Hugging Face directory: tokenizer.model or tokenizer.json, and side files.

The side files list tokens that were added to the vocabulary: the id and text of each and, except in
added_tokens.json, whether it is special. Where several list the same id, the first of SIDE_FILES counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from codegemma.checkpoints.table import written_fields
from codegemma.checkpoints.untrusted import damaged, parse_json, read_bytes
from codegemma.tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Tokenizer

SIDE_FILES = ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")


def builder(directory: Path) -> Callable[[], Tokenizer] | None:
    """A function that builds the tokenizer of a directory; None where it has no vocabulary file."""
    if not any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    return lambda: _load(directory)


def _load(directory: Path) -> Tokenizer:
    files = [directory / name for name in ("tokenizer.model", *SIDE_FILES)]
    data = {file.name: read_bytes(file) for file in files if file.exists()}

    def build() -> Tokenizer:
        model = data.get("tokenizer.model")
        tokenizer = Tokenizer.read_json(data["tokenizer.json"]) if model is None else Tokenizer.read(model)
        added: dict[int, tuple[str, bool]] = {}
        for name in SIDE_FILES:
            if name in data:
                for token, content, special in _added(directory / name, data[name]):
                    added.setdefault(token, (content, special))
        return tokenizer.with_added(added) if added else tokenizer

    if data.keys() == {"tokenizer.model"}:
        return Tokenizer.from_sentencepiece(data["tokenizer.model"])
    tokenizer = Tokenizer.cached(b"".join(name.encode() + raw for name, raw in data.items()), build)
    end = _named_end(directory / "tokenizer_config.json", data.get("tokenizer_config.json", b"{}"))
    token = None if end is None else tokenizer.token_id(end)
    return tokenizer if token is None else tokenizer.with_end_ids([token])


def _named_end(file: Path, raw: bytes) -> str | None:
    """The text of `eos_token` in a tokenizer_config.json, where that may be an object with `content`."""
    fields = parse_json(file, raw)
    end = fields.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def _added(file: Path, raw: bytes) -> Iterator[tuple[int, str, bool]]:
    """Id, text and special flag of each token that a side file lists. Raises ValueError on wrong fields."""
    try:
        fields = json.loads(raw)
        if file.name == "added_tokens.json":
            entries = [(token, content, True) for content, token in fields.items()]
        elif file.name == "tokenizer.json":
            tokens = fields.get("added_tokens") or []
            entries = [(token["id"], token["content"], token.get("special", False)) for token in tokens]
        else:
            tokens = fields.get("added_tokens_decoder") or {}
            entries = [
                (int(key), token["content"], token.get("special", False)) for key, token in tokens.items()
            ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"{file}: does not list its added tokens as ids and texts ({error!r})") from None
    for token, content, special in entries:
        if type(token) is not int or not isinstance(content, str):
            raise damaged(f"{file}: an added token has the id {token!r} and the text {content!r}")
        yield token, content, bool(special)


def _added_token(content: str, special: bool) -> dict[str, Any]:
    return written_fields("hf_added_token") | {"content": content, "special": special}


def _fim_ids(tokenizer: Tokenizer) -> tuple[int | None, ...]:
    control = tokenizer.control
    return control.fim_prefix, control.fim_middle, control.fim_suffix, control.file_separator


def config_fields(tokenizer: Tokenizer, template: str | None) -> dict[str, Any]:
    """A tokenizer_config.json: control tokens are added tokens, and special except those of FIM."""
    control, fim = tokenizer.control, _fim_ids(tokenizer)
    named = {"bos": control.bos, "eos": control.eos, "pad": control.pad, "unk": control.unk}
    control_ids = (*fim, *named.values(), control.start_of_turn, control.end_of_turn)
    ids = sorted({token for token in control_ids if token is not None})
    names = {f"{key}_token": tokenizer.piece(token) for key, token in named.items() if token is not None}
    added = {str(token): _added_token(tokenizer.piece(token), token not in fim) for token in ids}
    fields = written_fields("hf_tokenizer_config") | names | {"added_tokens_decoder": added}
    return fields | ({"chat_template": template} if template else {})


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json, since transformers reads tokenizer.model only where protobuf is installed."""
    pieces, scores, types = tokenizer.pieces()
    ids = {piece: token for token, piece in enumerate(pieces)}
    merges = [
        (-scores[token], token, ids[piece[:split]], ids[piece[split:]])
        for token, piece in enumerate(pieces)
        if types[token] in (NORMAL, USER_DEFINED)
        for split in range(1, len(piece))
        if piece[:split] in ids and piece[split:] in ids
    ]
    document, fim = written_fields("hf_tokenizer"), _fim_ids(tokenizer)
    document["added_tokens"] = [
        {"id": token, **_added_token(pieces[token], type != USER_DEFINED and token not in fim)}
        for token, type in enumerate(types)
        if type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    document["post_processor"] |= _begin_token(pieces, tokenizer.control.bos)
    document["model"]["vocab"] = ids
    document["model"]["merges"] = [(pieces[left], pieces[right]) for *_, left, right in sorted(merges)]
    return document


def _begin_token(pieces: Sequence[str], bos: int | None) -> dict[str, Any]:
    """The fields of a TemplateProcessing that puts the begin token (often <bos>) before each text."""
    name = "<bos>" if bos is None else pieces[bos]
    first, second = (
        [{"SpecialToken": {"id": name, "type_id": i}}, {"Sequence": {"id": text, "type_id": i}}]
        for i, text in enumerate("AB")
    )
    tokens = {name: {"id": name, "ids": [bos], "tokens": [name]}}
    return {"single": first, "pair": first + second, "special_tokens": tokens}
