"""Writes tests/golden/formats.zip: a small model as PyTorch, Orbax, KerasHub and transformers write it.

    PYTHONPATH=.:tests .venv-formats/bin/python tools/make_golden_formats.py

The weights are `tiny_tensors(GOLDEN, "BF16")` of tests/test_formats.py. Inside: gemma_pytorch.ckpt and hf/
(torch.save, save_pretrained), nested/ and flat/ (Orbax's StandardCheckpointer), keras/ (save_to_preset),
distributed/ (the torch_dist checkpoint of Megatron core: torch.distributed.checkpoint, layers stacked) and
nemo/ (Zarr arrays by tensorstore).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras_hub
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
import torch
import torch.distributed.checkpoint as dcp
from test_formats import GOLDEN
from tiny import tiny_tensors
from transformers import GemmaConfig, GemmaForCausalLM

from codegemma.checkpoints import Checkpoint, huggingface, keras, nemo, table

TENSORS = tiny_tensors(GOLDEN, "BF16")


def arrays(format: table.Format) -> dict[str, np.ndarray]:
    """The stored tensors as NumPy arrays of bfloat16; norms too, as in published checkpoints."""
    return {
        name: tensor.array().view(ml_dtypes.bfloat16)
        if tensor.type == "BF16"
        else tensor.float32().astype(ml_dtypes.bfloat16)
        for name, tensor in table.to_format(format, GOLDEN, TENSORS).items()
    }


def torches(format: table.Format) -> OrderedDict[str, torch.Tensor]:
    """The stored tensors as PyTorch tensors of bfloat16."""
    return OrderedDict(
        (name, torch.from_numpy(array.astype(np.float32)).bfloat16())
        for name, array in arrays(format).items()
    )


def stacked() -> dict[str, list[np.ndarray]]:
    """NeMo's tensors by name without the layer: a list of all layers' arrays."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in arrays("nemo").items():
        stacks.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(array)
    return stacks


def write(root: Path) -> None:
    """Writes the model in all formats."""
    torch.save({"model_state_dict": torches("pytorch")}, root / "gemma_pytorch.ckpt")
    model = GemmaForCausalLM(GemmaConfig.from_dict(huggingface.config_fields(GOLDEN))).to(torch.bfloat16)
    model.load_state_dict(torches("hf"), strict=False)
    model.save_pretrained(root / "hf")
    torch.save(model.state_dict(), root / "hf" / "pytorch_model.bin")
    flat: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays("flax").items():
        group, key = name.rsplit("/", 1)
        flat.setdefault(group, {})[key] = array
    nested: dict = {}
    for group, leaves in flat.items():
        tree = nested
        for part in group.removeprefix("transformer/").split("/"):
            tree = tree.setdefault(part, {})
        tree.update(leaves)
    for name, tree in (("flat", flat), ("nested", nested)):
        saver = ocp.StandardCheckpointer()
        saver.save(root / name / "checkpoint", tree)
        saver.wait_until_finished()
        (root / name / "config.json").write_text(json.dumps(huggingface.config_fields(GOLDEN)))
    with tempfile.TemporaryDirectory() as ours:
        keras.save(Path(ours), Checkpoint(Path(ours), GOLDEN, TENSORS, {}))
        keras_hub.models.GemmaBackbone.from_preset(ours, dtype="bfloat16").save_to_preset(str(root / "keras"))
    states = {
        name: torch.from_numpy(np.stack(layers).astype(np.float32)).bfloat16()
        if ".layers." in name
        else torch.from_numpy(layers[0].astype(np.float32)).bfloat16()
        for name, layers in stacked().items()
    }
    dcp.save(
        states, storage_writer=dcp.FileSystemWriter(root / "distributed" / "model_weights"), no_dist=True
    )
    for name, layers in stacked().items():
        stack = np.stack(layers) if ".layers." in name else layers[0]
        tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{root}/nemo/model_weights/{name}/"},
                "metadata": {
                    "compressor": None,
                    "dtype": "bfloat16",
                    "shape": stack.shape,
                    "fill_value": None,
                    "chunks": [1, *stack.shape[1:]] if ".layers." in name else stack.shape,
                },
            },
            create=True,
        ).result().write(stack).result()
    for name in ("distributed", "nemo"):
        (root / name / "model_config.yaml").write_bytes(nemo.config_yaml(GOLDEN, None))


def main() -> None:
    root = Path(tempfile.mkdtemp())
    write(root)
    target = Path(__file__).parent.parent / "tests" / "golden" / "formats.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
