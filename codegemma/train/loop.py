"""The training loop: rows in an order that is a pure function of the step, gradients by microbatch, AdamW, checkpoints.

`train` is an iterator of Reports, which the CLI, `tune` and tests fold. The law it keeps: stopped at any moment, also by
kill -9, and resumed, it ends with the very parameters, moments and losses of the run that was not stopped.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codegemma.adapters import adapter as adapters
from codegemma.config import ModelConfig
from codegemma.jax.forward import Lora, Params, Remat, embed, forward
from codegemma.train import mesh as meshes
from codegemma.train.curve import draw
from codegemma.train.loss import BLOCK, cross_entropy
from codegemma.train.order import Microbatch, Order, Sample, microbatches

Trainable = Lora | Params
VOCABULARY = 32_768  # of Settings, where the normaliser need not be exact
ACTIVATIONS = 3 << 30  # bytes that a backward pass may keep without being asked
SETTLING = 8  # first microbatches, after which the heap is given back each time


@dataclass(frozen=True)
class Settings:
    """How to train. Rates: `warmup` and `floor` are shares of the steps and of the peak. Raises ValueError."""

    learning_rate: float = 1e-3
    warmup: float = 0.03
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0  # of matrices; never of norm factors
    row_rate: float = 1 / 32  # of an adapter's rows of the embedding, as a share of the rate
    clip: float = 1.0  # largest norm of the gradient
    z: float = 0.0
    end_weight: float = (
        1.0  # of a terminator's loss: its logarithm is what greedy decoding has more on the end
    )
    vocabulary: int | None = None  # so many tokens estimate the normaliser (order.Sample); None: all, exactly
    micro_tokens: int = 2048
    steps: int | None = None  # stop there; the schedule ends there too
    evaluate_every: int = 50
    patience: int = 0  # evaluations without a better loss before it stops; 0: never
    save_every: int = 20
    keep: int = 2
    seed: int = 0
    remat: Remat | Literal["auto"] = "none"  # auto: layer where activations would take more than ACTIVATIONS
    dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["float32", "bfloat16"] = (
        "bfloat16"  # of the factors of products in a step; see native/xla.py
    )

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "clip",
            "end_weight",
            "micro_tokens",
            "evaluate_every",
            "save_every",
            "keep",
            "steps",
        ):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        for name in ("weight_decay", "row_rate", "z", "patience"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)!r}")
        for name, known in (
            ("decay", ("cosine", "linear", "constant")),
            ("remat", ("auto", *get_args(Remat))),
            ("dtype", ("float32", "bfloat16")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {', '.join(known)}, got {getattr(self, name)!r}")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(
                f"vocabulary must be at least 2 tokens, or None for all, got {self.vocabulary!r}"
            )
        if not (0 <= self.warmup <= 1 and 0 <= self.floor <= 1):
            raise ValueError(f"warmup and floor must lie from 0 to 1, got {self.warmup} and {self.floor}")


@dataclass(frozen=True)
class Report:
    """What a step did. Losses are nats a target; `ends` is the share of terminators that were the likeliest token."""

    step: int  # steps done
    steps: int
    loss: float
    right: float
    ends: float | None
    targets: int
    tokens: int  # of this step
    seconds: float
    flops: float  # of this step, by `flops_of`
    learning_rate: float
    gradient_norm: float
    held_out: float | None = None  # loss on the held-out rows, where they were measured
    best: bool = False


def sparing(settings: Settings, config: ModelConfig, length: int) -> Settings:
    """With `remat` chosen, for rows of `length` tokens: what a layer keeps is some arrays as wide as the model, its heads and its
    feed-forward part."""
    if settings.remat != "auto":
        return settings
    kept = (
        4 * config.layers * (8 * config.width + 4 * config.heads * config.head_width + 4 * config.ffn_width)
    )
    return replace(
        settings, remat="layer" if max(settings.micro_tokens, length) * kept > ACTIVATIONS else "none"
    )


def flops_of(config: ModelConfig, tokens: int, length: int, targets: int, full: bool) -> float:
    """Floating-point operations that a step needs: N weights of the layers cost 2N a token ahead and 2N back (4N where
    the weights have gradients too), causal attention half of 4 N H length a layer and three times that in all, and a target
    4 V D (8 V D). What is computed twice does not count."""
    c = config
    layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_width + 3 * c.width * c.ffn_width
    attention = sum(
        2 * 3 * c.heads * c.head_width * min(length, c.layer_window(i) or length) for i in range(c.layers)
    )
    return (
        tokens * ((6 if full else 4) * c.layers * layer + attention)
        + targets * (8 if full else 4) * c.vocab * c.width
    )


def new_lora(
    config: ModelConfig,
    params: Params,
    rank: int,
    ids: Sequence[int] = (),
    alpha: float | None = None,
    seed: int = 0,
    start_from: Sequence[int] = (),
) -> Lora:
    """Adapters on all linear layers: `a` uniform as a linear layer's start, `b` zero; rows of the embedding for `ids`,
    started from those of `start_from`."""
    weights: dict[str, jax.Array] = {}
    key = jax.random.key(seed)
    for number, (name, weight) in enumerate(sorted(params.items())):
        if name.split(".")[-1] in adapters.LINEAR:
            out, inside = weight.shape
            limit = inside**-0.5
            weights[f"{name}.a"] = jax.random.uniform(
                jax.random.fold_in(key, number), (rank, inside), jnp.float32, -limit, limit
            )
            weights[f"{name}.b"] = jnp.zeros((out, rank))
    if ids:
        weights["rows"] = embed(params, jnp.asarray(list(start_from) or list(ids)), None)
    return Lora(weights, (alpha or rank) / rank, tuple(ids))


def adapter_of(lora: Lora, name: str, card: dict[str, Any]) -> adapters.Adapter:
    """The trained adapter as what the engine loads."""
    arrays = {key: np.asarray(value, np.float32) for key, value in lora.weights.items()}
    a, b = ({key[:-2]: value for key, value in arrays.items() if key.endswith(end)} for end in (".a", ".b"))
    rank = max((value.shape[0] for value in a.values()), default=1)
    return adapters.Adapter(
        name,
        rank,
        lora.scale * rank,
        a,
        b,
        {token: arrays["rows"][i] for i, token in enumerate(lora.ids)},
        card,
    )


def lora_of(adapter: adapters.Adapter) -> Lora:
    """An adapter to go on training from."""
    weights = {
        f"{name}.{part}": jnp.asarray(value)
        for part in "ab"
        for name, value in getattr(adapter, part).items()
    }
    if adapter.rows:
        weights["rows"] = jnp.asarray(np.stack([adapter.rows[token] for token in sorted(adapter.rows)]))
    return Lora(weights, adapter.scale, tuple(sorted(adapter.rows)))


def objective(
    trainable: Trainable,
    base: Params | None,
    batch: Microbatch,
    sample: Sample | None = None,
    *,
    config: ModelConfig,
    settings: Settings,
    terminators: tuple[int, ...] = (),
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Sum of the targets' losses (the terminators' weighed), and of each its loss and whether it was the likeliest token."""
    lora = trainable if isinstance(trainable, Lora) else None
    params: Params = base if lora is not None else trainable  # type: ignore[assignment]
    remat: Any = settings.remat  # which `sparing` has chosen
    hidden_BTD, _ = forward(
        params,
        batch.tokens_BT,
        config,
        lora,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        remat=remat,
        dtype=jnp.dtype(settings.dtype),
    )
    C, M = batch.index_CM.shape
    parts_CPD = hidden_BTD.reshape(C, -1, config.width)
    picked_MD = jnp.take_along_axis(parts_CPD, batch.index_CM[..., None], 1).reshape(C * M, -1)
    losses = cross_entropy(
        picked_MD,
        batch.targets_CM.reshape(-1),
        params["embed"],
        lora,
        count=batch.count_C[0] if C == 1 else None,
        cap=config.final_softcap,
        z=settings.z,
        train_table=lora is None,
        sample=sample,
    )
    live_M = (jnp.arange(M) < batch.count_C[:, None]).reshape(-1)
    ends_M = jnp.isin(batch.targets_CM.reshape(-1), jnp.asarray(terminators, jnp.int32))
    return jnp.sum(losses.nats_M * live_M * jnp.where(ends_M, settings.end_weight, 1.0)), (
        losses.nats_M,
        losses.right_M,
    )


