"""A tokenizer in the files that transformers reads: tokenizer_config.json, tokenizer.json, and Gemma's chat template."""

from __future__ import annotations

from typing import Any

from codegemma.tokenizer import Tokenizer

# Gemma's turns, as prompts.chat builds them; a system text goes before the first user's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' "
    "+ (first if loop.first else '') + (turn['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece's types of pieces


def _added_token(content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special, **flags}


def _fim_ids(tokenizer: Tokenizer) -> tuple[int | None, ...]:
    control = tokenizer.control
    return control.fim_prefix, control.fim_middle, control.fim_suffix, control.file_separator


def config_fields(tokenizer: Tokenizer, template: str | None) -> dict[str, Any]:
    """A tokenizer_config.json: the control pieces are added tokens, the FIM ones not special, as published."""
    control, fim = tokenizer.control, _fim_ids(tokenizer)
    named = {"bos": control.bos, "eos": control.eos, "pad": control.pad, "unk": control.unk}
    steering = (*fim, *named.values(), control.start_of_turn, control.end_of_turn)
    ids = sorted({token for token in steering if token is not None})
    added = {str(token): _added_token(tokenizer.piece(token), token not in fim) for token in ids}
    names = {f"{key}_token": tokenizer.piece(token) for key, token in named.items() if token is not None}
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **names,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "sp_model_kwargs": {},
        "use_default_system_prompt": False,
        **({"chat_template": template} if template else {}),
    }


def _template(bos: str, sequence: str, type_id: int) -> list[dict[str, Any]]:
    """A text with <bos> before it, for the post-processor."""
    return [
        {"SpecialToken": {"id": bos, "type_id": type_id}},
        {"Sequence": {"id": sequence, "type_id": type_id}},
    ]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json with the same merges: transformers reads tokenizer.model only where protobuf is installed."""
    pieces, scores, types = tokenizer.pieces()
    ids = {piece: token for token, piece in enumerate(pieces)}
    merges = [
        (-scores[token], token, ids[piece[:split]], ids[piece[split:]])
        for token, piece in enumerate(pieces)
        if types[token] in (NORMAL, USER_DEFINED)
        for split in range(1, len(piece))
        if piece[:split] in ids and piece[split:] in ids
    ]
    bos, space, metaspace = tokenizer.control.bos, {"String": " "}, "\u2581"
    name = "<bos>" if bos is None else pieces[bos]
    first = _template(name, "A", 0)
    added = [token for token, type in enumerate(types) if type in (UNKNOWN, CONTROL, USER_DEFINED)]
    fim = _fim_ids(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, **_added_token(pieces[token], types[token] != USER_DEFINED and token not in fim)}
            for token in added
        ],
        "normalizer": {"type": "Replace", "pattern": space, "content": metaspace},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": space,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + _template(name, "B", 1),
            "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": metaspace}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [(pieces[left], pieces[right]) for *_, left, right in sorted(merges)],
        },
    }
