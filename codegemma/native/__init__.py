"""The engine on a CPU: C++ kernels that read blocks from the memory-mapped file, under a Python layer loop.

`Native._record` is the loop. It runs once, and records the forward pass of Gemma 1, 2 and 3 as a list of
steps, which the C++ side replays for any number of tokens. One law holds: on one SIMD level, a token's logits
do not depend on what else is in the batch, how the prompt was split, whether its prefix came from a cache, or
the number of threads. Numerics v1 multiply 8-bit integers (kernels.cpp); v2, on level amx, multiply bfloat16
(tile_product.cpp, tile_attention.h).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.tensors import ArrayTensor, Tensor, row_bytes
from codegemma.native import _native
from codegemma.native._native import Cancel

PAGE: int = _native.PAGE  # tokens in a page of keys and values
RANK: int = _native.RANK  # adapters are computed in slices of this many ranks
QUANTISERS: tuple[str, ...] = _native.QUANTISERS  # the types that `quantize_rows` makes
# The version of the arithmetic, by SIMD level; others have v1. It is part of the key of saved caches.
NUMERICS = {"amx": "v2", "amx-imitated": "v2"}
CHUNK = 512  # the largest number of tokens in one run
NORMS = ("attn", "q", "k", "ffn", "post_attn", "post_ffn")  # those that a layer may have
HUGE_PAGES_AFTER = 64  # runs until weights move to huge pages; a process with fewer would gain nothing


def usable_cpus() -> int:
    """The number of CPUs this process may use: its affinity, limited by a container's CPU quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def measure(threads: int, level: str) -> tuple[float, float]:
    """This machine's limits: bytes read from memory per second, operations per second.

    The operations are those of the SIMD level's matrix products: on bfloat16 for level amx, on 8-bit integers
    for all others. A multiply-add counts as two. `level` may be "auto".
    """
    bandwidth, operations = _native.measure(level, _native.Pool(threads))
    return float(bandwidth), float(operations)


def why_no_amx() -> str:
    """Why this process cannot use level amx; "" where it can."""
    return str(_native.why_no_amx())


def dequantize(tensor: Tensor) -> np.ndarray:
    """float32 [rows, columns] of a matrix of any type."""
    values = np.empty(tensor.shape, np.float32)
    weight = _native.Weight(tensor.type, np.ascontiguousarray(tensor.data), *tensor.shape)
    _native.dequantise(_native.level("auto"), weight, values)
    return values


