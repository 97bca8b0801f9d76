"""Tiny training runs for tests/test_train.py; as a program, one run in its own process: FOLDER OPTIONS."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import reference
from tiny import tiny_config

from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.config import ModelConfig
from codegemma.data.pack import positions
from codegemma.jax.compiler import configure_xla
from codegemma.jax.forward import LoraParams
from codegemma.native.xla import StoredMatrix
from codegemma.train import mesh as meshes
from codegemma.train.lora import new_lora
from codegemma.train.order import Order
from codegemma.train.session import Session
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import RunState, Store

configure_xla()  # before the first test computes

RATE = 3e-3
LENGTH = 32


@dataclass(frozen=True)
class Job:
    """Options of a run, beside the tiny model and its rows."""

    # lora: over floats, in JAX alone; qlora: over blocks (of floats), layers: by the kernels
    kind: str = "full"
    steps: int = 3
    stop: int = 0  # the step after which the run is abandoned; 0: none
    micro_tokens: int = 4 * LENGTH
    learning_rate: float = RATE
    patience: int = 0
    seed: int = 0
    held_out: bool = False
    resume: bool = False
    mesh: str | None = None
    host: tuple[str, int, int] | None = None
    meshes: tuple[str, ...] = ()
    announce: bool = False
    precision: str = "float32"
    hold: int = 0  # the step whose checkpoint is never finished
    average: int = 1


def tiny() -> tuple[ModelConfig, dict[str, jax.Array]]:
    config = tiny_config("gemma3", layers=2, global_every=2, width=32, head_width=16, ffn_width=48, vocab=520)
    return config, {name: jnp.asarray(value) for name, value in reference.random_params(config, 0).items()}


def row(tokens: np.ndarray, loss: np.ndarray, segments: np.ndarray | None = None) -> dict[str, np.ndarray]:
    segments = np.ones(len(tokens), np.int32) if segments is None else segments
    return {
        "tokens": tokens.astype(np.int32),
        "loss": loss.astype(bool),
        "segments": segments,
        "positions": positions(segments),
    }


def stored(values: jax.Array) -> StoredMatrix:
    """Floats as the kernels read them from a file."""
    return StoredMatrix.of(ArrayTensor.of(np.asarray(values)))


def layers(params: dict[str, jax.Array], ids: tuple[int, ...]) -> tuple[dict[str, Any], LoraParams]:
    """(the frozen embedding, all other parameters and the embedding's rows of `ids`)."""
    others = {name: value for name, value in params.items() if name != "embed"}
    rows = params["embed"][jnp.array(ids)]
    return {"embed": stored(params["embed"])}, LoraParams(others | {"rows": rows}, 1.0, ids)


def packed_row(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two segments and padding, loss on most tokens."""
    index = np.arange(LENGTH)
    segments = np.select([index < rng.integers(8, 16), index < rng.integers(20, LENGTH)], [1, 2], 0)
    tokens = np.where(segments, rng.integers(3, 520, LENGTH), 0)
    return row(tokens, (rng.random(LENGTH) < 0.8) & (segments > 0), segments.astype(np.int32))


def check_gradient(
    objective: Any,
    layers: LoraParams,
    base: dict[str, Any],
    batch: Any,
    weights: dict[str, np.ndarray],
    exactly: Callable[[dict[str, np.ndarray]], float],
    names: Sequence[str],
) -> None:
    """The loss and, along a random direction for each of the parameters, its slope, are those in float64."""
    (loss, _), gradient = jax.jit(objective.gradient)(layers, base, batch)
    exact = {name: np.asarray(value, np.float64) for name, value in (weights | layers.weights).items()}
    assert abs(float(loss) / exactly(exact) - 1) < 2.0**-18
    rng = np.random.default_rng(9)
    for name in names:
        slope = np.asarray(gradient.weights[name], np.float64)
        direction = rng.standard_normal(slope.shape) / np.sqrt(slope.size)
        ends = [exactly(exact | {name: exact[name] + step * direction}) for step in (1e-5, -1e-5)]
        error = 2**10 * 2.0**-24 * np.linalg.norm(slope)  # as for steps; the direction's length is 1
        assert abs((slope * direction).sum() - (ends[0] - ends[1]) / 2e-5) < error, name


class InOrder(Order):
    """Rows in their own order."""

    def rows(self, step: int) -> list[dict[str, np.ndarray]]:
        batch = self.rows_per_step(self.folders[0])
        return list(self.folders[0][step * batch : (step + 1) * batch])


def run(folder: Path, job: Job) -> tuple[dict[str, np.ndarray], list[float]]:
    """Final weights and the losses of all steps."""
    config, params = tiny()
    rng = np.random.default_rng(5)
    rows = [packed_row(rng) for _ in range(40)]
    lora = new_lora(params, 4, (67, 69), alpha=8) if job.kind != "full" else None
    if job.kind == "qlora":
        params = {name: stored(value) if value.ndim == 2 else value for name, value in params.items()}
    if job.kind == "layers":
        params, lora = layers(params, (67, 69))
    if lora:  # in a new adapter `b` is zero, which makes half of the gradients zero
        key = jax.random.key(3)
        weights = {
            name: jax.random.normal(key, value.shape) * 0.1 if name.endswith(".b") else value
            for name, value in lora.weights.items()
        }
        lora = LoraParams(weights, lora.scale, lora.ids)
    settings = TrainingSettings(
        learning_rate=job.learning_rate,
        micro_tokens=job.micro_tokens,
        steps=job.steps,
        patience=job.patience,
        seed=job.seed,
        evaluate_every=1,
        save_every=2,
        precision=job.precision,
        average=job.average,
    )
    with Session(
        config,
        params if lora else None,
        lora or params,
        Order([rows], 8 * LENGTH, job.seed, epochs=4),
        settings,
        folder,
        resume=job.resume,
        held_out=[rows[:3]] if job.held_out else (),
        mesh=meshes.make(job.mesh),
    ) as session:

        def save(trained: Any, _: object) -> None:
            np.savez(folder / "result.npz", **(trained.weights if lora else trained))

        for report in session.train(save if job.mesh is None else lambda *_: None):
            assert report.step <= job.steps
            say(job, f"step {report.step}")
            if report.step == job.stop:
                break
    return result(folder)


def result(folder: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], list[float]]:
    """Weights of a checkpoint, by default the newest, and the losses of all steps."""
    prefix, arrays = "trainable/", state(folder, step)
    weights = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    return weights, [line["loss"] for line in metrics(folder)]


def state(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by default the newest."""
    checkpoints = folder / "checkpoints"
    step = step or max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    path = (checkpoints / str(step) / "state").resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(path, restore_args=arguments)
    return {
        "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys): np.asarray(value)
        for keys, value in jax.tree_util.tree_flatten_with_path(arrays)[0]
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the time of each step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def say(job: Job, text: str) -> None:
    if job.announce:
        print(text, flush=True)


def hold(job: Job) -> None:
    """Writes the checkpoint of one step, but stops before it is committed, until this process is killed."""
    rename = os.rename

    def held(source: Any, target: Any, **options: Any) -> None:
        if os.path.basename(target) == str(job.hold):
            say(job, f"write {job.hold}")
            threading.Event().wait()
        rename(source, target, **options)

    os.rename = os.replace = held  # type: ignore[assignment]


def all_meshes(folder: Path, job: Job) -> None:
    """Runs on each mesh, and prints into how many parts each divides some parameters and moments."""
    parts: dict[str, dict[str, int]] = {}
    save = Store.save

    def counting(store: Store, state: RunState) -> None:
        moments = state.moments[1][0].mu
        parts[mesh] = {
            "embed": divided(state.weights["embed"]),
            "q": divided(state.weights["layers.0.q"]),
            "norm": divided(state.weights["final_norm"]),
            "moment of down": divided(moments["layers.0.down"]),
        }
        save(store, state)

    Store.save = counting  # type: ignore[method-assign]
    for mesh in job.meshes:
        run(folder / f"full {mesh}", Job(mesh=mesh))
    Store.save = save  # type: ignore[method-assign]
    run(folder / f"lora {mesh}", Job("lora", mesh=mesh))
    run(folder / "moved", Job(mesh=job.meshes[0], stop=2))
    run(folder / "moved", Job(mesh=job.meshes[1], resume=True))
    print(json.dumps(parts))


def divided(array: jax.Array) -> int:
    """How many different parts of an array the devices hold."""
    return len({str(shard.index) for shard in array.addressable_shards})


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[2]))
    if job.host:
        jax.distributed.initialize(*job.host)
    if job.hold:
        hold(job)
    if job.meshes:
        all_meshes(Path(sys.argv[1]), job)
    else:
        say(job, "start")
        run(Path(sys.argv[1]), job)
