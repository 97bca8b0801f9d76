"""What a run keeps on disk: checkpoints, the metrics of each step, the loss curve."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codegemma.files import atomic_write, remove_leftovers
from codegemma.train.curve import draw
from codegemma.train.objective import Trainable, weights_of, with_weights

_ERROR_NUMBER = re.compile(r"os_error_code='(\d+)'")  # in a message of TensorStore, which writes for Orbax


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
        return weights_of(self.trainable)

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that a checkpoint holds."""
        return {"trainable": self.weights, "moments": self.moments}


class Store:
    """A run's folder: checkpoints/ (Orbax; only committed ones count), metrics.jsonl and loss.svg.

    `stamp`, a JSON object, must be equal in a run and its resumption. Raises ValueError where the folder
    holds a run and `resume` is not set. Where the disk refuses a write, `log`, `save` and `close` raise
    an OSError that names the file or folder.
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
        if self._writes:
            remove_leftovers(folder)
        _hide_failures_of_threads()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._checkpoints = (folder / "checkpoints").resolve()
        with disk_errors_name(self._checkpoints):
            self._manager = ocp.CheckpointManager(self._checkpoints, options=options)

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
        arrays = self._arrays(step, state)
        state.trainable = with_weights(state.trainable, arrays["trainable"])
        state.moments, state.step, state.misses = arrays["moments"], step, meta["misses"]
        self.saved_step = step
        state.best = float("inf") if meta["best"] is None else meta["best"]
        old = self.metrics.read_text()
        lines = old.splitlines()[:step]
        state.history = [json.loads(line) for line in lines]
        if self._writes and (text := "".join(line + "\n" for line in lines)) != old:
            with atomic_write(self.metrics) as file:  # a full disk must not lose the lines
                file.write(text.encode())

    def _arrays(self, step: int, state: RunState) -> dict[str, Any]:
        """The arrays of a checkpoint, placed as those of `state` are."""
        ocp = self._ocp
        shapes = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state.arrays))
        return self._manager.restore(step, args=ocp.args.Composite(state=shapes))["state"]  # type: ignore[no-any-return]

    def mean(self, state: RunState, others: int) -> Trainable:
        """The mean of the trained weights now and at up to `others` checkpoints, the newest before now."""
        if not others:
            return state.trainable
        with disk_errors_name(self._checkpoints):
            self._manager.wait_until_finished()
        older = sorted(step for step in self._manager.all_steps() if step < state.step)[-others:]
        total = state.weights
        for step in older:
            total = jax.tree.map(jnp.add, total, self._arrays(step, state)["trainable"])
        return with_weights(state.trainable, jax.tree.map(lambda sum: sum / (len(older) + 1), total))

    def computed_once(self, name: str, of: object, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that a run with this stamp computes once and keeps in its folder.

        `of`: what it is computed from beside the stamp, as JSON holds it.
        """
        digest = hashlib.sha256(json.dumps([self._stamp, of], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name}-{digest[:12]}.npy"
        if path.exists():
            return np.load(path)  # type: ignore[no-any-return]
        values = compute()
        if self._writes:
            with disk_errors_name(path), atomic_write(path) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
        return values

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
            with disk_errors_name(self.metrics), open(self.metrics, "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save(self, state: RunState) -> None:
        """Draws the loss curve and begins to write a checkpoint; the next call, or `close`, waits for it."""
        ocp = self._ocp
        best = state.best if np.isfinite(state.best) else None
        meta = {"stamp": self._stamp, "misses": state.misses, "best": best, "jax": jax.__version__}
        self.saved_step = state.step
        arrays, about = ocp.args.StandardSave(state.arrays), ocp.args.JsonSave(meta)
        with disk_errors_name(self._checkpoints):
            self._manager.save(state.step, args=ocp.args.Composite(state=arrays, meta=about))
        if self._writes:
            draw(state.history, self.folder / "loss.svg")

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        with disk_errors_name(self._checkpoints):
            self._manager.wait_until_finished()
            self._manager.close()


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Raises an error that the operating system caused as an OSError that names `path`.

    An OSError that names a file already, and any other error, pass unchanged. A failed write names no file,
    and Orbax raises ValueError with a message of TensorStore.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number is None or isinstance(error, OSError) and error.filename is not None:
            raise
        _release(error)
        raise OSError(number, os.strerror(number), str(path)) from error


def _release(error: BaseException | None) -> None:
    """Frees the coroutines that failed threads of Orbax hold: Python would report them at exit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()


def _error_number(error: BaseException | None) -> int | None:
    """The `errno` in an error or in one that caused it; None if the operating system caused none of them."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := _ERROR_NUMBER.search(str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def _hide_failures_of_threads() -> None:
    """Keeps the tracebacks of Orbax's and TensorStore's threads off the terminal.

    Nothing is lost: `Store` raises the first error of a checkpoint where it waits for it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_showing)
    hook = sys.unraisablehook
    if not (isinstance(hook, partial) and hook.func is _report_unraisable):
        sys.unraisablehook = partial(_report_unraisable, hook)


def _report_unraisable(report: Callable[[Any], object], unraisable: Any) -> None:
    """Calls `report`, except where TensorStore calls a loop of Orbax that a failure has closed."""
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """False for a traceback or a lost task of Orbax, as its threads and their asyncio loops log them."""
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    is_lost_task = record.name == "asyncio" and "orbax" in record.getMessage()
    return not (is_lost_task or any("orbax" in frame.f_code.co_filename for frame, _ in frames))
