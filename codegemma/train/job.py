"""A training job from its options to its result: model, rows, loop, adapter or checkpoint with a card.

`run` is what the CLI, `tune` and tools/adapter_train.py call. The law it keeps: the result is written whole or not at all, and
says what it was made of.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from codegemma import hub
from codegemma.adapters import adapter as lora
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.checkpoints.huggingface import read_json
from codegemma.checkpoints.table import ELEMENTS, Tensor, plain
from codegemma.convert.convert import save
from codegemma.data.pack import Rows
from codegemma.files import building
from codegemma.generate.model import identity
from codegemma.jax.forward import Lora, Params, embed, params_of
from codegemma.native.xla import kernels
from codegemma.prompts import Layout, fim_stops
from codegemma.tokenizer import FIM_NAMES
from codegemma.train import mesh as meshes
from codegemma.train import sft
from codegemma.train.loop import (
    Report,
    Settings,
    Trainable,
    adapter_of,
    hold_memory,
    lora_of,
    new_lora,
    train,
    whole,
)
from codegemma.train.order import Order


@dataclass(frozen=True)
class Plan:
    """What to train on what. `kind`: all parameters, an adapter over bfloat16 weights, or one over the file's blocks."""

    model: str
    sources: tuple[str, ...]
    out: Path
    settings: Settings
    chat: bool = False
    kind: Literal["full", "lora", "qlora"] = "lora"
    rank: int = 32
    alpha: float | None = None
    adapter: Path | None = None
    batch_tokens: int = 16_384
    length: int = 2048
    epochs: float = 1.0
    held_out: Path | None = None
    mesh: str | None = None
    tensorboard: bool = False
    name: str = ""
    orders: tuple[Layout, ...] = ("psm", "spm")  # of the examples, as the adapter's card will say

    def __post_init__(self) -> None:
        if self.kind == "full" and (self.adapter or self.alpha is not None or self.settings.vocabulary):
            raise ValueError(
                "--adapter, --lora-alpha and --vocabulary are for adapters: leave them out, or --full"
            )
        if self.alpha is not None and (self.adapter or not 0 < abs(self.alpha) < 1e9):
            raise ValueError(
                f"--lora-alpha is a finite number other than 0, for a new adapter alone, got {self.alpha}"
                + (f" for {self.adapter}: leave it out" if self.adapter else "")
            )
        if self.settings.patience and not self.held_out:
            raise ValueError("--patience counts measurements on held-out rows: pass --held-out too")

    @property
    def result(self) -> Path:
        return self.out / ("model" if self.kind == "full" else "adapter")


def run(
    plan: Plan,
    resume: bool = False,
    tell: Callable[[Report], None] = lambda report: None,
    until: float | None = None,
) -> Path:
    """Trains and gives the folder of the result. `until` (of time.monotonic) stops it early, keeping what it has."""
    checkpoint, mesh = _checkpoint(plan.model), _mesh(plan)
    if jax.process_index() == 0 and (new := _newer(plan)).exists() and not plan.result.exists():
        new.rename(plan.result)  # stopped between the two
    order, held_out, skipped = _order(plan)
    blocks: Any = (
        "own"
        if plan.kind == "qlora"
        else "floats"
        if plan.kind == "lora" and mesh is None and kernels()
        else "none"
    )
    base = params_of(checkpoint, np.float32 if plan.kind == "full" else None, blocks)
    trainable = _start(plan, checkpoint, base)
    terminators = sorted(fim_stops(checkpoint.tokenizer)) if checkpoint.tokenizer else []
    started = time.monotonic()
    card = {
        "base": plan.model,
        "rows": [str(Path(source).name) for source in plan.sources],
        "seed": plan.settings.seed,
        "learning_rate": plan.settings.learning_rate,
        "batch_tokens": plan.batch_tokens,
        "skipped": skipped,
    }

    def keep(trained: Trainable, report: Report) -> None:
        told = card | {
            "steps": report.step,
            "loss": report.loss,
            "held_out": report.held_out,
            "hours": round((time.monotonic() - started) / 3600, 3),
        }
        if not plan.chat:
            told["fim"] = {order: order in plan.orders for order in ("psm", "spm")}
        trained = jax.tree.map(whole, trained)
        if jax.process_index() == 0:
            _write(plan, checkpoint, trained, told)

    writer = _tensorboard(plan.out) if plan.tensorboard and jax.process_index() == 0 else None
    reports = train(
        checkpoint.config,
        None if plan.kind == "full" else base,
        trainable,
        order,
        plan.settings,
        plan.out,
        held_out=held_out,
        resume=resume,
        mesh=mesh,
        terminators=terminators,
        keep_best=keep,
        until=until,
        about={"base": identity(checkpoint), "kind": plan.kind},
    )
    for report in reports:
        tell(report)
        if writer:
            for name in ("loss", "right", "learning_rate", "gradient_norm", "held_out"):
                if (value := getattr(report, name)) is not None:
                    writer.add_scalar(name, value, report.step)
    return plan.result


def steps_of(plan: Plan) -> int:
    order = _order(plan)[0]
    return min(order.steps, plan.settings.steps or order.steps)


