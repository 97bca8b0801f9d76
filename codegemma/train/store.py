"""What a run keeps on disk: checkpoints, the metrics of each step, the loss curve."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codegemma.jax.forward import LoraParams
from codegemma.train.curve import draw
from codegemma.train.objective import Trainable


@dataclass
class RunState:
    """A run's state between steps. `misses` counts the measurements since the one with the `best` loss."""

    trainable: Trainable
    moments: Any
    step: int = 0
    best: float = float("inf")
    misses: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Any]:
        """The trained arrays by name."""
        return self.trainable.weights if isinstance(self.trainable, LoraParams) else self.trainable  # type: ignore[return-value]

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that a checkpoint holds."""
        return {"trainable": self.weights, "moments": self.moments}


class Store:
    """A run's folder: checkpoints/ (Orbax; only committed ones count), metrics.jsonl and loss.svg.

    `stamp`, a JSON object, must be equal in a run and its resumption. Raises ValueError where the folder
    holds a run and `resume` is not set.
    """

    def __init__(self, folder: Path, keep: int, stamp: dict[str, Any], resume: bool) -> None:
        import orbax.checkpoint as ocp

        self._ocp, self._stamp = ocp, json.loads(json.dumps(stamp))
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self.saved_step = 0  # of the newest checkpoint
        if self.metrics.exists() and self.metrics.stat().st_size and not resume:
            raise ValueError(
                f"{folder} holds a training run: pass --resume to continue it, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)

    def restore(self, state: RunState) -> None:
        """Puts the newest committed checkpoint, if there is one, into `state`.

        Raises ValueError where that run had another stamp.
        """
        ocp, manager = self._ocp, self._manager
        manager.reload()
        step = manager.latest_step()
        if step is None:
            if self._writes:
                self.metrics.write_text("")
            return
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        self._check(meta["stamp"])
        shapes = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state.arrays))
        arrays = manager.restore(step, args=ocp.args.Composite(state=shapes))["state"]
        trainable, weights = state.trainable, arrays["trainable"]
        is_lora = isinstance(trainable, LoraParams)
        state.trainable = replace(trainable, weights=weights) if is_lora else weights  # type: ignore[type-var]
        state.moments, state.step, state.misses = arrays["moments"], step, meta["misses"]
        self.saved_step = step
        state.best = float("inf") if meta["best"] is None else meta["best"]
        lines = self.metrics.read_text().splitlines()[:step]
        state.history = [json.loads(line) for line in lines]
        if self._writes:
            self.metrics.write_text("".join(line + "\n" for line in lines))

    def _check(self, stamp: dict[str, Any]) -> None:
        # a stamp without a precision is older than that setting: its run computed in float32
        old, new = ({"precision": "float32", **each["settings"], **each} for each in (stamp, self._stamp))
        changed = sorted(key for key in old.keys() & new.keys() - {"settings"} if old[key] != new[key])
        if changed:
            shown = "; ".join(f"{key} {old[key]!r:.60}, not {new[key]!r:.60}" for key in changed)
            rule = f"{self.folder} holds a run with other options ({shown})"
            raise ValueError(f"{rule}: resume it with its own, or choose another folder")

    def log(self, state: RunState, metrics: dict[str, Any]) -> None:
        """Appends the metrics of a step."""
        state.history.append(metrics)
        if self._writes:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save(self, state: RunState) -> None:
        """Draws the loss curve and begins to write a checkpoint; the next call, or `close`, waits for it."""
        ocp = self._ocp
        best = state.best if np.isfinite(state.best) else None
        meta = {"stamp": self._stamp, "misses": state.misses, "best": best, "jax": jax.__version__}
        self.saved_step = state.step
        arrays, about = ocp.args.StandardSave(state.arrays), ocp.args.JsonSave(meta)
        self._manager.save(state.step, args=ocp.args.Composite(state=arrays, meta=about))
        if self._writes:
            draw(state.history, self.folder / "loss.svg")

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
