"""The `jax` backend of the engine: decoding with a KV cache on a GPU, a TPU, or wherever JAX runs.

Users call `codegemma.load(..., backend="jax")`. A page of keys and values is one immutable device array:
copying a page costs nothing, and a run makes new ones. Shapes are rounded up to a few sizes, each compiled
once. The law it keeps: the native engine's logits within roundoff. It is not `invariant`: the exact bits of a
token's logits may depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.checkpoints import Checkpoint
from codegemma.config import ModelConfig
from codegemma.jax.compiler import configure_xla
from codegemma.jax.forward import Cache, LoraParams, Params, forward, params_of, unembed
from codegemma.native import PAGE, Cancel, Logits, LowRank, Page, Slice

LENGTHS = (1, 8, 32, 128, 512)  # new tokens of a sequence, rounded up to one of these


class Jax:
    """A checkpoint ready to run on JAX's default device: in float32 on a CPU, else in bfloat16."""

    invariant = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        configure_xla()
        self.config = c = checkpoint.config
        platform = jax.default_backend()
        self._dtype = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
        self.key = f"jax {jax.__version__} {platform} {self._dtype}"
        self._shape = (2, c.layers, PAGE, c.kv_heads, c.head_width)
        self.page_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self._params: Params = params_of(checkpoint, self._dtype)
        self._adapters: dict[str | None, LoraParams | None] = {None: None}
        self._empty = jnp.zeros(self._shape, self._dtype)
        self._run = jax.jit(partial(_run, config=c))

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Makes an adapter known to `run` by name; it must fit the model (adapters.adapter.Adapter.check)."""
        self._adapters[name] = LoraParams.of(adapter, self._dtype)

    def new_page(self) -> Page:
        """An empty page."""
        return Page(self._empty)  # type: ignore[arg-type]  # a device array, read by this backend alone

    def copy_page(self, page: Page, used: int) -> Page:
        """A page with the first `used` tokens of another."""
        return Page(page.data, used)

    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None:
        """Runs all slices and writes their keys and values into their pages; None if cancelled.

        Slices with the same adapter and the same rounded length run together.
        """
        groups: dict[tuple[str | None, int], list[int]] = {}
        for number, piece in enumerate(slices):
            groups.setdefault((piece.adapter, _round_up(len(piece.ids), LENGTHS)), []).append(number)
        results: dict[int, tuple[np.ndarray, ...]] = {}
        for (adapter, length), numbers in groups.items():
            if cancel is not None and cancel.is_set():
                return None
            group = [slices[number] for number in numbers]
            results.update(zip(numbers, self._run_group(self._adapters[adapter], length, group), strict=True))
        ordered = [results[number] for number in range(len(slices))]
        return Logits(*(np.concatenate(parts) for parts in zip(*ordered, strict=True)))

    def _run_group(
        self, lora: LoraParams | None, T: int, slices: Sequence[Slice]
    ) -> list[tuple[np.ndarray, ...]]:
        """(logits, argmax, normaliser) of each slice's wanted tokens."""
        written = -(-T // PAGE) + 1  # T tokens write to at most so many pages
        B = _round_up(len(slices))
        P = max(4, _round_up(max(piece.start // PAGE + written for piece in slices)))
        tokens_BT, first_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        positions_BT = np.full((B, T), P * PAGE, np.int32)  # padding: behind the last slot, so never written
        wanted: list[int] = []
        pages = [[self._empty] * P for _ in range(B)]
        for b, piece in enumerate(slices):
            n, first_B[b] = len(piece.ids), piece.start // PAGE
            tokens_BT[b, :n], positions_BT[b, :n] = piece.ids, range(piece.start, piece.start + n)
            pages[b][: len(piece.pages)] = map(self._on_device, piece.pages)
            wanted += range(b * T + n - piece.wanted, b * T + n)
        wanted_W = np.resize(np.array(wanted or [0], np.int32), _round_up(len(wanted)))
        rows, new_pages = self._run(self._params, lora, pages, tokens_BT, positions_BT, first_B, wanted_W)
        for b, piece in enumerate(slices):
            for page, data in zip(piece.pages[first_B[b] :], new_pages[b], strict=False):
                page.data = data
        ends = np.cumsum([piece.wanted for piece in slices])
        parts = [np.split(np.array(part)[: ends[-1]], ends[:-1]) for part in rows]
        return list(zip(*parts, strict=True))

    def _on_device(self, page: Page) -> jax.Array:
        """A page's keys and values; a page loaded from a saved cache is moved to the device first."""
        data: Any = page.data
        if isinstance(data, np.ndarray):
            page.data = data = jnp.asarray(data.view(self._dtype).reshape(self._shape))  # type: ignore[assignment]
        return data


def _run(
    params: Params,
    lora: LoraParams | None,
    pages: list[list[jax.Array]],
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    first_B: jax.Array,
    wanted_W: jax.Array,
    *,
    config: ModelConfig,
) -> tuple[tuple[jax.Array, ...], list[list[jax.Array]]]:
    """(logits, argmax, log sum exp) of the tokens at `wanted_W` of the flattened [B * T], and the new pages.

    A page is [2, L, PAGE, K, H]. The new pages of each sequence replace its pages from the `first_B`-th on.
    """
    B, T = tokens_BT.shape
    kv = jnp.stack([jnp.concatenate(sequence, 2) for sequence in pages], 2)  # [2, L, B, S, K, H]
    hidden_BTD, cache = forward(
        params, tokens_BT, config, lora, positions_BT=positions_BT, cache=Cache(*kv), dtype=kv.dtype
    )
    kv = jnp.stack(cache)  # type: ignore[arg-type]

    def page(b: int, i: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(kv[:, :, b], (first_B[b] + i) * PAGE, PAGE, 2)

    new_pages = [[page(b, i) for i in range(-(-T // PAGE) + 1)] for b in range(B)]
    logits_WV = unembed(params, hidden_BTD.reshape(B * T, -1)[wanted_W], config, lora)
    return (logits_WV, logits_WV.argmax(-1).astype(jnp.int32), jax.nn.logsumexp(logits_WV, -1)), new_pages


def _round_up(count: int, sizes: Sequence[int] = ()) -> int:
    """The first of `sizes` that is at least `count`, else a power of two, so that few shapes are compiled."""
    return next((size for size in sizes if count <= size), 1 << (max(count, 1) - 1).bit_length())
