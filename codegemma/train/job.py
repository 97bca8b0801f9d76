"""A training job from its options to its result: an adapter or a checkpoint, with a card.

The CLI, `tune` and tools/adapter_train.py call `run`, or make a `TrainingJob` where they want to know the
number of steps before it runs. The law it keeps: the result is written completely or not at all, with a card
of what it was made from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from codegemma import hub
from codegemma.adapters.adapter import LINEAR
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.checkpoints.tensors import ELEMENTS, ArrayTensor, LazyTensor, Tensor
from codegemma.checkpoints.untrusted import read_json
from codegemma.convert.convert import save
from codegemma.data.pack import Rows
from codegemma.extras import installer
from codegemma.files import atomic_directory, sole_writer
from codegemma.jax.forward import LoraParams, Params, embed, params_of
from codegemma.native import dequantize
from codegemma.native.xla import has_kernels
from codegemma.prompts import Layout, fim_stops
from codegemma.tokenizer import FIM_NAMES
from codegemma.train import mesh as meshes
from codegemma.train import preference, sft
from codegemma.train.lora import adapter_of, new_lora
from codegemma.train.memory import Memory, memory_of
from codegemma.train.objective import Trainable, weights_of
from codegemma.train.order import Order, row_length
from codegemma.train.session import Session, StepReport, prepare_process
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import disk_errors_name

FIM_ORDERS: tuple[Layout, ...] = ("psm", "spm")
TENSORBOARD_SCALARS = ("loss", "right", "learning_rate", "gradient_norm", "held_out")
OnStep = Callable[[StepReport], None]


@dataclass(frozen=True)
class TrainingPlan:
    """Which model to train, on which rows, and how.

    `kind` is what to train: all parameters ("full"), all but the embedding, which stays as the file stores it
    ("layers"), an adapter over float weights ("lora"), or an adapter over the file's quantised blocks
    ("qlora"). For "layers", an `adapter` is merged into the weights before the first step. Raises ValueError
    on options that contradict each other.
    """

    model: str
    sources: tuple[str, ...]
    out: Path
    settings: TrainingSettings
    chat: bool = False
    preferences: bool = False  # whether the sources are files of pairs of answers (preference.read)
    kind: Literal["full", "layers", "lora", "qlora"] = "lora"
    rank: int = 32
    alpha: float | None = None
    adapter: Path | None = None  # one to start from; None: a new one
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
        if self.kind == "layers" and self.alpha is not None:
            raise ValueError("--lora-alpha is for adapters: leave it out, or leave out --layers")
        if self.alpha is not None and (self.adapter or not 0 < abs(self.alpha) < 1e9):
            rule = "--lora-alpha is a finite number other than 0, for a new adapter alone"
            remedy = f" for {self.adapter}: leave it out" if self.adapter else ""
            raise ValueError(f"{rule}, got {self.alpha}{remedy}")
        if self.chat and self.settings.horizon:
            raise ValueError("--horizon is for fill-in-the-middle rows: leave it out, or leave out --chat")
        if self.preferences and (self.settings.z or self.settings.horizon or self.settings.vocabulary):
            options = "--z-loss, --horizon and --vocabulary"
            raise ValueError(f"{options} are not for pairs: leave them out, or leave out --preferences")
        if self.settings.patience and not self.held_out:
            raise ValueError("--patience counts measurements on held-out rows: pass --held-out too")

    @property
    def result(self) -> Path:
        """The folder of the adapter or the model."""
        return self.out / ("adapter" if self.trains_adapter else "model")

    @property
    def trains_adapter(self) -> bool:
        """Whether the result is an adapter, not a model."""
        return self.kind in ("lora", "qlora")

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
        self.left_out = Counter[str]()  # how many lines, by reason
        parts = meshes.batch_parts(meshes.parse_axes(plan.mesh))
        rows, self.held_out = [self._read(Path(source)) for source in plan.sources], []
        if plan.held_out:
            self.held_out = [self._read(plan.held_out)]
        self.order = Order(rows, plan.batch_tokens, plan.settings.seed, plan.epochs, parts)

    @property
    def steps(self) -> int:
        """Steps of the complete run."""
        return min(self.order.steps, self.plan.settings.steps or self.order.steps)

    @property
    def memory(self) -> Memory:
        """What the run will need, from the shapes of the model's tensors alone."""
        plan, tensors = self.plan, self.checkpoint.tensors
        sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
        base, trained = 0, sum(sizes.values())
        if plan.kind == "layers":
            base, trained = tensors["embed"].nbytes, trained - sizes["embed"]
        elif plan.trains_adapter:
            as_stored = plan.kind == "qlora"
            base = sum(
                tensor.nbytes if as_stored or tensor.type in ELEMENTS else 2 * sizes[name]
                for name, tensor in tensors.items()
            )
            linear = [tensor.shape for name, tensor in tensors.items() if name.split(".")[-1] in LINEAR]
            trained = plan.rank * sum(map(sum, linear))
        length = max(map(row_length, self.order.folders))
        tokens = max(plan.batch_tokens, length)
        return memory_of(self.checkpoint.config, plan.settings, length, base, trained, tokens)

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
        base, trainable = initial_params(plan, checkpoint, on_mesh=mesh is not None)
        start = load_adapter(plan.adapter).digest if plan.adapter else None
        run = Session(
            checkpoint.config,
            base,
            trainable,
            self.order,
            plan.settings,
            plan.out,
            resume=resume,
            held_out=self.held_out,
            mesh=mesh,
            stop_ids=sorted(fim_stops(checkpoint.tokenizer)) if checkpoint.tokenizer else [],
            fim_middle=checkpoint.tokenizer.control.fim_middle if checkpoint.tokenizer else None,
            about={"base": checkpoint.identity, "kind": plan.kind, "start": start},
        )
        with _tensorboard(plan) as report_to_tensorboard, run as session:
            for report in session.train(self._save, until, stop):
                on_step(report)
                report_to_tensorboard(report)
        return plan.result

    def _read(self, source: Path) -> Any:
        """The rows of a folder, or of a file of dialogues or of pairs of answers."""
        plan, tokenizer = self.plan, self.checkpoint.tokenizer
        if plan.chat and tokenizer is None:
            fault = f"{plan.model} has no tokenizer to read chats with"
            raise ValueError(f"{fault}: put its tokenizer.model beside it")
        if plan.preferences:
            parse_with = tokenizer if plan.chat else None
            pairs, left_out = preference.read(source, self.checkpoint.config.vocab, parse_with)
            rows, unfit = preference.rows(pairs, plan.length)
            reason = f"longer than {plan.length:,} tokens, with the prompt before both answers"
            self.left_out += left_out + Counter({reason: unfit})
            return rows
        if plan.chat:
            assert tokenizer
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
        if plan.preferences:
            card |= {"beta": plan.settings.beta, "likelihood": plan.settings.likelihood}
        fim = {order: order in plan.fim_orders for order in FIM_ORDERS}
        return card if plan.chat else card | {"fim": fim}

    def _save(self, trained: Trainable, report: StepReport) -> None:
        """Writes a result beside the older one, and then replaces that."""
        trained = jax.tree.map(meshes.gather, trained)
        if jax.process_index() != 0:
            return
        plan, checkpoint, new, card = self.plan, self.checkpoint, self.plan.new_result, self._card(report)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(trained, LoraParams) and plan.trains_adapter:
            save_adapter(adapter_of(trained, plan.name or plan.out.name, card), new)
        else:
            fim_orders = (() if plan.chat else plan.fim_orders) or checkpoint.fim_orders or ()
            with atomic_directory(new) as folder:
                save("safetensors", folder, trained_model(checkpoint, trained, fim_orders))
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