def gradient(
    config: ModelConfig, settings: Settings, terminators: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """(trainable, base, batch, sample) -> (what `objective` gives, its gradient), ahead and back in the settings' precision."""
    both = jax.value_and_grad(
        partial(objective, config=config, settings=settings, terminators=terminators), has_aux=True
    )

    def step(*args: Any) -> Any:
        with jax.default_matmul_precision(settings.precision):
            return both(*args)

    return step


def schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0: a straight warm-up, then down to the floor."""
    warm = max(1, round(settings.warmup * steps))
    peak, rest = settings.learning_rate, max(1, steps - warm)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.floor),
        "linear": optax.linear_schedule(peak, peak * settings.floor, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.decay]
    return optax.join_schedules([lambda i: peak * (i + 1) / warm, after], [warm])


def optimizer(settings: Settings, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW behind a clip. Rows of the embedding go slower: a logit is a sum over the width, and Adam's first steps move all
    its terms at once. At 1e-3, and an L1 norm of 2,000 of the default model's last states, that is two nats a step."""
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    rows = partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "rows")
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, *settings.betas, weight_decay=settings.weight_decay, mask=matrices),
        optax.masked(optax.scale(settings.row_rate), rows),
    )


@dataclass
class Run:
    """What a training run holds between steps."""

    trainable: Trainable
    moments: Any
    step: int = 0
    best: float = float("inf")
    misses: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    config: ModelConfig,
    base: Params | None,
    trainable: Trainable,
    order: Order,
    settings: Settings,
    folder: Path,
    *,
    held_out: Sequence[Any] = (),
    resume: bool = False,
    mesh: Any = None,
    terminators: Sequence[int] = (),
    keep_best: Callable[[Trainable, Report], None] = lambda trainable, report: None,
    until: float | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Report]:
    """Trains `trainable` (a Lora over the frozen `base`, or all parameters; its arrays are used up) and reports each step.

    `folder` gets checkpoints, metrics.jsonl and loss.svg. `keep_best` is called with what was best on the held-out rows
    (sequences of rows as data.pack.Rows gives them), or at each checkpoint where there are none. `until`, of
    time.monotonic, ends the run early, after one step at least. `about` is what else a run that is resumed must have in
    common, as JSON. Raises ValueError where `folder` holds a run and `resume` is not set, or one with other settings.
    """
    settings = sparing(settings, config, max(order.length(rows) for rows in order.folders))
    steps = min(order.steps, settings.steps or order.steps)
    rate = schedule(settings, steps)
    rule = optimizer(settings, rate)
    parts = meshes.batch_parts(mesh)
    stamp = {
        "settings": asdict(replace(settings, save_every=1, keep=1)),
        "steps": steps,
        "seed": order.seed,
        "rows": [order.told(rows) for rows in order.folders],
        "batch_tokens": order.batch_tokens,
        "model": repr(config),
        "adapter": [trainable.scale, *trainable.ids] if isinstance(trainable, Lora) else None,
        "shapes": {name: value.shape for name, value in _weights(trainable).items()},
        **about,
    }
    trainable, base = meshes.place(mesh, trainable), meshes.place(mesh, base)
    run = Run(trainable, meshes.place(mesh, rule.init(trainable)))
    where, moments_where = (
        jax.tree.map(lambda leaf: leaf.sharding if mesh else None, tree) for tree in (trainable, run.moments)
    )
    graded = jax.jit(
        gradient(config, settings, tuple(terminators)),
        out_shardings=(None, where),
        compiler_options=compiler_options(settings),
    )
    size = settings.vocabulary or config.vocab
    sampler = order.sampler(size, config.vocab) if size < config.vocab else None
    loss = jax.jit(partial(objective, config=config, settings=settings))
    total = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(where, moments_where, None))
    def update(trainable: Trainable, moments: Any, gradients: Trainable, count: jax.Array) -> Any:
        gradients = jax.tree.map(lambda g: g / count, gradients)
        changes, moments = rule.update(gradients, moments, trainable)
        return optax.apply_updates(trainable, changes), moments, optax.tree.norm(gradients)

    settling = iter(range(SETTLING))

    def step() -> Report:
        started = time.perf_counter()
        rows = order.rows(run.step)
        length = order.length(rows)
        if (most := max(int(row["tokens"].max()) for row in rows)) >= config.vocab:
            raise ValueError(
                f"the rows hold token {most:,}, but the model's are below {config.vocab:,}: build them with its own "
                "tokenizer"
            )
        summed: Any = None
        seen = Tally(terminators)
        batches = list(_batches(rows, settings, parts))
        sample = sampler(run.step, batches) if sampler else None
        for batch in batches:
            (_, told), grown = graded(run.trainable, base, meshes.place_batch(mesh, batch), sample)
            seen.add(batch, *told)
            summed = grown if summed is None else total(summed, grown)
            if next(settling, None) is not None:
                give_back()
        if not np.isfinite(seen.loss):
            raise ValueError(
                f"step {run.step + 1}: the loss is {seen.loss}: training diverged: lower --learning-rate and begin "
                "again in another folder"
            )
        run.trainable, run.moments, norm = update(
            run.trainable, run.moments, summed, jnp.float32(max(seen.targets, 1))
        )
        run.step += 1
        tokens = len(rows) * length
        return Report(
            run.step,
            steps,
            seen.loss,
            seen.right,
            seen.ends,
            seen.targets,
            tokens,
            time.perf_counter() - started,
            flops_of(config, tokens, length, seen.targets, not isinstance(trainable, Lora)),
            float(rate(run.step - 1)),
            float(norm),
        )

    def measured(report: Report) -> Report:
        found = _held_out(loss, run.trainable, base, held_out, settings, mesh)
        best = found < run.best
        run.misses = 0 if best else run.misses + 1
        run.best = min(run.best, found)
        return replace(report, held_out=found, best=best)

    def finished() -> bool:
        return run.step >= steps or 0 < settings.patience <= run.misses

    store = Store(folder, settings.keep, stamp, resume)
    try:
        store.restore(run)
        over = finished()
        while not over:
            with meshes.use(mesh):  # not while the caller has the report
                report = step()
                over = finished() or until is not None and time.monotonic() > until
                if held_out and (over or run.step % settings.evaluate_every == 0):
                    report = measured(report)
                    over = over or finished()
                saves = over or run.step % settings.save_every == 0
                store.log(run, report)
                if report.best or not held_out and saves:
                    keep_best(run.trainable, report)
                if saves:
                    store.save(run)
            yield report
    finally:
        store.close()


