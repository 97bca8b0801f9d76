"""The `jax` backend of the engine: KV-cached decoding of `model.forward` on a GPU, a TPU, or wherever JAX runs.

Users call `codegemma.load(..., backend="jax")`. A page is one device array; arrays never change, so copying a page costs
nothing and running writes new ones. Shapes are rounded up to a few sizes, each compiled once. The law it keeps: the
native engine's logits within roundoff; not bit for bit whatever runs beside it, so it is not `invariant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.checkpoints import Checkpoint
from codegemma.jax.forward import Cache, Lora, Params, forward, params_of, unembed
from codegemma.native import PAGE, Cancel, Logits, LowRank, Page, Slice

LENGTHS = (1, 8, 32, 128, 512)  # new tokens of a sequence
Pages = list[list[jax.Array]]  # of each sequence, [2, L, PAGE, K, H]


class Jax:
    """A checkpoint ready to run on JAX's default device, in bfloat16 there and in float32 on a CPU."""

    invariant = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = c = checkpoint.config
        platform = jax.default_backend()
        self._dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
        self.key = f"jax {jax.__version__} {platform} {self._dtype}"
        self._shape = (2, c.layers, PAGE, c.kv_heads, c.head_width)
        self.page_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self._params: Params = params_of(checkpoint, self._dtype)
        self._adapters: dict[str | None, Lora | None] = {None: None}
        self._empty = jnp.zeros(self._shape, self._dtype)
        self._run = jax.jit(partial(_run, config=c, dtype=self._dtype))

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Makes an adapter that fits the model (lora.Adapter.check) known to `run`."""
        ids = sorted(adapter.rows)
        weights = {
            f"{tensor}.{part}": jnp.asarray(value, self._dtype)
            for part, side in (("a", adapter.a), ("b", adapter.b))
            for tensor, value in side.items()
        }
        if ids:
            weights["rows"] = jnp.asarray(np.stack([adapter.rows[token] for token in ids]))
        self._adapters[name] = Lora(weights, adapter.scale, tuple(ids))

    def new_page(self) -> Page:
        return Page(self._empty)  # type: ignore[arg-type]  # a device array, which only this backend looks into

    def copy_page(self, page: Page, used: int) -> Page:
        return Page(page.data, used)

    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None:
        """Runs all slices, those of one adapter and about one length together, and writes keys and values; None if cancelled."""
        groups: dict[tuple[str | None, int], list[int]] = {}
        for number, one in enumerate(slices):
            groups.setdefault((one.adapter, _size(len(one.ids), LENGTHS)), []).append(number)
        found: dict[int, tuple[np.ndarray, ...]] = {}
        for (adapter, length), numbers in groups.items():
            if cancel is not None and cancel.is_set():
                return None
            found.update(
                self._group(self._adapters[adapter], length, {number: slices[number] for number in numbers})
            )
        return Logits(
            *(np.concatenate([found[number][i] for number in range(len(slices))]) for i in range(3))
        )

    def _group(
        self, lora: Lora | None, T: int, slices: dict[int, Slice]
    ) -> dict[int, tuple[np.ndarray, ...]]:
        """Logits, argmax and normaliser of each slice's wanted tokens."""
        touched = -(-T // PAGE) + 1
        B, P = _size(len(slices)), max(4, _size(max(one.start // PAGE + touched for one in slices.values())))
        tokens_BT, positions_BT = (
            np.zeros((B, T), np.int32),
            np.full((B, T), P * PAGE, np.int32),
        )  # a slot outside
        first_B = np.zeros(B, np.int32)
        wanted: list[int] = []
        pages: Pages = [[self._empty] * P for _ in range(B)]
        for b, one in enumerate(slices.values()):
            n, first_B[b] = len(one.ids), one.start // PAGE
            tokens_BT[b, :n], positions_BT[b, :n] = one.ids, range(one.start, one.start + n)
            pages[b][: len(one.pages)] = map(self._array, one.pages)
            wanted += range(b * T + n - one.wanted, b * T + n)
        at_W = np.resize(np.array(wanted or [0], np.int32), _size(len(wanted)))
        rows, made = self._run(self._params, lora, pages, tokens_BT, positions_BT, first_B, at_W)
        values, argmax, normaliser = (np.array(part) for part in rows)
        results, at = {}, 0
        for b, (number, one) in enumerate(slices.items()):
            for page, data in zip(one.pages[one.start // PAGE :], made[b], strict=False):
                page.data = data
            results[number] = tuple(part[at : at + one.wanted] for part in (values, argmax, normaliser))
            at += one.wanted
        return results

    def _array(self, page: Page) -> jax.Array:
        """A page's keys and values; those that a saved cache gave move to the device first."""
        data: Any = page.data
        if isinstance(data, np.ndarray):
            page.data = data = jnp.asarray(data.view(self._dtype).reshape(self._shape))  # type: ignore[assignment]
        return data


def _run(
    params: Params,
    lora: Lora | None,
    pages: Pages,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    first_B: jax.Array,
    at_W: jax.Array,
    *,
    config,
    dtype,
):  # type: ignore[no-untyped-def]
    """(logits, argmax, log sum exp) of the tokens at `at_W`, and the pages from the `first_B`-th that were written."""
    B, T = tokens_BT.shape
    both = jnp.stack([jnp.concatenate(own, 2) for own in pages], 2)  # [2, L, B, S, K, H]
    hidden_BTD, cache = forward(
        params, tokens_BT, config, lora, positions_BT=positions_BT, cache=Cache(*both), dtype=dtype
    )
    both = jnp.stack(cache)  # type: ignore[arg-type]
    made = [
        [
            jax.lax.dynamic_slice_in_dim(both[:, :, b], (first_B[b] + i) * PAGE, PAGE, 2)
            for i in range(-(-T // PAGE) + 1)
        ]
        for b in range(B)
    ]
    logits_WV = unembed(params, hidden_BTD.reshape(B * T, -1)[at_W], config, lora)
    rows = logits_WV, logits_WV.argmax(-1).astype(jnp.int32), jax.nn.logsumexp(logits_WV, -1)
    return rows, made


def _size(count: int, sizes: Sequence[int] = ()) -> int:
    """The first of `sizes` that holds `count`, else a power of two, so that few shapes are compiled."""
    return next((size for size in sizes if count <= size), 1 << (max(count, 1) - 1).bit_length())
