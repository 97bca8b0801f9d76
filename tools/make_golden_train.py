"""Writes tests/golden/train.npz: 20 AdamW steps of tiny models by PyTorch, and of LoRA by peft.

    PYTHONPATH=.:tests .venv-bench/bin/python tools/make_golden_train.py

Each case is run twice, in float64 and in float32. The file holds the rows, the losses and the trained tensors
of the float64 run, and the root mean square error of each tensor in the float32 run, which scales the bound
of the test.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import peft
import torch
import transformers
from make_golden import GOLDEN, KINDS, hub_config, hub_weights
from reference import random_params

STEPS, ROWS, LENGTH = 20, 3, 20
SMALL: dict[str, Any] = {
    "width": 32,
    "ffn_width": 40,
    "heads": 2,
    "head_width": 16,
    "vocab": 150,
    "query_scale": 0.0,
}
Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]
CASES: dict[str, Case] = {  # kind, changes of the model, settings of our loop, LoRA
    "gemma1": ("gemma1-mqa", {"layers": 2}, {"learning_rate": 3e-3, "weight_decay": 0.1, "z": 1e-3}, None),
    "gemma2": (
        "gemma2",
        {"layers": 2, "window": 8, "kv_heads": 1},
        {"learning_rate": 3e-3, "decay": "linear", "clip": 0.5},
        None,
    ),
    "gemma3": (
        "gemma3",
        {"layers": 3, "global_every": 3},
        {"learning_rate": 3e-3, "betas": (0.9, 0.95)},
        None,
    ),
    "gemma1-lora": ("gemma1-mqa", {"layers": 2}, {"learning_rate": 1e-2}, {"r": 4, "lora_alpha": 8}),
    "gemma3-lora": (
        "gemma3",
        {"layers": 3, "global_every": 3},
        {"learning_rate": 1e-2, "weight_decay": 0.1},
        {"r": 3, "lora_alpha": 12, "trainable_token_indices": [67, 69]},
    ),
}
DEFAULTS: dict[str, Any] = {
    "warmup": 0.2,
    "floor": 0.1,
    "decay": "cosine",
    "betas": (0.9, 0.99),
    "weight_decay": 0.0,
    "clip": 1.0,
    "z": 0.0,
}


def rate(settings: dict, step: int) -> float:
    """The learning rate of a step: a linear warm-up, then cosine or linear decay to the floor."""
    warm = max(1, round(settings["warmup"] * STEPS))
    if step < warm:
        return settings["learning_rate"] * (step + 1) / warm
    share = (step - warm) / (STEPS - warm)
    decay = (1 + math.cos(math.pi * share)) / 2 if settings["decay"] == "cosine" else 1 - share
    return settings["learning_rate"] * (settings["floor"] + (1 - settings["floor"]) * decay)


def build_model(config, seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """A model with the weights of a seed; its rotary frequencies are computed in float64."""
    hf = transformers.AutoConfig.for_model(**hub_config(config))
    model = transformers.AutoModelForCausalLM.from_config(
        hf, attn_implementation="eager", dtype=torch.float32
    )
    model.load_state_dict(hub_weights(config, random_params(config, seed)), strict=True)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            local = "sliding" in name
            base, scale = (config.rope_base_local, 1.0) if local else (config.rope_base, config.rope_scale)
            half = config.head_width // 2
            buffer.data = (base ** (-torch.arange(half, dtype=torch.float64) / half) / scale).to(dtype)
    return model


def run(model: torch.nn.Module, settings: dict, ids_SBT: np.ndarray, loss_SBT: np.ndarray) -> list[float]:
    """Trains a model for STEPS steps; returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=settings["betas"], eps=1e-8
    )
    losses = []
    for step, (ids_BT, loss_BT) in enumerate(
        zip(torch.from_numpy(ids_SBT).long(), torch.from_numpy(loss_SBT), strict=True)
    ):
        logits = model(ids_BT).logits[:, :-1][loss_BT[:, 1:]]
        lse = logits.logsumexp(-1)
        nats = lse - logits.gather(-1, ids_BT[:, 1:][loss_BT[:, 1:], None])[:, 0] + settings["z"] * lse**2
        optimizer.zero_grad()
        nats.mean().backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in trained))
        for p in trained:
            p.grad *= min(1.0, settings["clip"] / float(norm))
        for group in optimizer.param_groups:
            group["lr"] = rate(settings, step)
        optimizer.step()
        losses.append(nats.mean().item())
    return losses


