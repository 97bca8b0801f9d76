"""The engine on a CPU: C++ kernels that read the quantised blocks where they lie, under a layer loop in Python.

`record` is that loop: it states the forward pass of Gemma 1, 2 and 3 once, as a list of steps which the native half
replays for any number of tokens. The law it keeps (numerics v1): on one SIMD level a token's logits do not depend on
what else is in the batch, on how the prompt was cut, on whether its prefix came from a cache, or on the threads.
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
from codegemma.checkpoints.table import Tensor, row_bytes
from codegemma.native import _native
from codegemma.native._native import Cancel

PAGE: int = _native.PAGE  # tokens in a page of keys and values
RANK: int = _native.RANK  # ranks that one slice of an adapter has
NUMERICS = "v1"
CHUNK = 512  # tokens that one run takes at most
SETTLE_AFTER = 64  # runs: by then a process is no one-shot, and huge pages pay


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, bounded by a container's CPU quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def measure(threads: int, level: str) -> tuple[float, float]:
    """This machine's limits now: bytes a second read from memory, int8 operations a second (a multiply-add is two)."""
    bandwidth, operations = _native.measure(level, _native.Pool(threads))
    return float(bandwidth), float(operations)


class Page:
    """Keys and values of up to PAGE consecutive tokens in all layers. Rows below `used` never change again, so pages
    are shared freely: whoever stands at `used` may append, anybody else copies first."""

    __slots__ = ("data", "used")

    def __init__(self, data: np.ndarray, used: int = 0) -> None:
        self.data, self.used = data, used


@dataclass(frozen=True, eq=False)
class Logits:
    """Row i belongs to the i-th wanted token. `values` is a buffer that the next run overwrites."""

    values: np.ndarray  # float32 [n, V]
    argmax: np.ndarray  # int32 [n]: the lowest id among equals
    normaliser: np.ndarray  # float32 [n]: log sum exp


@dataclass(frozen=True, eq=False)
class Slice:
    """New tokens of one sequence: they stand at `start` and after, and `pages` covers them and all before."""

    ids: Sequence[int]
    start: int
    pages: list[Page]
    wanted: int  # logits of this many last tokens
    adapter: str | None = None


class LowRank(Protocol):
    """What of an adapter is computed: see lora.Adapter."""

    @property
    def scale(self) -> float: ...
    @property
    def a(self) -> Mapping[str, np.ndarray]: ...
    @property
    def b(self) -> Mapping[str, np.ndarray]: ...
    @property
    def rows(self) -> Mapping[int, np.ndarray]: ...


