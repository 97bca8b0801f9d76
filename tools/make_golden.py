"""Writes tests/golden/gemma*.npz: logits of tiny random models by Hugging Face transformers, in float32.

    PYTHONPATH=.:tests .venv-bench/bin/python tools/make_golden.py

Each file holds `hub` (config.json in the keys of the published checkpoints), `saved` (the same as
transformers writes it today), `config` (our ModelConfig), `seed` (of reference.random_params), `ids`,
`logits` and the `versions`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from reference import logits, random_params, tolerance

from codegemma.config import ModelConfig

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
HUB = {
    "gemma": "input_layernorm post_attention_layernorm",
    "gemma2": "input_layernorm pre_feedforward_layernorm post_attention_layernorm post_feedforward_layernorm",
}
HUB["gemma3"] = HUB[
    "gemma2"
]  # post_attention_layernorm precedes the FFN in Gemma 1, and is a post norm later

# Widths that are no multiple of a SIMD register, windows shorter than the text, effective caps and scales.
KINDS: dict[str, tuple[int, ModelConfig]] = {
    "gemma1-mqa": (
        61,
        ModelConfig(
            "gemma",
            layers=3,
            width=76,
            heads=4,
            kv_heads=1,
            head_width=16,
            ffn_width=150,
            vocab=301,
            context=128,
        ),
    ),
    "gemma1-mha": (
        48,
        ModelConfig(
            "gemma",
            layers=2,
            width=96,
            heads=3,
            kv_heads=3,
            head_width=64,
            ffn_width=160,
            vocab=320,
            context=64,
        ),
    ),
    "gemma2": (
        53,
        ModelConfig(
            "gemma2",
            layers=4,
            width=72,
            heads=4,
            kv_heads=2,
            head_width=24,
            ffn_width=132,
            vocab=307,
            context=96,
            window=16,
            global_every=2,
            post_norms=True,
            query_scale=20**-0.5,
            attention_softcap=5.0,
            final_softcap=3.0,
        ),
    ),
    "gemma3": (
        67,
        ModelConfig(
            "gemma3",
            layers=7,
            width=80,
            heads=4,
            kv_heads=1,
            head_width=20,
            ffn_width=136,
            vocab=310,
            context=128,
            rope_base=1e6,
            rope_scale=8.0,
            window=12,
            global_every=6,
            qk_norm=True,
            post_norms=True,
        ),
    ),
}


def hub_config(config: ModelConfig) -> dict[str, object]:
    """config.json with the keys of Google's checkpoints of that generation."""
    scalar = round(config.query_scale**-2)
    kind: dict[str, dict[str, object]] = {
        "gemma": {"model_type": "gemma", "hidden_act": "gelu", "rope_theta": config.rope_base},
        "gemma2": {
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": config.rope_base,
            "sliding_window": config.window,
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        },
        "gemma3": {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": config.rope_base,
            "rope_local_base_freq": config.rope_base_local,
            "rope_scaling": {"factor": config.rope_scale, "rope_type": "linear"},
            "sliding_window": config.window,
            "sliding_window_pattern": config.global_every,
            "query_pre_attn_scalar": scalar,
        },
    }
    return {
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        **kind[config.architecture],
    }


def hub_weights(config: ModelConfig, params: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Parameters under the names of transformers; norms are stored minus one."""
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    ours = ("attn_norm", "ffn_norm", "post_attn_norm", "post_ffn_norm")
    names |= dict(zip(ours, HUB[config.architecture].split(), strict=False))

    def hub_name(name: str) -> str:
        if name.startswith("layers."):
            _, layer, kind = name.split(".")
            return f"model.layers.{layer}.{names[kind]}.weight"
        return {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}[name]

    tensors = {hub_name(name): torch.from_numpy(value - (value.ndim == 1)) for name, value in params.items()}
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def make(kind: str, seed: int, length: int, config: ModelConfig) -> None:
    """Writes one golden file, and prints how far transformers is from the float64 model."""
    hub = hub_config(config)
    hf = transformers.AutoConfig.for_model(**hub)
    model = transformers.AutoModelForCausalLM.from_config(
        hf, attn_implementation="eager", dtype=torch.float32
    ).eval()
    params = random_params(config, seed)
    model.load_state_dict(hub_weights(config, params), strict=True)
    ids = np.concatenate([[2], np.random.default_rng(seed).integers(3, config.vocab, length - 1)]).astype(
        np.int32
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)[None].long()).logits[0].numpy()
    error = np.abs(logits(config, params, ids) - theirs).max()
    print(
        f"{kind}: |float64 twin - transformers| {error:.2g} of {tolerance(config, params, ids):.2g} allowed, "
        f"logits within {np.abs(theirs).max():.3g}"
    )
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(
        GOLDEN / f"{kind}.npz",
        hub=json.dumps(hub),
        saved=json.dumps(hf.to_dict()),
        ids=ids,
        config=json.dumps(asdict(config)),
        seed=seed,
        logits=theirs,
        versions=versions,
    )


if __name__ == "__main__":
    for number, (kind, (length, config)) in enumerate(KINDS.items()):
        make(kind, number, length, config)
