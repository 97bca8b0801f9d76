"""Tiny training runs for tests/test_train.py; as a program, one in a process of its own: training.py FOLDER OPTIONS."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import reference
from tiny import tiny_config

from codegemma.checkpoints.table import Tensor
from codegemma.config import ModelConfig
from codegemma.data.pack import positions
from codegemma.jax.forward import Lora
from codegemma.native.xla import Blocks
from codegemma.train import mesh as meshes
from codegemma.train.loop import Settings, new_lora, train
from codegemma.train.order import Order

RATE = 3e-3
LENGTH = 32


@dataclass(frozen=True)
class Job:
    """Options of a run, beside the tiny model and its rows."""

    kind: str = "full"  # lora: over floats, in JAX alone; qlora: over blocks (of floats), by the kernels
    steps: int = 3
    stop: int = 0  # the step after which it is left
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


def packed_row(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two segments and padding, loss on most tokens."""
    at = np.arange(LENGTH)
    segments = np.select([at < rng.integers(8, 16), at < rng.integers(20, LENGTH)], [1, 2], 0).astype(
        np.int32
    )
    return row(
        np.where(segments, rng.integers(3, 520, LENGTH), 0),
        (rng.random(LENGTH) < 0.8) & (segments > 0),
        segments,
    )


class InOrder(Order):
    """Rows as they stand."""

    def rows(self, step: int) -> list[dict[str, np.ndarray]]:
        batch = self.batch(self.folders[0])
        return list(self.folders[0][step * batch : (step + 1) * batch])


def run(folder: Path, job: Job) -> tuple[dict[str, np.ndarray], list[float]]:
    """Final weights and the losses of all steps."""
    config, params = tiny()
    rng = np.random.default_rng(5)
    rows = [packed_row(rng) for _ in range(40)]
    lora = new_lora(config, params, 4, (67, 69), alpha=8) if job.kind != "full" else None
    if job.kind == "qlora":
        params = {
            name: Blocks.of(Tensor.of(np.asarray(value))) if value.ndim == 2 else value
            for name, value in params.items()
        }
    if lora:  # `b` is zero in a new one, which hides half of the gradients
        lora = Lora(
            {
                name: jax.random.normal(jax.random.key(3), value.shape) * 0.1
                if name.endswith(".b")
                else value
                for name, value in lora.weights.items()
            },
            lora.scale,
            lora.ids,
        )
    settings = Settings(
        learning_rate=job.learning_rate,
        micro_tokens=job.micro_tokens,
        steps=job.steps,
        patience=job.patience,
        seed=job.seed,
        evaluate_every=1,
        save_every=2,
        precision=job.precision,
    )
    for report in train(
        config,
        params if lora else None,
        lora or params,
        Order([rows], 8 * LENGTH, job.seed, epochs=4),
        settings,
        folder,
        held_out=[rows[:3]] if job.held_out else (),
        resume=job.resume,
        mesh=meshes.parse(job.mesh),
    ):
        assert report.step <= job.steps
        say(job, f"step {report.step}")
        if report.step == job.stop:
            break
    return result(folder)


def result(folder: Path) -> tuple[dict[str, np.ndarray], list[float]]:
    found = {
        name.removeprefix("trainable/"): value
        for name, value in state(folder).items()
        if name.startswith("trainable/")
    }
    return found, [line["loss"] for line in metrics(folder)]


def state(folder: Path) -> dict[str, np.ndarray]:
    """All that the newest checkpoint holds."""
    path = (
        folder
        / "checkpoints"
        / max((p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), key=int)
        / "state"
    ).resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = checkpointer.restore(path, restore_args=wanted)
    return {
        "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys): np.asarray(value)
        for keys, value in jax.tree_util.tree_flatten_with_path(found)[0]
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without the time that steps took."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def say(job: Job, text: str) -> None:
    if job.announce:
        print(text, flush=True)


def hold(job: Job) -> None:
    """The checkpoint of one step is written, but stops before it is committed, until somebody kills this process."""
    rename = os.rename

    def held(source: Any, target: Any, **options: Any) -> None:
        if os.path.basename(target) == str(job.hold):
            say(job, f"write {job.hold}")
            threading.Event().wait()
        rename(source, target, **options)

    os.rename = os.replace = held  # type: ignore[assignment]


def all_meshes(folder: Path, job: Job) -> None:
    from codegemma.train import loop

    parts: dict[str, dict[str, int]] = {}
    original = loop.Store.save

    def save(store: Any, held: Any) -> None:
        weights = held.trainable if isinstance(held.trainable, dict) else {}
        if weights:
            moments = held.moments[1][0].mu
            parts[mesh] = {
                "embed": divided(weights["embed"]),
                "q": divided(weights["layers.0.q"]),
                "norm": divided(weights["final_norm"]),
                "moment of down": divided(moments["layers.0.down"]),
            }
        original(store, held)

    loop.Store.save = save  # type: ignore[method-assign]
    for mesh in job.meshes:
        run(folder / f"full {mesh}", Job(mesh=mesh))
    loop.Store.save = original  # type: ignore[method-assign]
    run(folder / f"lora {mesh}", Job("lora", mesh=mesh))
    run(folder / "moved", Job(mesh=job.meshes[0], stop=2))
    run(folder / "moved", Job(mesh=job.meshes[1], resume=True))
    print(json.dumps(parts))


def divided(array: jax.Array) -> int:
    """How many different parts of it the devices hold."""
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
