"""Writes tests/golden/train.npz: 20 AdamW steps of tiny models by PyTorch, and of LoRA by peft.

    PYTHONPATH=.:tests .venv-bench/bin/python tools/make_golden_train.py

Each case is run twice, in float64 and in float32. The file holds the rows, the losses and what was trained as
float64 gave them, and the root mean square error of each tensor in float32: the scale of the test's bound.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import peft
import torch
import transformers
from make_golden import GOLDEN, KINDS, hub_config, hub_weights
from reference import random_params

STEPS, ROWS, LENGTH = 20, 3, 20
SMALL = {"width": 32, "ffn_width": 40, "heads": 2, "head_width": 16, "vocab": 150, "query_scale": 0.0}
CASES = {  # kind, changes of the model, settings of our loop, LoRA
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
DEFAULTS = {
    "warmup": 0.2,
    "floor": 0.1,
    "decay": "cosine",
    "betas": (0.9, 0.99),
    "weight_decay": 0.0,
    "clip": 1.0,
    "z": 0.0,
}


def rate(settings: dict, step: int) -> float:
    """A straight warm-up, then cosine or straight decay to the floor."""
    warm = max(1, round(settings["warmup"] * STEPS))
    if step < warm:
        return settings["learning_rate"] * (step + 1) / warm
    share = (step - warm) / (STEPS - warm)
    decay = (1 + math.cos(math.pi * share)) / 2 if settings["decay"] == "cosine" else 1 - share
    return settings["learning_rate"] * (settings["floor"] + (1 - settings["floor"]) * decay)


def built(config, seed: int, dtype: torch.dtype) -> torch.nn.Module:
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


def main() -> None:
    torch.set_num_threads(1)
    stored: dict[str, np.ndarray] = {}
    plain_float, plain_softmax = torch.Tensor.float, torch.nn.functional.softmax
    for number, (case, (kind, changes, options, lora)) in enumerate(CASES.items()):
        config, settings = replace(KINDS[kind][1], **SMALL | changes), DEFAULTS | options
        rng = np.random.default_rng(number)
        ids_SBT = rng.integers(3, config.vocab, (STEPS, ROWS, LENGTH)).astype(np.int16)
        loss_SBT = rng.random(ids_SBT.shape) < 0.7
        loss_SBT[:, :, 0] = False
        runs = []
        for dtype in (torch.float64, torch.float32):
            if dtype == torch.float64:  # what transformers computes in float32 whatever the model's type
                torch.Tensor.float = torch.Tensor.double
                torch.nn.functional.softmax = lambda x, dim, dtype=None: plain_softmax(x, dim=dim)
            model = built(config, number, dtype)
            start: dict[str, np.ndarray] = {}
            if lora:
                torch.manual_seed(number)
                model = peft.get_peft_model(
                    model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
                )
                for name, p in model.named_parameters():
                    if p.requires_grad:  # the same start in both types, from a seed and the name
                        if "lora_A" in name:
                            p.data = torch.from_numpy(
                                np.random.default_rng([number, p.numel(), int(name.split(".")[4])])
                                .uniform(-1, 1, p.shape)
                                .astype(np.float32)
                                / p.shape[1] ** 0.5
                            ).to(dtype)
                        p.data = p.data.to(dtype)
                        start[name] = p.detach().float().numpy().copy()
            losses = run(model, settings, ids_SBT, loss_SBT)
            runs.append(
                (
                    losses,
                    {
                        name: p.detach().double().numpy().copy()
                        for name, p in model.named_parameters()
                        if p.requires_grad
                    },
                    start,
                )
            )
            torch.Tensor.float, torch.nn.functional.softmax = plain_float, plain_softmax
        (losses, wide, start), (narrow_losses, narrow, _) = runs
        stored |= {
            f"{case}/ids": ids_SBT,
            f"{case}/loss": loss_SBT,
            f"{case}/losses": np.array(losses),
            f"{case}/losses_error": np.abs(np.array(losses) - narrow_losses).max(),
        }
        for name, values in wide.items():
            error = float(np.sqrt(np.mean((values - narrow[name]) ** 2)))
            if values.ndim == 1:  # they store a norm's factor minus one
                values = values + 1
            own_name = ours(config, name)
            stored |= {
                f"{case}/end/{own_name}": values.astype(np.float32),
                f"{case}/error/{own_name}": np.float32(error),
            }
            if lora:
                stored[f"{case}/start/{own_name}"] = start[name]
        print(
            case,
            "loss",
            losses[0],
            losses[-1],
            "float32 astray",
            narrow_losses[-1] - losses[-1],
            max(float(np.sqrt(np.mean((values - narrow[name]) ** 2))) for name, values in wide.items()),
        )
        about = {"config": asdict(config), "settings": settings, "lora": lora, "seed": number}
        stored[f"{case}/about"] = np.array(json.dumps(about))
    stored["versions"] = np.array(
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    )
    np.savez_compressed(GOLDEN / "train.npz", **stored)


if __name__ == "__main__":
    main()
