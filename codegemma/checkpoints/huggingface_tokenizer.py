"""The tokenizer files of a Hugging Face directory: tokenizer.model or tokenizer.json, and side files.

The side files name tokens that were added to the vocabulary, with an id and, but for added_tokens.json, a flag
whether they are special. The first that names an id decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codegemma.checkpoints.table import written_fields
from codegemma.tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Tokenizer


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