class Native:
    """A checkpoint ready to run. Threads and SIMD level are fixed at birth (`CODEGEMMA_SIMD` forces the level).

    The cache holds float16 keys and values, or float32 where the weights are floats, for parity with other float32
    implementations. Raises ValueError on a weight type without a kernel or a SIMD level that this CPU lacks.
    `observed` gets, by the name of each matrix but the embedding, the sum of the squares of what each column was
    multiplied with: float64 [columns], added to by every run.
    """

    invariant = True

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
        self.half = checkpoint.tensors["layers.0.q"].type not in ("F32", "F16", "BF16")
        self.key = f"{NUMERICS} {self.level} {'f16' if self.half else 'f32'}"
        layer_bytes = 2 * self.config.kv_heads * PAGE * self.config.head_width * (2 if self.half else 4)
        self.page_bytes = self.config.layers * layer_bytes
        self._pool = _native.Pool(self.threads)
        self._kept: list[np.ndarray] = []
        self._sites: list[tuple[int, list[str]]] = []
        self._adapters: dict[str | None, int] = {None: -1}
        self._program = self._record(checkpoint.tensors, layer_bytes, observed)
        self._buffers = self._logits_buffers(1)
        self._runs, self._process = 0, os.getpid()

    def new_page(self) -> Page:
        return Page(np.zeros(self.page_bytes, np.uint8))

    def copy_page(self, page: Page, used: int) -> Page:
        """A page of one's own with the first `used` tokens of another."""
        return Page(page.data.copy(), used)

    def add_adapter(self, name: str, adapter: LowRank) -> None:
        """Makes an adapter that fits the model (lora.Adapter.check) known to `run`. The base weights stay as they are:
        its low-rank products are computed beside theirs, in blocks of 8 bits where theirs are blocks, else in float32."""
        parts = []
        for site, names in self._sites:
            a, slices = [], []
            for target, tensor in enumerate(names):
                for at in range(0, len(adapter.a[tensor]) if tensor in adapter.a else 0, RANK):
                    a_rI, b_Or = (
                        adapter.a[tensor][at : at + RANK],
                        adapter.b[tensor][:, at : at + RANK] * np.float32(adapter.scale),
                    )
                    missing = RANK - len(a_rI)
                    a.append(np.pad(a_rI, ((0, missing), (0, 0))))
                    slices.append((target, self._low_rank(np.pad(b_Or, ((0, 0), (0, missing))))))
            if slices:
                parts.append((site, self._low_rank(np.concatenate(a)), slices))
        ids = sorted(adapter.rows)
        rows = self._weight(Tensor.of(np.stack([adapter.rows[token] for token in ids]))) if ids else None
        self._adapters[name] = self._program.add_adapter(parts, ids, rows)

    def _low_rank(self, values: np.ndarray) -> _native.Weight:
        rows, columns = values.shape
        if not self.half or columns % 32:
            return self._weight(Tensor.of(values))
        out = np.empty((rows, row_bytes("Q8_0", columns)), np.uint8)
        _native.quantise(_native.level("auto"), "Q8_0", np.ascontiguousarray(values, np.float32), out)
        return self._weight(Tensor("Q8_0", values.shape, out))

    def run(self, slices: Sequence[Slice], cancel: _native.Cancel | None = None) -> Logits | None:
        """Runs all slices together and writes their keys and values; None if it was cancelled on the way. Rows of logits
        follow the slices; inside, those of one adapter stand together."""
        if (
            os.getpid() != self._process
        ):  # threads do not survive a fork, and waiting for them would never end
            raise RuntimeError(
                "this model was loaded before the process forked: load it in the child, or spawn instead"
            )
        self._runs += 1
        if self._runs == SETTLE_AFTER:
            threading.Thread(target=self.settle, daemon=True).start()
        T = sum(len(s.ids) for s in slices)
        ids_T, positions_T, sequences_T = (np.empty(T, np.int32) for _ in range(3))
        pages_SP = np.zeros((len(slices), max(len(s.pages) for s in slices)), np.uint64)
        adapters = [self._adapters[s.adapter] for s in slices]
        adapters_T = np.empty(T, np.int32) if max(adapters) >= 0 else None
        rows: list[range] = [range(0)] * len(slices)
        at = 0
        for i in sorted(range(len(slices)), key=adapters.__getitem__):
            s = slices[i]
            end = at + len(s.ids)
            ids_T[at:end], sequences_T[at:end] = s.ids, i
            if adapters_T is not None:
                adapters_T[at:end] = adapters[i]
            positions_T[at:end] = np.arange(s.start, s.start + len(s.ids))
            pages_SP[i, : len(s.pages)] = [page.data.ctypes.data for page in s.pages]
            rows[i] = range(end - s.wanted, end)
            at = end
        wanted = [row for one in rows for row in one]
        n = len(wanted)
        if n > len(self._buffers.argmax):
            self._buffers = self._logits_buffers(n)
        b = self._buffers
        done = self._program.run(
            ids_T,
            positions_T,
            sequences_T,
            pages_SP,
            np.array(wanted, np.int32),
            b.values,
            b.argmax,
            b.normaliser,
            cancel,
            adapters_T,
        )
        return Logits(b.values[:n], b.argmax[:n], b.normaliser[:n]) if done else None

    def settle(self) -> int:
        """Moves memory-mapped weights into huge pages, in place and while others run: about a quarter more speed for
        what streams them, at the price of one copy of the file. Returns the bytes moved."""
        maps: dict[int, tuple[int, int]] = {}
        for data in self._kept:
            root: object = data
            while isinstance(root, np.ndarray | memoryview):
                root = root.base if isinstance(root, np.ndarray) else root.obj
            if isinstance(root, mmap.mmap):
                low, high = maps.get(id(root), (1 << 63, 0))
                maps[id(root)] = (min(low, data.ctypes.data), max(high, data.ctypes.data + data.nbytes))
        return sum(_native.settle(low, high - low) for low, high in maps.values())

    def profile(self, on: bool) -> list[tuple[str, float]]:
        """Seconds of each step since profiling was switched on."""
        times: list[tuple[str, float]] = self._program.profile()
        self._program.set_profiling(on)
        return times

    def _logits_buffers(self, n: int) -> Logits:
        return Logits(
            np.empty((n, self.config.vocab), np.float32), np.empty(n, np.int32), np.empty(n, np.float32)
        )

    def _weight(self, tensor: Tensor) -> _native.Weight:
        rows, columns = tensor.shape
        data = np.ascontiguousarray(tensor.data)
        self._kept.append(data)
        return _native.Weight(tensor.type, data, rows, columns)

    def _factors(self, tensor: Tensor | None) -> np.ndarray | None:
        if tensor is None:
            return None
        values = np.array(tensor.float32(), np.float32)
        self._kept.append(values)
        return values

    def _record(
        self, tensors: dict[str, Tensor], layer_bytes: int, observed: dict[str, np.ndarray] | None
    ) -> _native.Program:
        c, p = self.config, _native.Program(self._pool, self.level)
        N, K, H, F, eps = c.heads, c.kv_heads, c.head_width, c.ffn_width, c.norm_eps
        x, a, y = p.buffer(c.width), p.buffer(c.width), p.buffer(c.width)
        qkv, values, hidden = p.buffer((N + 2 * K) * H), p.buffer(N * H), p.buffer(F)
        table = self._weight(tensors["embed"])
        p.embed(table, x, c.embed_scale)
        added, post = -1, None  # what the next norm first adds to the residual stream
        for i in range(c.layers):

            def weight(name: str, i: int = i) -> _native.Weight:
                return self._weight(tensors[f"layers.{i}.{name}"])

            def factors(name: str, i: int = i) -> np.ndarray | None:
                return self._factors(tensors.get(f"layers.{i}.{name}"))

            def observe(x: int, width: int, *names: str, i: int = i) -> None:
                if observed is not None:
                    p.observe(x, sums := np.zeros(width))
                    observed.update((f"layers.{i}.{name}", sums) for name in names)

            offsets = {"layer_offset": i * layer_bytes, "kv_offset": layer_bytes // 2, "half": self.half}
            base, scale = (c.rope_base, c.rope_scale) if c.is_global(i) else (c.rope_base_local, 1.0)
            p.norm(x, factors("attn_norm"), a, eps, added, post)
            observe(a, c.width, "q", "k", "v")
            site = p.product(a, [weight("q"), weight("k"), weight("v")], qkv)
            self._sites.append((site, [f"layers.{i}.{name}" for name in "qkv"]))
            p.split_heads(
                qkv, N, K, H, factors("q_norm"), factors("k_norm"), eps, c.query_scale, base, scale, **offsets
            )
            p.attend(qkv, values, N, K, H, c.layer_window(i) or 0, c.attention_softcap or 0.0, **offsets)
            observe(values, N * H, "o")
            self._sites.append((p.product(values, [weight("o")], y), [f"layers.{i}.o"]))
            p.norm(x, factors("ffn_norm"), a, eps, y, factors("post_attn_norm"))
            observe(a, c.width, "gate", "up")
            site = p.gated(a, weight("gate"), weight("up"), hidden)
            self._sites.append((site, [f"layers.{i}.gate", f"layers.{i}.up"]))
            observe(hidden, F, "down")
            self._sites.append((p.product(hidden, [weight("down")], y), [f"layers.{i}.down"]))
            added, post = y, factors("post_ffn_norm")
        p.norm(x, self._factors(tensors["final_norm"]), a, eps, added, post)  # only for its sum into x
        p.logits(x, self._factors(tensors["final_norm"]), eps, table, c.final_softcap or 0.0)
        return p
