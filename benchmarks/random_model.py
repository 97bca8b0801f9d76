"""Random weights of a CodeGemma's shape as a GGUF, to measure speed and memory: its text is noise.

    PYTHONPATH=. .venv/bin/python benchmarks/random_model.py 2b q4_0 [--model gemma-3-270m]

Each tensor gets the type that llama.cpp's quantiser would choose. Blocks are random bytes with scales that
keep the activations finite and the logits varied. The vocabulary is the first 256,000 pieces of the default
model's. Greedy decoding soon repeats a token, as nothing was learnt: measure it without speculation.
"""

from __future__ import annotations

import argparse
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from codegemma import hub
from codegemma.checkpoints import gguf, gguf_model
from codegemma.checkpoints.table import TensorLocation, tensor_locations
from codegemma.checkpoints.tensors import BLOCKS, LazyTensor, row_bytes
from codegemma.config import PRESETS, ModelConfig
from codegemma.files import cache_dir

CACHE = cache_dir()
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15}  # general.file_type
ROWS = 1024  # drawn at a time

# The float16 factors of a block (byte offset: multiple of the scale), and the standard deviation of a weight
# whose block has the scale 1 and otherwise random bits: see ggml's dequantize_row_*. Weights shall have the
# mean zero: so the mins of a K block are 7.5 scales, the mean of its quants, and scales have random signs.
FACTORS: dict[str, tuple[dict[int, float], float]] = {
    "Q4_0": ({0: 1.0}, 4.64),
    "Q8_0": ({0: 1.0}, 73.9),
    "Q4_K": ({0: 1.0, 2: 7.5}, 258.0),
    "Q6_K": ({208: 1.0}, 1367.0),
}


def tensor_type(location: TensorLocation, mix: str, layers: int) -> str:
    """The type that llama.cpp's quantiser gives a tensor of a model with tied embeddings."""
    if location.is_norm:
        return "F32"
    if mix == "q8_0":
        return "Q8_0"
    if location.name == "embed":
        return "Q6_K"
    if mix == "q4_0":
        return "Q4_0"
    _, layer, kind = location.name.split(".")
    i, eighth = int(layer), layers // 8
    better = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
    return "Q6_K" if kind in ("v", "down") and better else "Q4_K"


def random_blocks(location: TensorLocation, type: str) -> np.ndarray:
    """A tensor's random blocks, from its name alone: uint8 [rows, bytes of a row], or float32 for a norm."""
    rng = np.random.default_rng(zlib.crc32(location.name.encode()))
    if type == "F32":
        return rng.uniform(0.9, 1.1, location.shape).astype(np.float32)
    rows, width = location.shape
    out = np.empty((rows, row_bytes(type, width)), np.uint8)
    gain = 16.0 if location.name.endswith((".o", ".down")) else 1.0  # or each token would only predict itself
    factors, spread = FACTORS[type]
    for start in range(0, rows, ROWS):
        part = out[start : start + ROWS]
        part[:] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
        blocks = part.reshape(-1, BLOCKS[type][1])
        scale = (
            rng.uniform(0.8, 1.2, len(blocks))
            * rng.choice([-1, 1], len(blocks))
            * gain
            / (spread * width**0.5)
        )
        for offset, times in factors.items():
            blocks[:, offset : offset + 2] = (scale * times).astype("<f2").view(np.uint8).reshape(-1, 2)
    return out


def write(path: Path, config: ModelConfig, mix: str, vocabulary: Path) -> None:
    """Writes a random model with the tokenizer of another GGUF."""
    header = gguf.read(vocabulary).metadata
    metadata = gguf_model.config_metadata(config) | {
        "general.name": path.stem,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[mix],
    }
    for key, value in header.items():
        if key.startswith("tokenizer."):
            metadata[key] = (
                value[: config.vocab] if hasattr(value, "__len__") and not isinstance(value, str) else value
            )

    tensors = {}
    for location in tensor_locations(config, "gguf"):
        type = tensor_type(location, mix, config.layers)
        compute = partial(random_blocks, location, type)
        tensors[location.stored] = LazyTensor.computed(type, location.shape, compute)
    gguf.write(path, metadata, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=["2b", "7b"])
    parser.add_argument("mix", choices=sorted(FILE_TYPES))
    parser.add_argument(
        "--model", default=hub.DEFAULT, help="the model whose vocabulary is used: a name or a GGUF"
    )
    parser.add_argument("--out", type=Path, help="default: a file in the cache, which is kept if it exists")
    args = parser.parse_args()
    path = args.out or CACHE / "bench" / f"random-{args.size}-{args.mix}.gguf"
    if args.out or not path.exists():
        write(path, PRESETS[args.size].config, args.mix, hub.resolve(args.model))
    print(path)


if __name__ == "__main__":
    main()
