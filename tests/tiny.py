"""Tiny random models: configs of each architecture, weights, adapters, files, and a plain block decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.adapters.adapter import LINEAR, Adapter
from codegemma.checkpoints import gguf, gguf_model, huggingface, safetensors, table
from codegemma.checkpoints.table import tensor_locations
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, Tensor, row_bytes
from codegemma.config import ModelConfig

_MQA = ModelConfig(
    "gemma", layers=3, width=96, heads=4, kv_heads=1, head_width=32, ffn_width=160, vocab=515, context=512
)
_GEMMA3 = replace(
    _MQA,
    architecture="gemma3",
    layers=7,
    rope_base=1e6,
    window=8,
    global_every=6,
    qk_norm=True,
    post_norms=True,
)
KINDS = {
    "gemma-mqa": _MQA,
    "gemma-mha": replace(_MQA, kv_heads=4),
    "gemma2": replace(
        _MQA,
        architecture="gemma2",
        layers=4,
        kv_heads=2,
        window=8,
        global_every=2,
        post_norms=True,
        attention_softcap=50.0,
        final_softcap=30.0,
    ),
    "gemma3": _GEMMA3,
}


def tiny_config(kind: str, **changes: Any) -> ModelConfig:
    """One of KINDS, with changes (K-quants need widths that are multiples of 256)."""
    return replace(KINDS[kind], **{"query_scale": 0.0} | changes)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by our names, scaled like a trained model's; norm factors, 1 + w, are near 1."""
    rng = np.random.default_rng(seed)
    return {
        location.name: (
            rng.normal(1.0, 0.1, location.shape)
            if location.is_norm
            else rng.normal(0.0, location.shape[-1] ** -0.5, location.shape)
        ).astype(np.float32)
        for location in tensor_locations(config, "gguf")
    }


def encode(values: np.ndarray, type: str, seed: int = 0) -> Tensor:
    """`values` in an unquantised type; for a quantised type, random valid blocks of about the same size."""
    values = np.ascontiguousarray(values, np.float32)
    if type == "F32":
        return ArrayTensor.of(values)
    if type == "F16":
        return ArrayTensor("F16", values.shape, values.astype("<f2").view(np.uint8))
    if type == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        return ArrayTensor("BF16", values.shape, rounded.view(np.uint8))
    return random_blocks(type, values.shape, float(values.std()), seed)


# Where the scales lie in a block, and the standard deviation that a scale of 1 gives random blocks.
SCALES = {
    "Q4_0": ((0,), 4.6),
    "Q4_1": ((0, 2), 4.6),
    "Q5_0": ((0,), 9.2),
    "Q5_1": ((0, 2), 9.2),
    "Q8_0": ((0,), 74.0),
    "Q4_K": ((0, 2), 170.0),
    "Q5_K": ((0, 2), 350.0),
    "Q6_K": ((208,), 1370.0),
    "IQ4_NL": ((0,), 66.0),
    "MXFP4": ((0,), 5.9),
    "Q2_K": ((80, 82), 18.0),
    "Q3_K": ((108,), 43.0),
    "IQ4_XS": ((0,), 1210.0),
}


def random_blocks(type: str, shape: tuple[int, ...], std: float = 1.0, seed: int = 0) -> Tensor:
    """Blocks of random bytes whose scales, d and the minimum, are small numbers of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], row_bytes(type, shape[-1])), np.uint8)
    blocks = raw.reshape(-1, BLOCKS[type][1])
    offsets, unit = SCALES[type]
    for offset in offsets:
        put_scales(type, blocks, offset, rng.normal(0.0, std / unit, len(blocks)))
    return ArrayTensor(type, shape, raw)


def put_scales(type: str, blocks: np.ndarray, offset: int, scales: np.ndarray) -> None:
    """Writes a scale into each block: a float16, or for MXFP4 the exponent of the nearest power of two."""
    if type == "MXFP4":
        blocks[:, 0] = 128 + np.rint(np.log2(np.maximum(np.abs(scales), 2.0**-126)))
    else:
        blocks[:, offset : offset + 2] = scales.astype("<f2")[:, None].view(np.uint8)


def get_scales(type: str, blocks: np.ndarray, offset: int) -> np.ndarray:
    """float32 [...]: what `put_scales` wrote into blocks [..., bytes]."""
    if type == "MXFP4":
        return np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128)
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0].astype(np.float32)


def fitting(type: str, width: int) -> str:
    """The type, or its substitute where blocks do not fill a row, as llama.cpp's quantiser chooses it."""
    return next(name for name in (type, "Q8_0", "F32") if width % BLOCKS[name][0] == 0)


