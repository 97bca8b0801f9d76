"""Refuses to write a config in a format that has no place for one of its fields."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import gguf_model, huggingface, keras, nemo
from codegemma.config import ExportFormat, ModelConfig


def check_fields(to: ExportFormat, config: ModelConfig) -> None:
    """Raises ValueError, naming each field, where a file of this format would describe another model."""
    if to == "nemo" and config.architecture != "gemma":
        return  # NeMo's table of tensors refuses these, with a better reason
    before, after = _effective(config), _effective(_as_read(to, config))
    lost = [
        f"{name} {value!r} (its readers take {getattr(after, name)!r})"
        for name, value in vars(before).items()
        if not _same(value, getattr(after, name))
    ]
    if lost:
        others = {"gguf": "safetensors", "keras": "gguf or safetensors", "nemo": "gguf or safetensors"}
        raise ValueError(f"{to} has no place for {', '.join(lost)}: write {others.get(to, 'gguf')} instead")


def _as_read(to: ExportFormat, config: ModelConfig) -> ModelConfig:
    """The config that a reader finds in a file of this format."""
    path = Path(f"a {to} file")
    if to == "gguf":
        return gguf_model.config(path, gguf_model.config_metadata(config), config.vocab)
    if to == "keras":
        return replace(keras.config(path, keras.config_fields(config)), context=config.context)
    if to == "nemo":
        members = {"model_config.yaml": np.frombuffer(nemo.config_yaml(config, None), np.uint8)}
        return nemo.config(path, nemo.read_config(path, members), config.vocab)
    return huggingface.config(path, huggingface.config_fields(config))


def _effective(config: ModelConfig) -> ModelConfig:
    """The config with fields that its model does not use reset: the window and the base of local positions,
    where no layer is local."""
    if config.global_every == 1:
        config = replace(config, window=None, rope_base_local=1.0)
    return config


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, (int, float)):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)
