"""A training run in this process: its memory policy, compiled steps, state and store.

Call `prepare_process` before JAX starts; `Session.train` then takes one step after another. The law it keeps:
stopped at any moment, by kill -9 too, and resumed, a run ends with the very parameters, moments and losses of
one that was not stopped.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.config import ModelConfig
from codegemma.jax.compiler import compiler_options, configure_xla
from codegemma.jax.forward import LoraParams, Params
from codegemma.train import mesh as meshes
from codegemma.train.horizon import HEAD, Middles, new_head
from codegemma.train.loss import BLOCK, Losses
from codegemma.train.memory import choose_remat
from codegemma.train.objective import Objective, Trainable, flops_of, weights_of, with_weights
from codegemma.train.optimizer import optimizer, schedule, update
from codegemma.train.order import Microbatch, Order, microbatches, row_length
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import RunState, Store

TRIMMED_BATCHES = 8  # how many microbatches at the start are each followed by a trim of the heap
SUMS = 7  # of a microbatch: see `target_sums`
# glibc's options: (number in malloc.h, value)
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


@dataclass(frozen=True)
class StepReport:
    """What a step did: a line of metrics.jsonl."""

    step: int  # from 1
    steps: int  # of the complete run
    loss: float  # nats per target, or the loss per pair of answers
    right: float  # accuracy: share of targets that were the likeliest token, or of pairs that gained
    ends: float | None  # accuracy at stop tokens; None where no target is one
    targets: int  # or pairs
    tokens: int  # of this step
    seconds: float
    flops: float  # of this step, by `flops_of`
    learning_rate: float
    gradient_norm: float
    held_out: float | None = None  # loss on the held-out rows, where it was measured
    best: bool = False  # whether `held_out` is the lowest so far
    horizon: float | None = None  # mean error of the head of horizon.py; None without a head or a middle


SaveResult = Callable[[Trainable, StepReport], None]


def prepare_process() -> None:
    """Sets up the heap and XLA for training; call it before JAX computes or starts its threads."""
    keep_heap()
    configure_xla()


def keep_heap() -> None:
    """Makes glibc keep freed memory in one heap; does nothing where the C library has no mallopt.

    Otherwise glibc returns a step's large buffers to the system, which clears each page again for the next
    step: that takes a fifth of the time on a CPU. A thread that already has its own arena keeps it.
    """
    with suppress(AttributeError, OSError, TypeError):
        for option, value in MALLOPT.values():
            ctypes.CDLL(None).mallopt(option, value)


def trim_heap() -> None:
    """Returns free heap to the system; does nothing where the C library has no malloc_trim.

    Without it, a small live buffer inside a freed block makes the next large allocation take new memory. Only
    the first steps need it: once all long-lived buffers are allocated, every step reuses the same memory.
    """
    with suppress(AttributeError, OSError, TypeError):
        trim = ctypes.CDLL(None).malloc_trim
        time.sleep(0.05)  # JAX frees a call's buffers a moment after it returns the results
        trim(0)


def target_sums(batch: Microbatch, losses: Losses, stop_ids: Sequence[int]) -> np.ndarray:
    """Sums over a microbatch's real targets, or over its pairs of answers, float64 [SUMS].

    How many targets there are, their nats, and how many were the likeliest token (or gained); how many of
    the targets are stop tokens, and how many of those were the likeliest token; how many have a share of a
    middle to come, and the errors of these shares.
    """
    if batch.pairs is None:
        real_M = (np.arange(batch.index_CM.shape[1]) < batch.count_C[:, None]).reshape(-1)
        is_stop = np.isin(batch.targets_CM.reshape(-1)[real_M], list(stop_ids))
    else:
        real_M = np.isfinite(batch.pairs.reference_CP).reshape(-1)
        is_stop = np.zeros(real_M.sum(), bool)
    nats, is_top = (meshes.gather(x)[real_M] for x in losses[:2])
    sums = [len(nats), nats.sum(dtype=np.float64), is_top.sum(), is_stop.sum(), is_top[is_stop].sum(), 0, 0]
    if losses.share_errors_M is not None:
        sums[5:] = (batch.shares_CM >= 0).sum(), meshes.gather(losses.share_errors_M).sum(dtype=np.float64)
    return np.array(sums)


class Session:
    """A run that trains `trainable`: an adapter or layers over the frozen `base`, or all parameters.

    The arrays of `trainable` are donated: the caller must not use them again. `held_out` are sequences of
    rows to measure on, as data.pack.Rows gives them. Entered as a context, a session opens the run's `folder`
    and restores its newest checkpoint; a resumed run must have the same `about`, a JSON object. Raises
    ValueError on entry where the folder holds a run and `resume` is not set, or a run with other settings.
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
        stop_ids: Sequence[int] = (),
        fim_middle: int | None = None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self.order, self.held_out, self.mesh = config, order, held_out, mesh
        self.settings = choose_remat(settings, config, max(map(row_length, order.folders)))
        self.stop_ids = tuple(stop_ids)
        self._middles: Middles | None = None
        if settings.horizon:
            if fim_middle is None:
                rule = "a horizon is the rest of a middle, but this vocabulary has no token before one"
                raise ValueError(f"{rule}: leave horizon out")
            self._middles = Middles(fim_middle, self.stop_ids)
            trainable = with_weights(trainable, weights_of(trainable) | {HEAD: new_head(config.width)})
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
            start = self.state.trainable
            self.store.restore(self.state)
            self._set_references(start)
        except BaseException:
            self.store.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def _set_references(self, start: Trainable) -> None:
        """Puts log p(chosen) - log p(rejected) before the first step into the rows of pairs.

        It is computed once, by the weights at the `start`, and kept in the run's folder.
        """
        folders = [rows for rows in (*self.order.folders, *self.held_out) if "reference" in rows[0]]

        def compute() -> np.ndarray:
            with meshes.use(self.mesh):
                return np.concatenate([self._margins(start, rows) for rows in folders])

        if folders:
            of = [self.order.fingerprint(rows) for rows in folders]
            margins = self.store.computed_once("reference", of, compute)
            for place in (row["reference"] for rows in folders for row in rows):
                place += np.where(np.isnan(place), 0, margins[: len(place)] - place)
                margins = margins[len(place) :]

    def _margins(self, start: Trainable, rows: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """float32: what Objective.margins says of each place in the rows' references."""
        batches = [meshes.place_batch(self.mesh, batch) for batch in self._microbatches(rows)]
        margins = [meshes.gather(self._margin(start, self.base, batch)) for batch in batches]
        return np.concatenate(margins)[: len(rows) * len(rows[0]["reference"])]

    def _stamp(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What must be equal in a run and its resumption."""
        trainable = self.state.trainable
        return {
            "settings": asdict(self.settings) | {"save_every": 1, "keep": 1},  # these two may differ
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
        """Makes the functions that a step runs; each is compiled when it is first called."""
        trees = (self.state.trainable, self.state.moments)
        shardings, moment_shardings = (
            jax.tree.map(lambda leaf: leaf.sharding if self.mesh else None, tree) for tree in trees
        )
        objective = Objective(self.config, self.settings, self.stop_ids)
        self._gradient = jax.jit(
            objective.gradient,
            out_shardings=(None, shardings),
            compiler_options=compiler_options(self.settings.remat),
        )
        self._loss = jax.jit(objective.loss)
        self._margin = jax.jit(objective.margins)
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._update = jax.jit(
            partial(update, self._rule),
            donate_argnums=(0, 1),
            out_shardings=(shardings, moment_shardings, None),
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience has run out."""
        return self.state.step >= self.steps or 0 < self.settings.patience <= self.state.misses

    def train(
        self,
        save_result: SaveResult = lambda *_: None,
        until: float | None = None,
        stop: Event | None = None,
    ) -> Iterator[StepReport]:
        """Trains to the end of the run and reports each step.

        `save_result` is called at each checkpoint. Only where there are held-out rows and `settings.average`
        is 1, it is called at each new best loss on these rows instead. At `until`, on the clock of
        time.monotonic, the run ends early, but after at least one step. Once `stop` is set, it ends at the
        next microbatch; the steps so far are kept, to be resumed.
        """
        settings, state, store = self.settings, self.state, self.store
        keeps_best = self.held_out and settings.average == 1
        over = self.finished
        while not over:
            with meshes.use(self.mesh):  # left before the report is yielded to the caller
                report = self.step(stop)
                if report is None:
                    if state.step != store.saved_step:
                        store.save(state)
                    return
                over = self.finished or until is not None and time.monotonic() > until
                if self.held_out and (over or state.step % settings.evaluate_every == 0):
                    report = self.measure(report)
                    over = over or self.finished
                saves = over or state.step % settings.save_every == 0
                store.log(state, asdict(report))
                if report.best if keeps_best else saves:
                    save_result(store.mean(state, settings.average - 1), report)
                if saves:
                    store.save(state)
            yield report

    def step(self, stop: Event | None = None) -> StepReport | None:
        """Takes one step and reports it. If `stop` is set meanwhile, takes none and returns None.

        Raises ValueError on rows of another vocabulary, and on a loss that is not finite.
        """
        started, state = time.perf_counter(), self.state
        rows = self._rows(state.step)
        batches = list(self._microbatches(rows))
        sample = self._sample(state.step, batches) if self._sample else None
        gradients, sums = None, np.zeros(SUMS)
        for batch in batches:
            if stop and stop.is_set():
                return None
            placed = meshes.place_batch(self.mesh, batch)
            (_, losses), part = self._gradient(state.trainable, self.base, placed, sample)
            sums += target_sums(batch, losses, self.stop_ids)
            gradients = part if gradients is None else self._add(gradients, part)
            if self._batches_to_trim:
                self._batches_to_trim -= 1
                trim_heap()
        targets, nats, correct, stops, correct_stops, shares, share_errors = sums.tolist()
        loss, count = nats / max(targets, 1), jnp.float32(max(targets, 1))
        if not np.isfinite(loss):
            fault = f"step {state.step + 1}: the loss is {loss}: training diverged"
            raise ValueError(f"{fault}: lower --learning-rate and begin again in another folder")
        state.trainable, state.moments, norm = self._update(state.trainable, state.moments, gradients, count)
        state.step += 1
        length, predicted = row_length(rows), sum(int(batch.count_C.sum()) for batch in batches)
        return StepReport(
            step=state.step,
            steps=self.steps,
            loss=loss,
            right=correct / max(targets, 1),
            ends=correct_stops / stops if stops else None,
            targets=int(targets),
            tokens=len(rows) * length,
            seconds=time.perf_counter() - started,
            flops=flops_of(self.config, len(rows) * length, length, predicted, state.trainable),
            learning_rate=float(self._rate(state.step - 1)),
            gradient_norm=float(norm),
            horizon=share_errors / shares if shares else None,
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
        return microbatches(rows, -(-size // parts) * parts, parts, BLOCK, self._middles)

    def measure(self, report: StepReport) -> StepReport:
        """The report with the loss on the held-out rows, and whether it is the best so far."""
        state, sums = self.state, np.zeros(SUMS)
        for rows in self.held_out:
            for batch in self._microbatches([rows[i] for i in range(len(rows))]):
                placed = meshes.place_batch(self.mesh, batch)
                sums += target_sums(batch, self._loss(state.trainable, self.base, placed)[1], ())
        loss = sums[1].item() / max(sums[0].item(), 1)
        best = loss < state.best
        state.misses = 0 if best else state.misses + 1
        state.best = min(state.best, loss)
        return replace(report, held_out=loss, best=best)