def ours(config, name: str) -> str:
    """Our name of a tensor that transformers or peft names."""
    params = random_params(config, 0)
    names = dict(zip(hub_weights(config, params), params, strict=False))
    if "trainable_tokens" in name:
        return "rows"
    plain = (
        name.removeprefix("base_model.model.").replace(".lora_A.default", "").replace(".lora_B.default", "")
    )
    return names[plain] + (".a" if "lora_A" in name else ".b" if "lora_B" in name else "")


def add_lora(model: torch.nn.Module, lora: dict[str, Any], seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """A model with an adapter whose start depends on the seed and its tensors' names, not on the type."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    model = peft.get_peft_model(model, settings)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_A" in name:
            rng = np.random.default_rng([seed, p.numel(), int(name.split(".")[4])])
            p.data = torch.from_numpy(rng.uniform(-1, 1, p.shape).astype(np.float32) / p.shape[1] ** 0.5)
        p.data = p.data.to(dtype)
    return model


def trained_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """float64 copies of the tensors that are trained, by name."""
    named = model.named_parameters()
    return {name: p.detach().double().numpy().copy() for name, p in named if p.requires_grad}


def train(
    config, seed: int, case: Case, dtype: torch.dtype, ids_SBT: np.ndarray, loss_SBT: np.ndarray
) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The losses of a run in a type, the trained tensors at its end, and at its start."""
    plain_float, plain_softmax = torch.Tensor.float, torch.nn.functional.softmax
    if dtype == torch.float64:  # for what transformers computes in float32 whatever the model's type
        torch.Tensor.float = torch.Tensor.double
        torch.nn.functional.softmax = lambda x, dim, dtype=None: plain_softmax(x, dim=dim)
    model = build_model(config, seed, dtype)
    _, _, options, lora = case
    if lora:
        model = add_lora(model, lora, seed, dtype)
    start = trained_tensors(model) if lora else {}
    losses = run(model, DEFAULTS | options, ids_SBT, loss_SBT)
    torch.Tensor.float, torch.nn.functional.softmax = plain_float, plain_softmax
    return losses, trained_tensors(model), start


def main() -> None:
    torch.set_num_threads(1)
    stored: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        kind, changes, options, lora = case
        config = replace(KINDS[kind][1], **SMALL | changes)
        rng = np.random.default_rng(number)
        ids_SBT = rng.integers(3, config.vocab, (STEPS, ROWS, LENGTH)).astype(np.int16)
        loss_SBT = rng.random(ids_SBT.shape) < 0.7
        loss_SBT[:, :, 0] = False
        losses, wide, start = train(config, number, case, torch.float64, ids_SBT, loss_SBT)
        narrow_losses, narrow, _ = train(config, number, case, torch.float32, ids_SBT, loss_SBT)
        about = {"config": asdict(config), "settings": DEFAULTS | options, "lora": lora, "seed": number}
        stored |= {
            f"{name}/ids": ids_SBT,
            f"{name}/loss": loss_SBT,
            f"{name}/losses": np.array(losses),
            f"{name}/losses_error": np.abs(np.array(losses) - narrow_losses).max(),
            f"{name}/about": np.array(json.dumps(about)),
        }
        errors = {key: float(np.sqrt(np.mean((value - narrow[key]) ** 2))) for key, value in wide.items()}
        for key, value in wide.items():
            # transformers stores the factor of a norm minus one
            stored[f"{name}/end/{ours(config, key)}"] = (value + (value.ndim == 1)).astype(np.float32)
            stored[f"{name}/error/{ours(config, key)}"] = np.float32(errors[key])
            if lora:
                stored[f"{name}/start/{ours(config, key)}"] = start[key]
        differences = f"loss by {narrow_losses[-1] - losses[-1]}, tensors by up to {max(errors.values())}"
        print(f"{name}: loss {losses[0]} to {losses[-1]}; float32 differs: {differences}")
    stored["versions"] = np.array(
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    )
    np.savez_compressed(GOLDEN / "train.npz", **stored)


if __name__ == "__main__":
    main()