def compiler_options(settings: Settings) -> dict[str, str]:
    """On a CPU, XLA computes again as early as it can what `remat` wants to have late, and saves nothing, unless it is told
    to mind memory. Without remat there is nothing to gain by it."""
    again = settings.remat != "none" and jax.default_backend() == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if again else {}


def hold_memory() -> None:
    """glibc gives a step's large buffers back to the system, which then clears every page of them again for the next step:
    a fifth of the time on a CPU. To be called before JAX starts its threads: one that has its own arena by then goes on
    so. Elsewhere there is no mallopt, and nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (-4, 0),
            (-1, -1),
            (-8, 1),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h
            mallopt(option, value)


def give_back() -> None:
    """What is free by now, to the system. Where a small buffer that lives on lies in a large one's place, the next large one
    takes new ground; once all buffers that live on have their places, the same ground serves every step."""
    with suppress(AttributeError, OSError, TypeError):
        trim = ctypes.CDLL(None).malloc_trim
        time.sleep(0.05)  # JAX frees what a call used a moment after its results are there
        trim(0)


class Tally:
    """Sums over the targets of a step."""

    def __init__(self, terminators: Sequence[int]) -> None:
        self._ids = list(terminators)
        self.targets = self._right = self._ends = self._ended = 0
        self._nats = 0.0

    def add(self, batch: Microbatch, nats_M: jax.Array, right_M: jax.Array) -> None:
        live = (np.arange(batch.index_CM.shape[1]) < batch.count_C[:, None]).reshape(-1)
        nats, right, targets = whole(nats_M)[live], whole(right_M)[live], batch.targets_CM.reshape(-1)[live]
        ends = np.isin(targets, self._ids)
        self.targets += len(targets)
        self._nats += float(nats.sum(dtype=np.float64))
        self._right += int(right.sum())
        self._ends += int(ends.sum())
        self._ended += int(right[ends].sum())

    @property
    def loss(self) -> float:
        return self._nats / max(self.targets, 1)

    @property
    def right(self) -> float:
        return self._right / max(self.targets, 1)

    @property
    def ends(self) -> float | None:
        return self._ended / self._ends if self._ends else None


def whole(array: jax.Array) -> np.ndarray:
    """Its values, of which this process may have a share only: then every process must ask."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _batches(rows: Sequence[dict[str, np.ndarray]], settings: Settings, parts: int) -> Iterator[Microbatch]:
    length = len(rows[0]["tokens"])
    size = min(len(rows), max(1, settings.micro_tokens // length))
    return microbatches(rows, -(-size // parts) * parts, parts, BLOCK)


def _held_out(
    loss: Any,
    trainable: Trainable,
    base: Params | None,
    held_out: Sequence[Any],
    settings: Settings,
    mesh: Any,
) -> float:
    seen = Tally(())
    for rows in held_out:
        for batch in _batches([rows[i] for i in range(len(rows))], settings, meshes.batch_parts(mesh)):
            seen.add(batch, *loss(trainable, base, meshes.place_batch(mesh, batch))[1])
    return seen.loss


class Store:
    """Checkpoints (Orbax, written beside the run; only committed ones count) and the metrics of each step."""

    def __init__(self, folder: Path, keep: int, stamp: dict[str, Any], resume: bool) -> None:
        import orbax.checkpoint as ocp

        self._ocp, self._stamp = ocp, json.loads(json.dumps(stamp))
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        self.first = jax.process_index() == 0
        if self.metrics.exists() and self.metrics.stat().st_size and not resume:
            raise ValueError(
                f"{folder} holds a training run: pass --resume to go on with it, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.manager = ocp.CheckpointManager(
            (folder / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def restore(self, run: Run) -> None:
        """Puts the newest committed checkpoint into the run, where there is one. Raises ValueError on other settings."""
        ocp, manager = self._ocp, self.manager
        manager.reload()
        step = manager.latest_step()
        if step is None:
            if self.first:
                self.metrics.write_text("")
            return
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        # a run from before there was a choice of precision had float32
        was, now = (
            {"precision": "float32", **stamp["settings"], **stamp} for stamp in (meta["stamp"], self._stamp)
        )
        changed = sorted(key for key in was.keys() & now.keys() - {"settings"} if was[key] != now[key])
        if changed:
            shown = "; ".join(f"{key} {was[key]!r:.60}, not {now[key]!r:.60}" for key in changed)
            raise ValueError(
                f"{self.folder} holds a run with other options ({shown}): resume it with its own, or "
                "choose another folder"
            )
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(run))
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
        trained = state["trainable"]
        run.trainable = (
            replace(run.trainable, weights=trained) if isinstance(run.trainable, Lora) else trained
        )
        run.moments, run.step, run.misses = state["moments"], step, meta["misses"]
        run.best = float("inf") if meta["best"] is None else meta["best"]
        lines = self.metrics.read_text().splitlines()[:step]
        run.history = [json.loads(line) for line in lines]
        if self.first:
            self.metrics.write_text("".join(line + "\n" for line in lines))

    def log(self, run: Run, report: Report) -> None:
        run.history.append(asdict(report))
        if self.first:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(run.history[-1]) + "\n")

    def save(self, run: Run) -> None:
        """Starts to write a checkpoint; the next one, or `close`, waits for it."""
        ocp = self._ocp
        meta = {
            "stamp": self._stamp,
            "misses": run.misses,
            "best": run.best if np.isfinite(run.best) else None,
            "jax": jax.__version__,
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(_arrays(run)), meta=ocp.args.JsonSave(meta))
        self.manager.save(run.step, args=args)
        if self.first:
            (self.folder / "loss.svg").write_text(draw(run.history))

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def _weights(trainable: Trainable) -> dict[str, Any]:
    return trainable.weights if isinstance(trainable, Lora) else trainable  # type: ignore[return-value]


def _arrays(run: Run) -> dict[str, Any]:
    return {"trainable": _weights(run.trainable), "moments": run.moments}
