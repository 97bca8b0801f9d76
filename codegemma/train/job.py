"""A training job from its options to its result: an adapter or a checkpoint, with a card.

The CLI, `tune` and tools/adapter_train.py call `run`, or make a `TrainingJob` where they want to know the
number of steps before it runs. The law it keeps: the result is written completely or not at all, with a card
of what it was made from.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from codegemma import hub
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.checkpoints.tensors import ELEMENTS, ArrayTensor, Tensor
from codegemma.checkpoints.untrusted import read_json
from codegemma.convert.convert import save
from codegemma.data.pack import Rows
from codegemma.extras import installer
from codegemma.files import atomic_directory, sole_writer
from codegemma.jax.forward import LoraParams, Params, embed, params_of
from codegemma.native.xla import has_kernels
from codegemma.prompts import Layout, fim_stops
from codegemma.tokenizer import FIM_NAMES
from codegemma.train import mesh as meshes
from codegemma.train import sft
from codegemma.train.lora import adapter_of, new_lora
from codegemma.train.objective import Trainable
from codegemma.train.order import Order
from codegemma.train.session import Session, StepReport, prepare_process
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import disk_errors_name

FIM_ORDERS: tuple[Layout, ...] = ("psm", "spm")
TENSORBOARD_SCALARS = ("loss", "right", "learning_rate", "gradient_norm", "held_out")
OnStep = Callable[[StepReport], None]


@dataclass(frozen=True)
class TrainingPlan:
    """Which model to train, on which rows, and how.

    `kind` is what to train: all parameters, an adapter over float weights ("lora"), or an adapter over the
    file's quantised blocks ("qlora"). Raises ValueError on options that contradict each other.
    """

    model: str
    sources: tuple[str, ...]
    out: Path
    settings: TrainingSettings
    chat: bool = False
    kind: Literal["full", "lora", "qlora"] = "lora"
    rank: int = 32
    alpha: float | None = None
    adapter: Path | None = None  # one to train further; None: a new one
    batch_tokens: int = 16_384
    length: int = 2048  # tokens of a row, for chat
    epochs: float = 1.0
    held_out: Path | None = None
    mesh: str | None = None
    tensorboard: bool = False
    name: str = ""
    fim_orders: tuple[Layout, ...] = FIM_ORDERS  # of the rows' FIM examples; the result's card names them

    def __post_init__(self) -> None:
        if self.kind == "full" and (self.adapter or self.alpha is not None or self.settings.vocabulary):
            options = "--adapter, --lora-alpha and --vocabulary"
            raise ValueError(f"{options} are for adapters: leave them out, or leave out --full")
        if self.alpha is not None and (self.adapter or not 0 < abs(self.alpha) < 1e9):
            rule = "--lora-alpha is a finite number other than 0, for a new adapter alone"
            remedy = f" for {self.adapter}: leave it out" if self.adapter else ""
            raise ValueError(f"{rule}, got {self.alpha}{remedy}")
        if self.settings.patience and not self.held_out:
            raise ValueError("--patience counts measurements on held-out rows: pass --held-out too")

    @property
    def result(self) -> Path:
        """The folder of the adapter or the model."""
        return self.out / ("model" if self.kind == "full" else "adapter")

    @property
    def new_result(self) -> Path:
        """Where a result is written before it replaces an older one."""
        return self.result.with_name(f"{self.result.name}.new")


def run(
    plan: TrainingPlan,
    resume: bool = False,
    on_step: OnStep = lambda _: None,
    until: float | None = None,
    stop: Event | None = None,
) -> Path:
    """Runs the job of a plan; see `TrainingJob.run`."""
    return TrainingJob(plan).run(resume, on_step, until, stop)


class TrainingJob:
    """A plan with its model opened and its rows read; nothing else has started.

    Raises ValueError where rows are missing or do not fit the model.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan, self.checkpoint = plan, open_checkpoint(hub.resolve(plan.model))
        self.left_out = Counter[str]()  # how many dialogues, by reason
        parts = meshes.batch_parts(meshes.parse_axes(plan.mesh))
        rows, self.held_out = [self._read(Path(source)) for source in plan.sources], []
        if plan.held_out:
            self.held_out = [self._read(plan.held_out)]
        self.order = Order(rows, plan.batch_tokens, plan.settings.seed, plan.epochs, parts)

    @property
    def steps(self) -> int:
        """Steps of the complete run."""
        return min(self.order.steps, self.plan.settings.steps or self.order.steps)

    def run(
        self,
        resume: bool = False,
        on_step: OnStep = lambda _: None,
        until: float | None = None,
        stop: Event | None = None,
    ) -> Path:
        """Trains, calls `on_step` after each step, and returns the folder of the result.

        At `until`, on the clock of time.monotonic, the run ends early with the result so far. Once `stop` is
        set, the run ends too, perhaps before there is a result; its steps are kept, and can be resumed from.
        Raises ValueError while another process trains into the same folder.
        """
        self._started = time.monotonic()
        prepare_process()
        with sole_writer(self.plan.out) if jax.process_index() == 0 else nullcontext():
            return self._run(resume, on_step, until, stop)

    def _run(self, resume: bool, on_step: OnStep, until: float | None, stop: Event | None) -> Path:
        plan, checkpoint = self.plan, self.checkpoint
        _expect_no_foreign_files(plan, resume)
        mesh = meshes.make(plan.mesh)
        if jax.process_index() == 0 and plan.new_result.exists() and not plan.result.exists():
            plan.new_result.rename(plan.result)  # an earlier run stopped between the last lines of `_save`
        use_kernels = plan.kind == "lora" and mesh is None and has_kernels()
        matrices: Any = "stored" if plan.kind == "qlora" else "stored_floats" if use_kernels else "arrays"
        base = params_of(checkpoint, np.float32 if plan.kind == "full" else None, matrices)
        run = Session(
            checkpoint.config,
            None if plan.kind == "full" else base,
            base if plan.kind == "full" else initial_adapter(plan, checkpoint, base),
            self.order,
            plan.settings,
            plan.out,
            resume=resume,
            held_out=self.held_out,
            mesh=mesh,
            stop_ids=sorted(fim_stops(checkpoint.tokenizer)) if checkpoint.tokenizer else [],
            about={"base": checkpoint.identity, "kind": plan.kind},
        )
        with _tensorboard(plan) as report_to_tensorboard, run as session:
            for report in session.train(self._save, until, stop):
                on_step(report)
                report_to_tensorboard(report)
        return plan.result

    def _read(self, source: Path) -> Any:
        """The rows of a folder, or of a file of dialogues."""
        plan, tokenizer = self.plan, self.checkpoint.tokenizer
        if plan.chat:
            if tokenizer is None:
                fault = f"{plan.model} has no tokenizer to read chats with"
                raise ValueError(f"{fault}: put its tokenizer.model beside it")
            file = sft.read(source)
            rows, unfit = sft.rows(file.dialogues, tokenizer, plan.length)
            reason = f"longer than {plan.length:,} tokens, or with an empty answer"
            self.left_out += file.left_out + Counter({reason: unfit})
            return rows
        folder, recipe = Rows(source), source / "recipe.json"
        if not len(folder):
            raise ValueError(f"{source} has no rows: build them from more code")
        made_with = read_json(recipe).get("tokenizer") if recipe.exists() else None
        if tokenizer and made_with not in (None, tokenizer.fingerprint):
            fault = f"{source} was built with another vocabulary than {plan.model}'s"
            raise ValueError(f"{fault}: build it with --tokenizer {plan.model}")
        return folder

    def _card(self, report: StepReport) -> dict[str, Any]:
        plan = self.plan
        card = {
            "base": plan.model,
            "rows": [Path(source).name for source in plan.sources],
            "seed": plan.settings.seed,
            "learning_rate": plan.settings.learning_rate,
            "batch_tokens": plan.batch_tokens,
            "skipped": self.left_out.total(),
            "steps": report.step,
            "loss": report.loss,
            "held_out": report.held_out,
            "hours": round((time.monotonic() - self._started) / 3600, 3),
        }
        fim = {order: order in plan.fim_orders for order in FIM_ORDERS}
        return card if plan.chat else card | {"fim": fim}

    def _save(self, trained: Trainable, report: StepReport) -> None:
        """Writes a result beside the older one, and then replaces that."""
        trained = jax.tree.map(meshes.gather, trained)
        if jax.process_index() != 0:
            return
        plan, checkpoint, new, card = self.plan, self.checkpoint, self.plan.new_result, self._card(report)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(trained, LoraParams):
            save_adapter(adapter_of(trained, plan.name or plan.out.name, card), new)
        else:
            tensors: dict[str, Tensor] = {}
            for name, value in trained.items():
                type = checkpoint.tensors[name].type
                tensors[name] = ArrayTensor.of(np.asarray(value), type if type in ELEMENTS else "BF16")
            fim_orders = (() if plan.chat else plan.fim_orders) or checkpoint.fim_orders or ()
            with atomic_directory(new) as folder:
                trained_checkpoint = checkpoint.with_weights(tensors, fim_orders)
                save("safetensors", folder, trained_checkpoint)
                (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        shutil.rmtree(plan.result, ignore_errors=True)
        new.rename(plan.result)


def _expect_no_foreign_files(plan: TrainingPlan, resume: bool) -> None:
    """Raises ValueError where a run would replace files of the output folder that no run wrote."""
    if (plan.out / "metrics.jsonl").exists():
        return
    of_new_runs = [] if resume else [plan.out / "checkpoints", plan.out / "loss.svg"]
    for path in [plan.result, plan.new_result, *of_new_runs]:
        if path.exists():
            raise ValueError(f"{path} exists, and no training run wrote it: choose another folder with --out")


def initial_adapter(plan: TrainingPlan, checkpoint: Checkpoint, base: Params) -> LoraParams:
    """The adapter that training starts from: the plan's, with any missing FIM rows added, or a new one."""
    ids, start_from = fim_rows(checkpoint) if not plan.chat else ((), ())
    if not plan.adapter:
        return new_lora(base, plan.rank, ids, plan.alpha, plan.settings.seed, start_from)
    adapter = load_adapter(plan.adapter)
    adapter.check(checkpoint.config)
    pairs = zip(ids, start_from, strict=True)
    if missing := {token: start for token, start in pairs if token not in adapter.rows}:
        starts = jnp.asarray(list(missing.values()), jnp.int32)
        rows = dict(zip(missing, np.asarray(embed(base, starts, None)), strict=True))
        adapter = replace(adapter, rows={**adapter.rows, **rows})
    return LoraParams.of(adapter)


def fim_rows(checkpoint: Checkpoint) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(FIM tokens, tokens whose embedding rows they start from) of a base that was never trained on them.

    The separator starts from the row of <eos>, since both end a text. <|fim_suffix|> starts from the
    separator's row. Its own row is nearly that of <|fim_prefix|> (a cosine of 0.93 in Gemma 3 270M): no layer
    could tell the two apart. Both tuples are empty where the vocabulary names the FIM tokens,
    because then the base was trained on them.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or tokenizer.control.fim != "convention":
        return (), ()
    control = tokenizer.control
    ids = tuple(sorted(getattr(control, name) for name in FIM_NAMES))
    start_from = {control.fim_suffix: control.file_separator}
    if control.eos is not None:
        start_from[control.file_separator] = control.eos
    return ids, tuple(start_from.get(token, token) for token in ids)


@contextmanager
def _tensorboard(plan: TrainingPlan) -> Iterator[OnStep]:
    """A function that writes a report for TensorBoard; it does nothing if the plan does not ask for it."""
    if not plan.tensorboard or jax.process_index() != 0:
        yield lambda report: None
        return
    try:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
    except ImportError:
        remedy = f"{installer()} tensorboardX"
        raise ValueError(f"--tensorboard needs the package tensorboardX: {remedy}") from None
    folder = plan.out / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)

    def write(report: StepReport) -> None:
        for name in TENSORBOARD_SCALARS:
            if (value := getattr(report, name)) is not None:
                scalar = summary.scalar(name, value)
                writer.write_event(Event(wall_time=time.time(), step=report.step, summary=scalar))
        with disk_errors_name(folder):
            writer.flush()

    # not SummaryWriter: that writes in a thread, and blocks for ever where a write failed
    writer = EventsWriter(str(folder / "events"))
    try:
        yield write
    finally:
        with disk_errors_name(folder):
            writer.close()
