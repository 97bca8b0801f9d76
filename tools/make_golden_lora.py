"""Writes tests/golden/lora.zip: adapters that peft saved for the golden models, and logits with them.

    PYTHONPATH=.:tests .venv-bench/bin/python tools/make_golden_lora.py

Random adapters, large enough to change the logits, with the options that peft has: a subset of layers and
modules, ranks and alphas by pattern, rank-stabilised scaling, trained token rows. For each model: `peft/` as
save_pretrained writes it, `ids.npy` (the trained tokens among them) and `logits.npy`.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_golden import GOLDEN, KINDS, hub_config, hub_weights
from reference import random_params

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "gemma1-mqa": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 2],
    },
    "gemma1-mha": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 3, "1.mlp.down_proj": 5},
        "alpha_pattern": {"k_proj": 20, r".*0\.self_attn\.o_proj": 2},
    },
    "gemma2": {
        "r": 6,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "use_rslora": True,
        "trainable_token_indices": {"embed_tokens": [7, 70]},
    },
    "gemma3": {
        "r": 8,
        "lora_alpha": 40,
        "target_modules": EVERY,
        "trainable_token_indices": [67, 68, 69, 70],
    },
}


def base(kind: str) -> torch.nn.Module:
    """The tiny model of tests/golden/{kind}.npz."""
    number, (_, config) = list(KINDS).index(kind), KINDS[kind]
    hf = transformers.AutoConfig.for_model(**hub_config(config))
    model = transformers.AutoModelForCausalLM.from_config(
        hf, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.load_state_dict(hub_weights(config, random_params(config, number)), strict=True)
    return model


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """float32 [T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long()).logits[0].numpy()


def main() -> None:
    with zipfile.ZipFile(GOLDEN / "lora.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for number, (kind, fields) in enumerate(CONFIGS.items()):
            torch.manual_seed(number)
            ids = np.load(GOLDEN / f"{kind}.npz")["ids"]
            ids[3:7] = [67, 68, 69, 70]
            model = base(kind)
            before = logits(model, ids)
            tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
            with torch.no_grad():
                for name, parameter in tuned.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.05)
                    elif "trainable_tokens_delta" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
                    if "lora_" in name:
                        parameter.copy_(parameter.bfloat16().float())  # makes the archive smaller
            after = logits(tuned, ids)
            print(f"{kind}: logits move by {np.abs(after - before).max():.3g}")
            with tempfile.TemporaryDirectory() as folder:
                tuned.save_pretrained(folder)
                for file in ("adapter_config.json", "adapter_model.safetensors"):
                    out.write(Path(folder, file), f"{kind}/peft/{file}")
            for name, array in (("ids", ids), ("logits", after)):
                np.save(stored := io.BytesIO(), array)
                out.writestr(f"{kind}/{name}.npy", stored.getvalue())


if __name__ == "__main__":
    main()