def quantize_rows(values: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows, bytes of a row]: float32 rows as blocks of a GGUF type.

    The result has the same bits as that of ggml's reference quantisers. `importance` [columns] weighs the
    rounding errors. Raises ValueError on NaN or infinite values, where a row is not a whole number of blocks,
    and on types that are not in QUANTISERS.
    """
    rows, columns = values.shape
    blocks = np.empty((rows, row_bytes(type, columns)), np.uint8)
    values = np.ascontiguousarray(values, np.float32)
    _native.quantise(_native.level("auto"), type, values, blocks, importance)
    return blocks


@dataclass(slots=True, eq=False)
class Page:
    """Keys and values of up to PAGE consecutive tokens in all layers.

    The rows below `used` never change again, so sequences can share a page. A sequence that ends at `used`
    may append to it; one that ends earlier must copy it first.
    """

    data: np.ndarray
    used: int = 0


@dataclass(frozen=True, eq=False)
class Logits:
    """The result of a run: row i is for the i-th wanted token. The next run overwrites the arrays."""

    values: np.ndarray  # float32 [n, V]
    argmax: np.ndarray  # int32 [n]: the lowest id if several are largest
    normaliser: np.ndarray  # float32 [n]: log sum exp of the values


@dataclass(frozen=True, eq=False)
class Slice:
    """New tokens of a sequence, the first at position `start`. `pages` have room for the whole sequence."""

    ids: Sequence[int]
    start: int
    pages: list[Page]
    wanted: int  # how many of the last tokens need logits
    adapter: str | None = None


class LowRank(Protocol):
    """An adapter (adapters.adapter.Adapter): adds scale * b @ a to matrices and replaces embedding rows."""

    @property
    def scale(self) -> float: ...
    @property
    def a(self) -> Mapping[str, np.ndarray]: ...
    @property
    def b(self) -> Mapping[str, np.ndarray]: ...
    @property
    def rows(self) -> Mapping[int, np.ndarray]: ...


class Native:
    """A checkpoint ready to run, with a fixed number of threads and SIMD level.

    The level is `level`, else the environment variable CODEGEMMA_SIMD, else the CPU's best. Pages hold
    float16 keys and values or, where the weights are floats, float32, to match float32 implementations; by
    numerics v2 they hold bfloat16, unless the weights are float32. If `observed` is given, it gets a float64
    array [columns] for each matrix but the embedding, by name, to which every run adds the squares of the
    matrix's inputs. Raises ValueError on a weight type without a kernel and on a SIMD level that this CPU
    lacks.
    """

    invariant = True  # logits do not depend on the batch

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        level: str | None = None,
        observed: dict[str, np.ndarray] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.config = checkpoint.config
        self.threads = threads or usable_cpus()
        self.level: str = _native.level(level or os.environ.get("CODEGEMMA_SIMD") or "auto")
        type = checkpoint.tensors["layers.0.q"].type
        self._has_blocks = type not in ("F32", "F16", "BF16")
        self.numerics = NUMERICS.get(self.level, "v1")
        self.factors = "bfloat16" if self.numerics == "v2" else "int8"  # of products with blocks
        tiles = self.numerics == "v2" and type != "F32"
        self.kv_type = "BF16" if tiles else "F16" if self._has_blocks else "F32"
        self.key = f"{self.numerics} {self.level} {self.kv_type.lower()}"
        layer_bytes = 2 * _native.kv_bytes(self.kv_type, self.config.kv_heads, self.config.head_width)
        self.page_bytes = self.config.layers * layer_bytes
        self._pool = _native.Pool(self.threads)
        self._arrays: list[np.ndarray] = []  # kept alive, since the C++ program points into them
        self._sites: list[tuple[int, list[str]]] = []  # each product's site (program.h), and its matrices
        self._adapters: dict[str | None, int] = {None: -1}
        self._program = self._record(checkpoint.tensors, layer_bytes, observed)
        self._logits = self._new_logits(1)
        self._runs, self._process = 0, os.getpid()

    def new_page(self) -> Page:
        """An empty page."""
        return Page(np.zeros(self.page_bytes, np.uint8))

    def copy_page(self, page: Page, used: int) -> Page:
        """A copy of a page, of which the first `used` tokens are valid."""
        return Page(page.data.copy(), used)

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Makes an adapter available to `run`; it must fit the model (Adapter.check).

        The base weights stay as they are: results of the low-rank products are added to those of the base.
        `a` and `b` are kept in 8-bit blocks where the base has blocks, else in float32.
        """
        sites = []
        for site, targets in self._sites:
            a, slices = [], []
            for target, matrix in enumerate(targets):
                for start in range(0, len(adapter.a.get(matrix, ())), RANK):
                    a_rI = adapter.a[matrix][start : start + RANK]
                    b_Or = adapter.b[matrix][:, start : start + RANK] * np.float32(adapter.scale)
                    padding = (0, RANK - len(a_rI))
                    a.append(np.pad(a_rI, (padding, (0, 0))))
                    slices.append((target, self._low_rank(np.pad(b_Or, ((0, 0), padding)))))
            if slices:
                sites.append((site, self._low_rank(np.concatenate(a)), slices))
        ids = sorted(adapter.rows)
        rows = self._weight(ArrayTensor.of(np.stack([adapter.rows[token] for token in ids]))) if ids else None
        self._adapters[name] = self._program.add_adapter(sites, ids, rows)

    def run(self, slices: Sequence[Slice], cancel: Cancel | None = None) -> Logits | None:
        """Runs all slices together and writes their keys and values into their pages.

        Returns the wanted logits in the order of the slices, or None if `cancel` was set during the run.
        Raises RuntimeError in a forked process.
        """
        if os.getpid() != self._process:  # a fork lacks the pool's threads and would wait for them forever
            raise RuntimeError(
                "this model was loaded before the process forked: load it in the child, or spawn instead"
            )
        self._runs += 1
        if self._runs == HUGE_PAGES_AFTER:  # not a daemon thread: it could abort an exit
            threading.Thread(target=self.use_huge_pages).start()
        T = sum(len(s.ids) for s in slices)
        ids_T, positions_T, sequences_T, adapters_T = (np.empty(T, np.int32) for _ in range(4))
        pages_SP = np.zeros((len(slices), max(len(s.pages) for s in slices)), np.uint64)
        adapters = [self._adapters[s.adapter] for s in slices]
        wanted: list[range] = [range(0)] * len(slices)
        end = 0
        for i in sorted(range(len(slices)), key=adapters.__getitem__):  # tokens of one adapter side by side
            s, start, end = slices[i], end, end + len(slices[i].ids)
            ids_T[start:end], sequences_T[start:end], adapters_T[start:end] = s.ids, i, adapters[i]
            positions_T[start:end] = np.arange(s.start, s.start + len(s.ids))
            pages_SP[i, : len(s.pages)] = [page.data.ctypes.data for page in s.pages]
            wanted[i] = range(end - s.wanted, end)
        rows = np.array([row for span in wanted for row in span], np.int32)
        n = len(rows)
        if n > len(self._logits.argmax):
            self._logits = self._new_logits(n)
        values, argmax, normaliser = self._logits.values, self._logits.argmax, self._logits.normaliser
        used_adapters = adapters_T if max(adapters) >= 0 else None
        batch = ids_T, positions_T, sequences_T, pages_SP, rows
        finished = self._program.run(*batch, values, argmax, normaliser, cancel, used_adapters)
        return Logits(values[:n], argmax[:n], normaliser[:n]) if finished else None

    def use_huge_pages(self) -> int:
        """Moves memory-mapped weights into huge pages, in place and while other threads run.

        Weights are then read about a quarter faster, but take their own memory, as a copy of the file would.
        Returns the number of bytes moved.
        """
        maps: dict[int, tuple[int, int]] = {}
        for data in self._arrays:
            root: object = data
            while isinstance(root, np.ndarray | memoryview):
                root = root.base if isinstance(root, np.ndarray) else root.obj
            if isinstance(root, mmap.mmap):
                low, high = maps.get(id(root), (1 << 63, 0))
                maps[id(root)] = min(low, data.ctypes.data), max(high, data.ctypes.data + data.nbytes)
        return sum(_native.use_huge_pages(low, high - low) for low, high in maps.values())

    def _new_logits(self, n: int) -> Logits:
        values = np.empty((n, self.config.vocab), np.float32)
        return Logits(values, np.empty(n, np.int32), np.empty(n, np.float32))

    def _weight(self, tensor: Tensor) -> _native.Weight:
        """A matrix for the C++ side, kept alive."""
        data = np.ascontiguousarray(tensor.data)
        self._arrays.append(data)
        return _native.Weight(tensor.type, data, *tensor.shape)

    def _low_rank(self, values: np.ndarray) -> _native.Weight:
        """A matrix of an adapter: in 8-bit blocks if the base has blocks and they fill the rows."""
        if not self._has_blocks or values.shape[1] % 32:
            return self._weight(ArrayTensor.of(values))
        return self._weight(ArrayTensor("Q8_0", values.shape, quantize_rows(values, "Q8_0")))

    def _norm(self, tensor: Tensor | None) -> np.ndarray | None:
        if tensor is None:
            return None
        values = np.array(tensor.float32(), np.float32)
        self._arrays.append(values)
        return values

    def _record(
        self, tensors: dict[str, Tensor], layer_bytes: int, observed: dict[str, np.ndarray] | None
    ) -> _native.Program:
        """The forward pass as steps; x is the residual stream. For the letters see `codegemma.config`."""
        c, p = self.config, _native.Program(self._pool, self.level)
        N, K, H, D, F, eps = c.heads, c.kv_heads, c.head_width, c.width, c.ffn_width, c.norm_eps
        x, a, y = p.buffer(D), p.buffer(D), p.buffer(D)
        qkv, attended, hidden = p.buffer((N + 2 * K) * H), p.buffer(N * H), p.buffer(F)
        table, final_norm = self._weight(tensors["embed"]), self._norm(tensors["final_norm"])

        def observe(buffer: int, width: int, names: list[str]) -> None:
            if observed is not None:
                p.observe(buffer, squares := np.zeros(width))
                observed.update((name, squares) for name in names)

        def product(buffer: int, width: int, kinds: Sequence[str], output: int) -> None:
            names = [f"layers.{i}.{kind}" for kind in kinds]
            observe(buffer, width, names)
            weights = [self._weight(tensors[name]) for name in names]
            gated = kinds == ("gate", "up")
            site = p.gated(buffer, *weights, output) if gated else p.product(buffer, weights, output)
            self._sites.append((site, names))

        p.embed(table, x, c.embed_scale)
        # What the next norm step first adds to x: a buffer (-1: none), normed where it has a norm.
        added, added_norm = -1, None
        for i in range(c.layers):
            norms = {kind: self._norm(tensors.get(f"layers.{i}.{kind}_norm")) for kind in NORMS}
            cache = {"layer_offset": i * layer_bytes, "kv_offset": layer_bytes // 2, "kv_type": self.kv_type}
            base, scale = (c.rope_base, c.rope_scale) if c.is_global(i) else (c.rope_base_local, 1.0)
            p.norm(x, norms["attn"], a, eps, added, added_norm)
            product(a, D, ("q", "k", "v"), qkv)
            p.split_heads(qkv, N, K, H, norms["q"], norms["k"], eps, c.query_scale, base, scale, **cache)
            p.attend(qkv, attended, N, K, H, c.layer_window(i) or 0, c.attention_softcap or 0.0, **cache)
            product(attended, N * H, ("o",), y)
            p.norm(x, norms["ffn"], a, eps, y, norms["post_attn"])
            product(a, D, ("gate", "up"), hidden)
            product(hidden, F, ("down",), y)
            added, added_norm = y, norms["post_ffn"]
        p.norm(x, final_norm, a, eps, added, added_norm)  # only to add to x: the result, in `a`, is not used
        p.logits(x, final_norm, eps, table, c.final_softcap or 0.0)
        return p