def left_out(plan: Plan) -> int:
    """Dialogues that are too long or have no answer."""
    return _order(plan)[2]


@lru_cache(maxsize=2)
def _checkpoint(model: str) -> Checkpoint:
    return open_checkpoint(hub.resolve(model))


def _mesh(plan: Plan) -> Any:
    """Asks JAX for its devices, which starts its threads."""
    hold_memory()
    return meshes.parse(plan.mesh)


@lru_cache(maxsize=2)
def _order(plan: Plan) -> tuple[Order, list[Any], int]:
    """The rows to learn from, those to measure on, and how many dialogues were left out."""
    parts = meshes.batch_parts(_mesh(plan))
    skipped = 0
    if plan.chat:
        tokenizer = _checkpoint(plan.model).tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{plan.model} has no tokenizer to read chats with: put its tokenizer.model beside it"
            )
        folders: Sequence[Any] = []
        for source in plan.sources:
            rows, left = sft.rows(sft.read(Path(source)), tokenizer, plan.length)
            folders, skipped = [*folders, rows], skipped + left
        held: list[Any] = []
        if plan.held_out:
            rows, left = sft.rows(sft.read(plan.held_out), tokenizer, plan.length)
            held, skipped = [rows], skipped + left
    else:
        folders = [_rows(source, plan.model) for source in plan.sources]
        held = [_rows(plan.held_out, plan.model)] if plan.held_out else []
    return Order(folders, plan.batch_tokens, plan.settings.seed, plan.epochs, parts), held, skipped


def _rows(folder: Path | str, model: str) -> Rows:
    """Raises ValueError where there are none, or those of another vocabulary."""
    rows, tokenizer, recipe = Rows(folder), _checkpoint(model).tokenizer, Path(folder, "recipe.json")
    if not len(rows):
        raise ValueError(f"{folder} has no rows: build them from more code")
    if (
        tokenizer
        and recipe.exists()
        and read_json(recipe).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint
    ):
        raise ValueError(
            f"{folder} was built with another vocabulary than {model}'s: build it with --tokenizer {model}"
        )
    return rows


def _start(plan: Plan, checkpoint: Checkpoint, base: Params) -> Trainable:
    if plan.kind == "full":
        return base
    ids, start = fim_rows(checkpoint) if not plan.chat else ((), ())
    if plan.adapter:
        adapter = lora.load(plan.adapter)
        adapter.check(checkpoint.config)
        missing = {token: place for token, place in zip(ids, start, strict=True) if token not in adapter.rows}
        if missing:  # an adapter that was trained on other things
            rows = np.asarray(embed(base, jnp.asarray(list(missing.values()), jnp.int32), None))
            adapter = replace(adapter, rows={**adapter.rows, **dict(zip(missing, rows, strict=True))})
        return lora_of(adapter)
    return new_lora(checkpoint.config, base, plan.rank, ids, plan.alpha, plan.settings.seed, start)


def fim_rows(checkpoint: Checkpoint) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The FIM tokens that a base never saw, whose rows of the embedding an adapter learns, and whose rows they start from:
    the separator from <eos>, which ends texts; the suffix's mark from what was the separator's, for its own is the prefix's
    mark's almost (a cosine of 0.93 in Gemma 3 270M: a layer can hardly tell them apart). None where the vocabulary names them:
    then the base was trained on them."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or tokenizer.control.fim != "convention":
        return (), ()
    control = tokenizer.control
    ids = tuple(sorted(getattr(control, name) for name in FIM_NAMES))
    start = {control.fim_suffix: control.file_separator}
    if control.eos is not None:
        start[control.file_separator] = control.eos
    return ids, tuple(start.get(token, token) for token in ids)


def _newer(plan: Plan) -> Path:
    return plan.result.with_name(f"{plan.result.name}.new")


def _write(plan: Plan, checkpoint: Checkpoint, trained: Trainable, card: dict[str, Any]) -> None:
    """In the place of the run's older result, which stays until this one is whole."""
    new = _newer(plan)
    shutil.rmtree(new, ignore_errors=True)
    if isinstance(trained, Lora):
        lora.save(adapter_of(trained, plan.name or plan.out.name, card), new)
    else:
        types = {
            name: tensor.type if tensor.type in ELEMENTS else "BF16"
            for name, tensor in checkpoint.tensors.items()
        }
        tensors = {name: _tensor(np.asarray(value), types[name]) for name, value in trained.items()}  # type: ignore[arg-type]
        with building(new) as folder:
            orders = [order for order in plan.orders if not plan.chat] or checkpoint.taught or ()
            save("safetensors", folder, checkpoint.teach(orders, tensors))
            (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(plan.result, ignore_errors=True)
    new.rename(plan.result)


def _tensor(values: np.ndarray, type: str) -> Tensor:
    array = np.ascontiguousarray(plain(type, values.astype(np.float32)))
    return Tensor.view(type, values.shape, array.view(np.uint8).reshape(-1))


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboardX: pip install tensorboardX") from None
    return SummaryWriter(str(folder / "tensorboard"))
