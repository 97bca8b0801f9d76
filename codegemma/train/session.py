"""A training run in this process: its memory policy, compiled steps, state and store.

`prepare_process` comes before JAX starts; a `Session` then takes one step after another. The law it keeps:
a step is a function of the state and the step's number, bit for bit.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.config import ModelConfig
from codegemma.jax.compiler import compiler_options, configure_xla
from codegemma.jax.forward import LoraParams, Params
from codegemma.train import mesh as meshes
from codegemma.train.loss import BLOCK
from codegemma.train.objective import Trainable, flops_of, gradient, objective
from codegemma.train.optimizer import optimizer, schedule, update
from codegemma.train.order import Microbatch, Order, microbatches, row_length
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import RunState, Store

MAX_ACTIVATIONS = 3 << 30  # bytes that a backward pass keeps before remat="auto" saves memory
TRIMMED_BATCHES = 8  # the first microbatches, after each of which the heap is trimmed
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}  # of malloc.h


@dataclass(frozen=True)
class StepReport:
    """What a step did: a line of metrics.jsonl."""

    step: int  # steps done
    steps: int
    loss: float  # nats a target
    right: float  # share of targets that were the likeliest token
    ends: float | None  # share of terminators that were; None without any
    targets: int
    tokens: int  # of this step
    seconds: float
    flops: float  # of this step, by `flops_of`
    learning_rate: float
    gradient_norm: float
    held_out: float | None = None  # loss on the held-out rows, where they were measured
    best: bool = False  # whether that was the lowest so far


def prepare_process() -> None:
    """Sets up the heap and XLA for training; call it before JAX computes or starts its threads."""
    keep_heap()
    configure_xla()


def keep_heap() -> None:
    """Makes glibc keep freed memory in one heap, where there is a mallopt.

    Else it returns a step's large buffers to the system, which clears each page again for the next step: a
    fifth of the time on a CPU. A thread that has an arena of its own by now goes on with it.
    """
    with suppress(AttributeError, OSError, TypeError):
        for option, value in MALLOPT.values():
            ctypes.CDLL(None).mallopt(option, value)


def trim_heap() -> None:
    """Returns free heap to the system, where there is a malloc_trim.

    A small live buffer inside a freed block forces the next large allocation elsewhere. Once all lasting
    buffers have their places, the same memory serves every step.
    """
    with suppress(AttributeError, OSError, TypeError):
        trim = ctypes.CDLL(None).malloc_trim
        time.sleep(0.05)  # JAX frees a call's buffers a moment after its results are there
        trim(0)


def choose_remat(settings: TrainingSettings, config: ModelConfig, length: int) -> TrainingSettings:
    """Resolves remat "auto" for rows of `length` tokens: "layer" above MAX_ACTIVATIONS, else "none".

    A layer keeps arrays as wide as the model, its heads and its feed-forward part.
    """
    if settings.remat != "auto":
        return settings
    c = config
    bytes_per_token = 4 * c.layers * (8 * c.width + 4 * c.heads * c.head_width + 4 * c.ffn_width)
    activations = max(settings.micro_tokens, length) * bytes_per_token
    return replace(settings, remat="layer" if activations > MAX_ACTIVATIONS else "none")


class Tally:
    """Sums over the targets of a step, or of the held-out rows."""

    def __init__(self, terminators: Sequence[int] = ()) -> None:
        self._terminators = list(terminators)
        self.targets = self._right = self._ends = self._ends_right = 0
        self._nats = 0.0

    def add(self, batch: Microbatch, nats_M: jax.Array, right_M: jax.Array) -> None:
        """Counts the real targets of a microbatch."""
        real_M = (np.arange(batch.index_CM.shape[1]) < batch.count_C[:, None]).reshape(-1)
        nats, right = meshes.gather(nats_M)[real_M], meshes.gather(right_M)[real_M]
        ends = np.isin(batch.targets_CM.reshape(-1)[real_M], self._terminators)
        self.targets += len(nats)
        self._nats += float(nats.sum(dtype=np.float64))
        self._right += int(right.sum())
        self._ends += int(ends.sum())
        self._ends_right += int(right[ends].sum())

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self._nats / max(self.targets, 1)

    @property
    def right(self) -> float:
        """Share of targets that were the likeliest token."""
        return self._right / max(self.targets, 1)

    @property
    def ends(self) -> float | None:
        """Share of terminators that were the likeliest token."""
        return self._ends_right / self._ends if self._ends else None


class Session:
    """A run of `trainable` (an adapter over the frozen `base`, or all parameters, whose arrays are used up).

    `held_out` are sequences of rows to measure on, as data.pack.Rows gives them. Entered as a context, it
    opens the run's `folder` and restores its newest checkpoint; `about` is what else a resumed run must have
    in common with it, as JSON. Raises ValueError on entry where the folder holds a run and `resume` is not
    set, or one with other settings.
    """

    def __init__(
        self,
        config: ModelConfig,
        base: Params | None,
        trainable: Trainable,
        order: Order,
        settings: TrainingSettings,
        folder: Path,
        *,
        resume: bool = False,
        held_out: Sequence[Any] = (),
        mesh: Any = None,
        terminators: Sequence[int] = (),
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self.order, self.held_out, self.mesh = config, order, held_out, mesh
        self.settings = choose_remat(settings, config, max(map(row_length, order.folders)))
        self.terminators = tuple(terminators)
        self.steps = min(order.steps, settings.steps or order.steps)
        self._rate = schedule(self.settings, self.steps)
        self._rule = optimizer(self.settings, self._rate)
        self.base = meshes.place(mesh, base)
        trainable = meshes.place(mesh, trainable)
        self.state = RunState(trainable, meshes.place(mesh, self._rule.init(trainable)))
        self._open = partial(Store, folder, self.settings.keep, self._stamp(about), resume)
        size = settings.vocabulary or config.vocab
        self._sample = order.sampler(size, config.vocab) if size < config.vocab else None
        self._batches_to_trim = TRIMMED_BATCHES
        self._compile()

    def __enter__(self) -> Session:
        self.store = self._open()
        try:
            self.store.restore(self.state)
        except BaseException:
            self.store.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def _stamp(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What a run and its resumption have in common."""
        trainable = self.state.trainable
        return {
            "settings": asdict(replace(self.settings, save_every=1, keep=1)),
            "steps": self.steps,
            "seed": self.order.seed,
            "rows": [self.order.fingerprint(rows) for rows in self.order.folders],
            "batch_tokens": self.order.batch_tokens,
            "model": repr(self.config),
            "adapter": [trainable.scale, *trainable.ids] if isinstance(trainable, LoraParams) else None,
            "shapes": {name: value.shape for name, value in self.state.weights.items()},
            **about,
        }

    def _compile(self) -> None:
        """The functions that a step runs; each is compiled when it is first called."""
        trees = (self.state.trainable, self.state.moments)
        places, moment_places = (
            jax.tree.map(lambda leaf: leaf.sharding if self.mesh else None, tree) for tree in trees
        )
        self._gradient = jax.jit(
            gradient(self.config, self.settings, self.terminators),
            out_shardings=(None, places),
            compiler_options=compiler_options(self.settings.remat),
        )
        self._loss = jax.jit(partial(objective, config=self.config, settings=self.settings))
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._update = jax.jit(
            partial(update, self._rule), donate_argnums=(0, 1), out_shardings=(places, moment_places, None)
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        return self.state.step >= self.steps or 0 < self.settings.patience <= self.state.misses

    def step(self) -> StepReport:
        """Takes one step. Raises ValueError on rows of another vocabulary and on an infinite loss."""
        started, state = time.perf_counter(), self.state
        rows = self._rows(state.step)
        batches = list(self._microbatches(rows))
        sample = self._sample(state.step, batches) if self._sample else None
        gradients, tally = None, Tally(self.terminators)
        for batch in batches:
            placed = meshes.place_batch(self.mesh, batch)
            (_, losses), part = self._gradient(state.trainable, self.base, placed, sample)
            tally.add(batch, *losses)
            gradients = part if gradients is None else self._add(gradients, part)
            if self._batches_to_trim:
                self._batches_to_trim -= 1
                trim_heap()
        if not np.isfinite(tally.loss):
            fault = f"step {state.step + 1}: the loss is {tally.loss}: training diverged"
            raise ValueError(f"{fault}: lower --learning-rate and begin again in another folder")
        count = jnp.float32(max(tally.targets, 1))
        state.trainable, state.moments, norm = self._update(state.trainable, state.moments, gradients, count)
        state.step += 1
        length, full = row_length(rows), not isinstance(state.trainable, LoraParams)
        return StepReport(
            step=state.step,
            steps=self.steps,
            loss=tally.loss,
            right=tally.right,
            ends=tally.ends,
            targets=tally.targets,
            tokens=len(rows) * length,
            seconds=time.perf_counter() - started,
            flops=flops_of(self.config, len(rows) * length, length, tally.targets, full),
            learning_rate=float(self._rate(state.step - 1)),
            gradient_norm=float(norm),
        )

    def _rows(self, step: int) -> list[dict[str, np.ndarray]]:
        rows, vocab = self.order.rows(step), self.config.vocab
        if (largest := max(int(row["tokens"].max()) for row in rows)) >= vocab:
            fault = f"the rows hold token {largest:,}, but the model's are below {vocab:,}"
            raise ValueError(f"{fault}: build them with its own tokenizer")
        return rows

    def _microbatches(self, rows: Sequence[dict[str, np.ndarray]]) -> Iterator[Microbatch]:
        parts = meshes.batch_parts(self.mesh.shape if self.mesh else {})
        size = min(len(rows), max(1, self.settings.micro_tokens // row_length(rows)))
        return microbatches(rows, -(-size // parts) * parts, parts, BLOCK)

    def measure(self, report: StepReport) -> StepReport:
        """The report with the loss on the held-out rows, and whether it is the best so far."""
        state, tally = self.state, Tally()
        for rows in self.held_out:
            for batch in self._microbatches([rows[i] for i in range(len(rows))]):
                placed = meshes.place_batch(self.mesh, batch)
                tally.add(batch, *self._loss(state.trainable, self.base, placed)[1])
        best = tally.loss < state.best
        state.misses = 0 if best else state.misses + 1
        state.best = min(state.best, tally.loss)
        return replace(report, held_out=tally.loss, best=best)
