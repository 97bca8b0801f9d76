"""An opened model: config, tensors and tokenizer, whichever format they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints.tensors import Tensor
from codegemma.checkpoints.untrusted import damaged
from codegemma.config import ModelConfig
from codegemma.tokenizer import Tokenizer

FIM_ORDERS_KEY = "codegemma.fim"  # in a GGUF header or a config.json


def stated_ends(
    path: Path, fields: Mapping[str, Any], keys: Sequence[str] = ("eos_token_id",)
) -> frozenset[int]:
    """The end tokens that a header or config states under `keys`: each value is an id, a list of ids or null.

    Raises ValueError on anything else, naming `path`.
    """
    ends: set[int] = set()
    for key in keys:
        value = fields.get(key)
        ids = [] if value is None else value.tolist() if isinstance(value, np.ndarray) else value
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int for token in ids):
            raise damaged(f"{path}: {key} must be a token id or a list of them, got {value!r}")
        ends.update(ids)
    return frozenset(ends)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model: `tensors` by our names (formats.toml), `metadata` from its header or config.json.

    Where codegemma changed the weights, metadata[FIM_ORDERS_KEY] lists the FIM orders that they were trained
    on ("psm,spm", or ""). Adapters of the original model do not fit such weights.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    build_tokenizer: Callable[[], Tokenizer] | None = None
    end_ids: frozenset[int] = frozenset()  # stated by its files, in addition to the vocabulary's

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Built when first used, without added tokens that have no row in the embedding (the image token of
        Gemma 3's text models). None where the checkpoint has none: then prompts can only be token ids."""
        if self.build_tokenizer is None:
            return None
        tokenizer = self.build_tokenizer().without_added(self.config.vocab)
        return tokenizer.with_end_ids(self.end_ids | tokenizer.end_ids) if self.end_ids else tokenizer

    @property
    def end_ids_to_write(self) -> list[int]:
        """All end tokens, for a file's eos_token_id; empty if they are just <eos> and <end_of_turn>."""
        control = self.tokenizer.control if self.tokenizer else None
        named = {control.eos, control.end_of_turn} if control else set()
        extra = (self.tokenizer.end_ids if self.tokenizer else self.end_ids) - named
        return sorted(extra | {token for token in named if token is not None}) if extra else []

    @property
    def fim_orders(self) -> frozenset[str] | None:
        """The FIM orders that the weights were trained on, where codegemma changed them; else None."""
        orders = self.metadata.get(FIM_ORDERS_KEY)
        return None if orders is None else frozenset({"psm", "spm"} & set(str(orders).split(",")))

    def with_weights(self, tensors: dict[str, Tensor], fim_orders: Iterable[str]) -> Checkpoint:
        """The model with other weights, which were trained on these FIM orders."""
        metadata = {**self.metadata, FIM_ORDERS_KEY: ",".join(sorted(fim_orders))}
        return replace(self, tensors=tensors, metadata=metadata)

    @cached_property
    def identity(self) -> str:
        """A hash of config, types and samples of the weights, by which caches and adapters know a model."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in self.tensors.items():
            raw = tensor.data.reshape(-1)
            header = f"{name} {tensor.type} {tensor.shape}".encode()
            digest.update(header + raw[:256].tobytes() + raw[-256:].tobytes())
            digest.update(raw[:: max(1, len(raw) // 64)][:64].tobytes())
        return digest.hexdigest()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