def trained_model(checkpoint: Checkpoint, trained: Trainable, fim_orders: Iterable[str]) -> Checkpoint:
    """The model with its trained weights in the file's float types, or bfloat16 in the place of blocks."""
    weights = weights_of(trained)
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    for name in tensors.keys() & weights.keys():
        type = tensors[name].type
        tensors[name] = ArrayTensor.of(np.asarray(weights[name]), type if type in ELEMENTS else "BF16")
    if isinstance(trained, LoraParams):
        rows_RD = np.asarray(weights.get("rows", ()), np.float32)
        tensors["embed"] = _with_rows(tensors["embed"], dict(zip(trained.ids, rows_RD, strict=True)))
    return checkpoint.with_weights(tensors, fim_orders)


def _with_rows(table: Tensor, rows: Mapping[int, np.ndarray]) -> Tensor:
    """A table in a float type with replaced rows, made a few rows at a time as it is written."""
    type = table.type if table.type in ELEMENTS else "BF16"

    def read(start: int, stop: int) -> np.ndarray:
        values = dequantize(table.rows(start, stop))
        for token, row in rows.items():
            if start <= token < stop:
                values[token - start] = row
        return ArrayTensor.of(values, type).data

    return LazyTensor(type, table.shape, read)


def initial_params(
    plan: TrainingPlan, checkpoint: Checkpoint, on_mesh: bool = False
) -> tuple[Params | None, Trainable]:
    """(the frozen base, what is trained) at the start of a run."""
    if plan.kind == "full":
        return None, params_of(checkpoint, np.float32)
    use_kernels = has_kernels() and not on_mesh
    if plan.kind == "layers":
        embed = replace(checkpoint, tensors={"embed": checkpoint.tensors["embed"]})
        base = params_of(embed, matrices="stored" if use_kernels else "arrays")
        return base, initial_layers(plan, checkpoint, base)
    matrices: Any = "stored" if plan.kind == "qlora" else "stored_floats" if use_kernels else "arrays"
    base = params_of(checkpoint, matrices=matrices)
    return base, initial_adapter(plan, checkpoint, base)


def initial_layers(plan: TrainingPlan, checkpoint: Checkpoint, base: Params) -> LoraParams:
    """All parameters but the embedding in float32, with the plan's adapter merged into them.

    Beside them are the embedding rows that `initial_adapter` has: those of FIM tokens which the base was
    never trained on, and the adapter's.
    """
    start = initial_adapter(plan, checkpoint, base)
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "embed"}
    weights: dict[str, Any] = dict(params_of(replace(checkpoint, tensors=others), np.float32))
    for name in weights:
        if f"{name}.a" in start.weights:
            b_OR, a_RI = start.weights[f"{name}.b"], start.weights[f"{name}.a"]
            weights[name] += start.scale * jnp.matmul(b_OR, a_RI, precision="highest")
    if start.ids:
        weights["rows"] = start.weights["rows"]
    return LoraParams(weights, 1.0, start.ids)


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
