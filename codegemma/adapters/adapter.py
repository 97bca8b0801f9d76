"""A LoRA adapter in memory: its matrices and embedding rows, with the checks that they fit a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from codegemma.checkpoints.table import tensor_locations
from codegemma.config import LIMITS, ModelConfig

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
ORDERS = ("psm", "spm")  # prefix-suffix-middle, suffix-prefix-middle


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes of linear layers, and replacements for rows of the tied embedding.

    `a` [r, in] and `b` [out, r] by layer ("layers.0.q") are float32; r is `rank`, or less in some layers. A
    layer computes x W^T + (alpha / rank) (x a^T) b^T. `rows` [D] by token id replace the embedding's, as
    input and as output. `card` is a JSON object with any facts: card["fim"] = {"psm": bool, "spm": bool,
    "files": bool} says what the adapter was trained for (see `trained`), card["base"] for which model.
    Raises ValueError on parts that do not fit each other.
    """

    name: str
    rank: int
    alpha: float
    a: Mapping[str, np.ndarray]
    b: Mapping[str, np.ndarray]
    rows: Mapping[int, np.ndarray] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        valid_rank = type(self.rank) is int and 1 <= self.rank <= LIMITS["width"]
        rule = "rank must be a whole number from 1 and alpha a finite number other than 0"
        given = f"got {self.rank!r} and {self.alpha!r}"
        self._require(valid_rank and 0 < abs(self.alpha) < 1e9, f"{rule}, {given}")
        unpaired = min(self.a.keys() ^ self.b.keys(), default=None)
        self._require(
            unpaired is None, f"{unpaired} has one of its two matrices only: save the adapter again"
        )
        self._require(bool(self.a or self.rows), "changes no layer and no token: save it again")
        for name, a_rI in self.a.items():
            linear = re.fullmatch(rf"layers\.\d+\.({'|'.join(LINEAR)})", name) is not None
            self._require(linear, f"{name} is no linear layer: these are layers.N.{', '.join(LINEAR)}")
            a, b = a_rI.shape, self.b[name].shape
            needed = f"needs [r, in] and [out, r] with r from 1 to the rank, {self.rank}"
            fits = len(a) == len(b) == 2 and 1 <= a[0] == b[1] <= self.rank
            self._require(fits, f"{name} has matrices {list(a)} and {list(b)}, but {needed}")
        for name, values in self._arrays():
            finite = values.dtype == np.float32 and bool(np.isfinite(values).all())
            self._require(finite, f"{name} must hold finite float32 numbers: it is damaged, or diverged")

    def _require(self, condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"adapter {self.name}: {rule}")

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in sorted(self.a):
            yield from ((f"{name}.a", self.a[name]), (f"{name}.b", self.b[name]))
        for token in sorted(self.rows):
            yield f"row {token}", self.rows[token]

    @property
    def scale(self) -> float:
        """The factor by which b @ a is multiplied."""
        return self.alpha / self.rank

    @cached_property
    def digest(self) -> str:
        """A hash of all parts that affect logits; it identifies the adapter in caches of keys and values."""
        digest = hashlib.sha256(f"{self.scale!r}".encode())
        for name, values in self._arrays():
            digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:32]

    def trained_for(self, skill: str) -> bool:
        """Whether the card says that the adapter was trained for a skill.

        Skills are "psm" and "spm" (completing in that order) and "files" (with other files in front).
        """
        fim = self.card.get("fim")
        return isinstance(fim, dict) and fim.get(skill) is True

    def delta(self, name: str) -> np.ndarray:
        """float32 [out, in]: what the adapter adds to a layer's matrix."""
        product: np.ndarray = np.float32(self.scale) * (self.b[name] @ self.a[name])
        return product

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where the adapter's shapes do not fit a model of this config."""
        base = self.card.get("base") or "its card does not say which"
        belongs = f"it belongs to another model ({base})"
        shapes = {location.name: location.shape for location in tensor_locations(config)}
        for name in self.a:
            shape = self.b[name].shape[0], self.a[name].shape[1]
            layer = list(shapes[name]) if name in shapes else "no such layer"
            rule = f"changes {name} as a matrix of {list(shape)}, but the model has {layer}: {belongs}"
            self._require(shapes.get(name) == shape, rule)
        for token, row in self.rows.items():
            fits = 0 <= token < config.vocab and row.shape == (config.width,)
            rows = f"{config.vocab:,} rows of {config.width}"
            rule = f"replaces row {token} by {list(row.shape)} numbers, but the model has {rows}: {belongs}"
            self._require(fits, rule)

    def facts(self) -> dict[str, Any]:
        """The facts that `codegemma inspect --json` prints."""
        return {
            "name": self.name,
            "kind": "LoRA adapter",
            "rank": self.rank,
            "alpha": self.alpha,
            "matrices": [kind for kind in LINEAR if any(name.endswith(f".{kind}") for name in self.a)],
            "layers": len({name.split(".")[1] for name in self.a}),
            "tokens": sorted(self.rows),
            "parameters": sum(values.size for _, values in self._arrays()),
            "base": self.card.get("base"),
            "digest": self.digest,
            "card": dict(self.card),
        }

    def lines(self) -> Iterator[str]:
        """The adapter's facts as lines of text, for `codegemma inspect`."""
        facts = self.facts()
        size = f"rank {self.rank}, alpha {self.alpha:g}, {facts['parameters']:,} parameters"
        matrices = ", ".join(facts["matrices"]) or "no matrix"
        orders = ", ".join(order for order in ORDERS if self.trained_for(order)) or "unknown orders"
        yield f"{self.name}: LoRA adapter, {size}"
        yield f"for           {facts['base'] or 'unknown'}"
        yield f"changes       {matrices} in {facts['layers']} layers; {len(self.rows)} token rows"
        yield f"completes in  {orders}"
        for key, value in self.card.items():
            if key not in ("name", "base", "fim"):
                yield f"{key:13} {json.dumps(value)}"