def tiny_tensors(config: ModelConfig, type: str = "F32", seed: int = 0) -> dict[str, Tensor]:
    """`random_weights` as tensors: norms F32, matrices of `type` where it fits."""
    return {
        name: encode(values, "F32" if values.ndim == 1 else fitting(type, values.shape[-1]), seed + index)
        for index, (name, values) in enumerate(random_weights(config, seed).items())
    }


def tiny_pieces(config: ModelConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Pieces, scores and types of a small vocabulary: Gemma's control ids, all bytes, printable ASCII."""
    turn = 105 if config.architecture == "gemma3" else 106
    special = {
        0: "<pad>",
        1: "<eos>",
        2: "<bos>",
        3: "<unk>",
        4: "<mask>",
        turn: "<start_of_turn>",
        turn + 1: "<end_of_turn>",
    }
    if config.architecture == "gemma":
        special |= {
            67: "<|fim_prefix|>",
            68: "<|fim_middle|>",
            69: "<|fim_suffix|>",
            70: "<|file_separator|>",
        }
    pieces = [special.get(token, f"<unused{token}>") for token in range(108)]
    kinds = [2 if token == 3 else 3 if token in (0, 1, 2, 4) else 4 for token in range(108)]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    merged = [
        "▁▁",
        "▁▁▁▁",
        "\n\n",
        "re",
        "tu",
        "rn",
        "retu",
        "return",
        "de",
        "def",
        "▁def",
        "▁return",
        "in",
        "th",
        "er",
    ]
    normal = (letters + merged)[: config.vocab - len(pieces) - 256]
    normal += [f"~{number}" for number in range(config.vocab - len(pieces) - 256 - len(normal))]
    scores = [0.0] * (len(pieces) + 256) + [-float(rank) for rank in range(len(normal))]
    kinds += [6] * 256 + [1] * len(normal)
    return pieces + byte_pieces + normal, np.array(scores, "<f4"), np.array(kinds, "<i4")


def tokenizer_metadata(config: ModelConfig) -> dict[str, Any]:
    pieces, scores, kinds = tiny_pieces(config)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def write_tiny_gguf(
    path: Path,
    config: ModelConfig,
    type: str = "F32",
    seed: int = 0,
    tokenizer: bool = True,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """A GGUF that we and llama.cpp load. `tensors` replaces `tiny_tensors(config, type, seed)`."""
    stored = table.to_format("gguf", config, tensors or tiny_tensors(config, type, seed))
    metadata = gguf_model.config_metadata(config) | (tokenizer_metadata(config) if tokenizer else {})
    gguf.write(path, metadata, stored)
    return path


def write_tiny_hf(
    path: Path,
    config: ModelConfig,
    type: str = "F32",
    seed: int = 0,
    shards: int = 1,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """A Hugging Face directory without a tokenizer, in `shards` files."""
    stored = table.to_format("hf", config, tensors or tiny_tensors(config, type, seed))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(huggingface.config_fields(config)))
    if shards == 1:
        safetensors.write(path / "model.safetensors", stored)
        return path
    files = {
        name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(stored)
    }
    for file in set(files.values()):
        safetensors.write(path / file, {name: stored[name] for name in stored if files[name] == file})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def dequantize(tensor: Tensor) -> np.ndarray:
    """float32 values of any type; those of blocks by the gguf package."""
    if tensor.type in ("F32", "F16", "BF16"):
        return tensor.float32()
    import gguf as peer  # only here, as the programs of other tests run without it

    return peer.dequantize(tensor.data, peer.GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def random_adapter(
    config: ModelConfig,
    seed: int = 0,
    kinds: Sequence[str] = LINEAR,
    ranks: Sequence[int] = (4,),
    tokens: Sequence[int] = (),
    alpha: float = 8.0,
    name: str = "tiny",
) -> Adapter:
    """An adapter that moves logits by about as much as they are; layer i has rank ranks[i % len(ranks)]."""
    rng = np.random.default_rng(seed)
    rank, a, b = max(ranks), {}, {}
    for location in tensor_locations(config, "hf"):
        layer, _, kind = location.name.removeprefix("layers.").partition(".")
        if kind in tuple(kinds):
            r = ranks[int(layer) % len(ranks)]
            a[location.name] = rng.normal(0, location.shape[1] ** -0.5, (r, location.shape[1])).astype(
                np.float32
            )
            b[location.name] = rng.normal(0, 0.3 * rank / alpha * r**-0.5, (location.shape[0], r)).astype(
                np.float32
            )
    rows = {token: rng.normal(0, config.width**-0.5, config.width).astype(np.float32) for token in tokens}
    return Adapter(name, rank, alpha, a, b, rows)
