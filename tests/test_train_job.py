"""Training as users start it: adapters and models from chats and rows; `codegemma tune` on a code base."""

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("tree_sitter")
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import adapter_train
import jax
from programs import signals_act
from tiny import random_adapter, tiny_config, write_tiny_gguf

from codegemma import load
from codegemma.adapters.load import load as load_adapter
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import open_checkpoint
from codegemma.cli import main as cli
from codegemma.cli.train import ClusterOptions
from codegemma.convert.convert import save as save_model
from codegemma.data import pack
from codegemma.data.build import build
from codegemma.data.documents import Document
from codegemma.data.folder import BuildFolder
from codegemma.evals.task import compare
from codegemma.jax.forward import LoraParams, params_of
from codegemma.native import dequantize
from codegemma.prompts import Message
from codegemma.train import job, session, sft, tune
from codegemma.train.settings import TrainingSettings

TURNS = [Message("user", "add one and one"), Message("assistant", "two")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_config("gemma-mqa", layers=2))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text(
        "".join(
            json.dumps({"input": f"what is {n} plus {n}?", "output": f"it is {2 * n}"}) + "\n"
            for n in range(40)
        )
    )
    return file


QUESTION = {"role": "user", "content": "add one and one"}
ANSWER = {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    "line",
    [
        {
            "messages": [
                {"role": "user", "content": "add one and one"},
                {"role": "assistant", "content": "two"},
            ]
        },
        {"conversations": [{"from": "human", "value": "add one and one"}, {"from": "gpt", "value": "two"}]},
        {
            "system": "",
            "conversations": [
                {"from": "User", "value": "add one and one"},
                {"from": "Assistant", "value": "two"},
            ],
        },
        {"input": "add one and one", "output": "two"},
        {"prompt": "add one and one", "completion": "two"},
        {"instruction": "add one and one", "input": "", "output": "two"},
        {"input": "add one and one", "output": "two", "system": ""},
        {"instruction": "add one and one", "response": "two", "messages": None},
        {"prompt": "add one and one", "chosen": "two", "rejected": "three"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": [QUESTION], "completion": "two", "label": True},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [QUESTION]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION]},
        {"prompt": "add", "prompt_id": "1", "messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER, QUESTION]},
        {"conversation": [{"from": "human", "value": "add one and one"}, {"from": "bot", "value": "two"}]},
        {"messages": [QUESTION | {"content": "add one and one\r\n"}, ANSWER | {"weight": 1}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "add one "}, {"type": "text", "text": "and one"}],
                },
                {"role": "model", "content": "two"},
            ]
        },
    ],
)
def test_every_form_of_a_dialogue_is_read(line, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n\r\n")
    assert sft.read(file).dialogues == [TURNS]
    file.write_text(json.dumps([line, line], indent=1))  # one JSON list
    assert sft.read(file).dialogues == [TURNS, TURNS]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "no pair"}',
        '{"input": 3, "output": "x"}',
        "[1]",
        "{",
        '{"messages": [{"role": "user", "content": "and?"}]}',
        "[" * 100_000,
        '{"input": "\xe9"}',
        '{"conversations": [{"from": "gpt", "value": "hello"}]}',
        '{"input": "a", "output": "b", "system": 3}',
        '{"messages": [{"content": "a"}]}',
        '{"messages": [{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"prompt": "a", "completion": "b", "label": false}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b", "weight": 0}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "model", "tool_calls": [1]}]}',
        '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}',
        "not json",
        "null",
        "3",
    ],
)
def test_an_odd_line_is_left_out_and_counted_and_a_file_of_nothing_else_is_an_error(line, tmp_path):
    file, good = tmp_path / "bad.jsonl", b'{"input": "a", "output": "b"}\n'
    file.write_bytes(good + line.encode("latin-1") + b"\n" + good)
    read = sft.read(file)
    assert read.left_out.total() == 1 and len(read.dialogues) == 2
    file.write_bytes(b"\n" + line.encode("latin-1"))
    with pytest.raises(ValueError, match="bad.jsonl: none of 1 lines is a dialogue; line [12]: "):
        sft.read(file)
    for nothing in ("", "\n \n", "[]"):
        (tmp_path / "empty.jsonl").write_text(nothing)
        with pytest.raises(ValueError, match="empty.jsonl: is empty"):
            sft.read(tmp_path / "empty.jsonl")


def test_what_can_be_healed_is_healed(tmp_path):
    greeting = [
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    rules = [
        {"role": "user", "content": "x"},
        {"role": "user", "content": "y"},
        {"role": "system", "content": "s"},
    ]
    lines = [
        {"conversations": greeting},
        {"messages": [*rules, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "b\ud83d"}]},
        {"input": "\ud83d\ude00 \ude00", "output": "c"},
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = sft.read(tmp_path / "odd.jsonl")
    assert not file.left_out and file.dialogues == [
        [Message("assistant", "hi"), Message("user", "q"), Message("assistant", "a")],
        [Message("user", "x\n\ny\n\ns\n\nt"), Message("assistant", "b\ufffd")],
        [Message("user", "\U0001f600 \ufffd"), Message("assistant", "c")],
    ]


def test_rows_of_chats_teach_the_answers_alone(model):
    tokenizer = load(model).tokenizer
    unfit = [
        [Message("user", "long " * 500), Message("assistant", "x")],
        [Message("user", "hm"), Message("assistant", " ")],
    ]
    rows, left_out = sft.rows([TURNS, TURNS, *unfit], tokenizer, 64)
    assert left_out == 2 and sum(row["segments"].max() for row in rows) == 2
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            in_segment = row["segments"] == segment
            learned = row["tokens"][in_segment & row["loss"]].tolist()
            assert learned[-1] == tokenizer.control.end_of_turn and tokenizer.decode(learned[:-1]) == "two"
            assert row["tokens"][in_segment][0] == tokenizer.control.bos
            assert row["positions"][in_segment][0] == 0
    with pytest.raises(ValueError, match="none of 1 dialogues fits"):
        sft.rows([TURNS], tokenizer, 8)


def small_plan(model, chats, folder, settings, **changes):
    """A plan over the tiny model and the chats."""
    options = {"chat": True, "rank": 4, "batch_tokens": 512, "length": 128, "epochs": 8.0} | changes
    return job.TrainingPlan(str(model), (str(chats),), folder / "out", settings, **options)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full", "layers"])
def test_a_job_writes_a_result_that_loads_and_has_learned(kind, model, chats, tmp_path):
    settings = TrainingSettings(5e-3, micro_tokens=256, save_every=3)
    plan = small_plan(model, chats, tmp_path, settings, kind=kind)
    reports = []
    result = job.run(plan, on_step=reports.append)
    assert reports[-1].loss < reports[0].loss - 0.5 and result == plan.result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, ids = load(model, cache_bytes=0), load(model).tokenizer.encode("what is 3 plus")
        if kind in ("full", "layers"):
            assert not np.array_equal(load(result).logits(ids), base.logits(ids))
            tables = [open_checkpoint(path).tensors["embed"].data.tobytes() for path in (model, result)]
            assert (tables[0] == tables[1]) == (kind == "layers")
        else:
            base.add_adapter("trained", load_adapter(result))
            assert not np.array_equal(base.engine.logits(ids, adapter="trained"), base.logits(ids))


def test_a_job_that_is_stopped_keeps_its_steps_and_resumes_to_the_same_result(model, chats, tmp_path):
    """Stopped in the middle of its third step, far from a checkpoint; no step is done twice."""
    settings = TrainingSettings(micro_tokens=256, save_every=100)
    plans = [small_plan(model, chats, tmp_path / name, settings) for name in ("whole", "stopped")]
    job.run(plans[0])
    stop, reports = Event(), []

    def on_step(report):
        reports.append(report.step)
        if report.step == 2:
            stop.set()

    job.run(plans[1], on_step=on_step, stop=stop)
    assert reports == [1, 2] and not plans[1].result.exists()
    job.run(plans[1], resume=True, on_step=on_step)
    assert reports == [*range(1, job.TrainingJob(plans[1]).steps + 1)]
    first, second = (load_adapter(plan.result) for plan in plans)
    for part in ("a", "b"):
        for name, matrix in getattr(first, part).items():
            np.testing.assert_array_equal(matrix, getattr(second, part)[name])


def test_ctrl_c_keeps_the_steps_of_a_run(model, chats, tmp_path):
    """Through the command line, far from a checkpoint; no step is done twice."""
    command = [sys.executable, "-m", "codegemma.cli", "train", str(chats), "--chat", "-m", str(model)]
    command += ["--lora-rank", "4", "--batch-tokens", "512", "--length", "128", "--epochs", "900"]
    command += ["--save-every", "100000", "--out", str(tmp_path / "out")]

    def run(*more, after):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with signals_act(signal.SIGINT):
            child = subprocess.Popen([*command, *more], text=True, **pipes)
        with child as process:
            steps = (line for line in process.stderr if not line.startswith("note: "))
            lines = [next(steps) for _ in range(after)]
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in rest, rest
        return lines, rest

    steps, notes = run(after=3)
    assert steps[0].startswith("step 1 of") and "keeps the steps so far, and --resume continues" in notes
    done = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    (step,), _ = run("--resume", after=1)
    assert done >= 3 and step.startswith(f"step {done + 1:,} of")


def test_a_job_whose_time_is_up_leaves_what_it_has(model, chats, tmp_path):
    plan = small_plan(model, chats, tmp_path, TrainingSettings(save_every=100))
    reports = []
    assert load_adapter(job.run(plan, on_step=reports.append, until=0.0)).rank == 4
    assert [report.step for report in reports] == [1] and job.TrainingJob(plan).steps > 1


def test_asking_for_the_steps_changes_nothing(model, chats, tmp_path, monkeypatch):
    """Neither the heap, nor XLA, nor the disk."""
    monkeypatch.setattr(session, "keep_heap", lambda: pytest.fail("the heap's policy was changed"))
    monkeypatch.setattr(session, "configure_xla", lambda: pytest.fail("XLA was configured"))
    assert job.TrainingJob(small_plan(model, chats, tmp_path, TrainingSettings())).steps > 1
    assert not (tmp_path / "out").exists()


def test_importing_the_forward_pass_sets_no_flag():
    program = "import os; import codegemma.jax.forward, codegemma.train.job; print(os.environ['XLA_FLAGS'])"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_files_are_held_out_by_a_hash_and_never_all():
    documents = [Document("r", f"{n}.py", "x = 1\n", "python") for n in range(50)]
    training, held_out = tune.hold_out(documents, Path("/nowhere"), 0)
    assert len(held_out) == 5
    assert sorted(doc.path for doc in training + held_out) == sorted(doc.path for doc in documents)
    assert tune.hold_out(documents[::-1], Path("/nowhere"), 0)[1] == held_out
    assert tune.hold_out(documents, Path("/nowhere"), 1)[1] != held_out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "full", "adapter": Path("a")}, "are for adapters"),
        ({"alpha": float("nan")}, "--lora-alpha is a finite"),
        ({"alpha": 0.0}, "--lora-alpha is a finite"),
        ({"settings": TrainingSettings(patience=2)}, "pass --held-out too"),
        ({"settings": TrainingSettings(horizon=0.1), "chat": True}, "leave out --chat"),
        ({"kind": "full", "settings": TrainingSettings(vocabulary=100)}, "are for adapters"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        job.TrainingPlan("m", ("rows",), Path("out"), **{"settings": TrainingSettings()} | changes)


@pytest.mark.parametrize("kind, name", [("full", "model"), ("lora", "adapter"), ("full", "checkpoints")])
def test_a_folder_with_the_users_own_files_is_not_trained_into(model, chats, tmp_path, kind, name):
    """`--out .` in a project that has a package called `model`."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "layers.py").write_text("mine")
    plan = replace(small_plan(model, chats, tmp_path, TrainingSettings(), kind=kind), out=tmp_path)
    with pytest.raises(ValueError, match=f"{name} exists, and no training run wrote it: choose another"):
        job.run(plan)
    assert (tmp_path / name / "layers.py").read_text() == "mine"


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_into_a_folder_is_refused_while_the_first_trains(model, chats, tmp_path, resume):
    plan, refusals = small_plan(model, chats, tmp_path, TrainingSettings(steps=3)), []

    def second(report):
        with pytest.raises(ValueError, match="out: is being written by another process: wait for it"):
            job.run(plan, resume=resume)
        refusals.append(report.step)

    assert load_adapter(job.run(plan, on_step=second)).rank == 4 and refusals == [1, 2, 3]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--learning-rate", "0"], "learning_rate must be above 0, got 0.0"),
        (["--full", "--qlora"], "pass one of them"),
        (["--layers", "--full"], "pass one of them"),
        (["--layers", "--lora-alpha", "2"], "leave out --layers"),
        (["--average", "4"], "raise keep, or lower average"),
        (["--process-id", "0"], "--process-id must lie"),
        (["--coordinator", "host"], "HOST:PORT"),
        (["--process-id", "2", "--process-count", "2"], "got 2 of 2"),
        (["--steps", "0"], "steps must be"),
        (["--decay", "cubic"], "decay must be cosine"),
        (["--remat", "all"], "remat must be"),
        (["--epochs", "inf"], "epochs"),
        (["--dtype", "float16"], "dtype must be float32"),
        (["--full", "--lora-rank", "8"], "leave it out, or --full"),
        (["--layers", "--lora-rank", "8"], "leave it out, or --layers"),
    ],
)
def test_invalid_options_are_refused(options, message, model, chats, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(
            ["train", "--chat", str(chats), "--model", str(model), "--out", str(tmp_path / "out"), *options]
        )
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_launchers_processes_join_or_are_told_how(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *arguments: calls.append(arguments))
    for name, value in ((None, ""), ("SLURM_STEP_NUM_TASKS", "1"), ("OMPI_COMM_WORLD_SIZE", "4")):
        if name:
            monkeypatch.setenv(name, value)
        ClusterOptions().join()
    assert calls == [(None, None, None)]

    def no_cluster(*arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", no_cluster)
    with pytest.raises(ValueError, match="cannot join 4 processes .*: pass --coordinator HOST:PORT"):
        ClusterOptions().join()


def test_a_file_is_not_taken_for_rows(chats, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", str(chats), "--out", str(tmp_path / "out")])
    assert "pass --chat where it holds" in capsys.readouterr().err


def test_rows_that_are_not_the_models_are_refused(model, tmp_path):
    """Another vocabulary by its fingerprint, or by its ids; files that are damaged; none at all."""
    tokens = np.full((8, 16), 600, np.int32)
    pack.save(
        pack.Packed(tokens, np.ones((8, 16), bool), np.ones((8, 16), np.uint16), []),
        BuildFolder(tmp_path),
        0,
    )
    plan = job.TrainingPlan(
        str(model),
        (str(tmp_path),),
        tmp_path / "out",
        TrainingSettings(vocabulary=200),
        kind="qlora",
        batch_tokens=64,
    )

    def refused(index, message):
        np.save(tmp_path / "index.npy", np.array(index, np.int64).reshape(-1, 2))
        with pytest.raises(ValueError, match=message):
            job.run(plan)

    refused([(0, n) for n in range(8)], "hold token 600, but the model's are below 515")
    refused([(0, 9)] * 8, "part-00000.tokens.npy|part-00000.segments.npy: is damaged")
    refused([], "has no rows")
    (tmp_path / "recipe.json").write_text('{"tokenizer": "another"}')
    refused([(0, 0)] * 8, "built with another vocabulary")
    (tmp_path / "index.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="index.npy: is damaged"):
        pack.Rows(tmp_path)


def test_a_run_is_resumed_as_it_was_alone(model, chats, tmp_path):
    plan = small_plan(model, chats, tmp_path, TrainingSettings(save_every=1))
    job.run(plan, until=0.0)
    for changes, message in (
        ({"kind": "qlora"}, "other options .kind 'lora', not 'qlora'"),
        ({"alpha": 8.0}, "adapter .1"),
        ({"rank": 2}, "shapes"),
        ({"settings": TrainingSettings(2e-3)}, "learning_rate 0.001, not 0.002"),
    ):
        with pytest.raises(ValueError, match=message):
            job.run(replace(plan, **changes), resume=True)
    job.run(plan, resume=True, until=0.0)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_no_number_ends_the_run(model, chats, tmp_path):
    plan = small_plan(model, chats, tmp_path, TrainingSettings(1e30, clip=1e30), kind="full")
    with pytest.raises(ValueError, match="training diverged: lower --learning-rate"):
        job.run(plan)


def test_two_processes_write_one_adapter(model, chats, tmp_path):
    """Parameters of which each holds a half are gathered for the result."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = {
        "model": model,
        "out": tmp_path / "out",
        "length": 128,
        "batch-tokens": 512,
        "epochs": 2,
        "steps": 1,
        "mesh": "fsdp=2",
        "coordinator": f"127.0.0.1:{port}",
        "process-count": 2,
    }
    command = [
        sys.executable,
        "-c",
        "from codegemma.cli.main import main; main()",
        "train",
        "--chat",
        str(chats),
        *(f"--{name}={value}" for name, value in options.items()),
        "--process-id",
    ]
    both = [
        subprocess.Popen(
            [*command, str(i)], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    assert load_adapter(tmp_path / "out" / "adapter").rank == 32


def test_newest_files_are_known_by_their_own_names(tmp_path):
    """Also beneath the root of a checkout, and where git would quote them."""
    for name in ("dir/é.py", 'dir/a "b".py', "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    assert {"dir/é.py", 'dir/a "b".py', "c.py"} <= set(tune.newest_files(tmp_path))
    assert set(tune.newest_files(tmp_path / "dir")) - {""} == {"é.py", 'a "b".py'}
    documents = [Document("r", f"dir/{n}.py", "x = 1\n", "python") for n in range(4)] + [
        Document("r", "dir/é.py", "y", "python")
    ]
    training, held_out = tune.hold_out(documents, tmp_path, 0)
    assert len(training) == tune.MIN_FILES and [doc.path for doc in held_out] == ["dir/é.py"]


def test_an_interrupted_probe_begins_again(tmp_path, monkeypatch):
    options, existed = tune.TuneOptions(Path("r"), "m", 1, tmp_path, rank=4), []
    (options.work / "probe").mkdir(parents=True)
    monkeypatch.setattr(tune, "Rows", lambda folder: range(8))
    monkeypatch.setattr(
        job,
        "run",
        lambda plan, _, on_step, until: (
            existed.append(plan.out.exists()) or on_step(SimpleNamespace(seconds=9.0))
        ),
    )
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    assert tune.plan_within(options, 150.0, None).settings.steps == 5 and existed == [False]


def test_tune_leaves_time_to_choose_the_best_step(tmp_path, monkeypatch):
    """Measuring counts as training does: 6 measurements of 16 rows, and 8 rows a step."""
    monkeypatch.setattr(tune, "Rows", lambda folder: range(16))
    monkeypatch.setattr(job, "run", lambda plan, _, on_step, until: on_step(SimpleNamespace(seconds=9.0)))
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    options = tune.TuneOptions(Path("r"), "m", 1, tmp_path, rank=4)
    (options.work / "validation").mkdir(parents=True)
    (options.work / "validation" / "index.npy").touch()
    assert tune.plan_within(options, 100 + 26 * 9.0, None).settings.steps == 14


def test_few_examples_choose_the_best_step(model, tmp_path, monkeypatch):
    """However large the files for it are."""
    monkeypatch.setattr(
        tune,
        "build",
        lambda sources, out, *rest: build(sources, out, *rest) if out.name == "validation" else None,
    )
    repository = code(tmp_path / "app", 44, 400)
    options = tune.TuneOptions(repository, str(model), 1, tmp_path)
    tune.prepare(options, load(model).tokenizer, ("psm", "spm"), lambda line: None)
    manifest = json.loads((tmp_path / "work" / "validation" / "manifests" / "rows.json").read_text())
    assert tune.VALIDATION_EXAMPLES / 2 < manifest["examples"] < 2 * tune.VALIDATION_EXAMPLES


def test_the_rows_of_fim_tokens_start_from_four_different_rows():
    """Where the base was not trained on them: two equal rows would be one token to every layer."""
    control = SimpleNamespace(
        fim="convention", fim_prefix=67, fim_middle=68, fim_suffix=69, file_separator=70, eos=1
    )
    assert job.fim_rows(SimpleNamespace(tokenizer=SimpleNamespace(control=control))) == (
        (67, 68, 69, 70),
        (67, 68, 70, 1),
    )
    control.fim = "named"
    assert job.fim_rows(SimpleNamespace(tokenizer=SimpleNamespace(control=control))) == ((), ())


def test_an_adapter_without_fim_rows_gets_them(model, tmp_path, monkeypatch):
    """An adapter from another training keeps its rows; the FIM rows it lacks start as a new adapter's do."""
    path = save_adapter(random_adapter(tiny_config("gemma-mqa", layers=2), tokens=(68,)), tmp_path / "other")
    checkpoint, ids = open_checkpoint(model), (67, 68, 69, 70)
    # as for a vocabulary that names no FIM tokens
    monkeypatch.setattr(job, "fim_rows", lambda checkpoint: (ids, (67, 68, 69, 1)))
    base = params_of(checkpoint)
    plan = job.TrainingPlan(str(model), (), tmp_path / "out", TrainingSettings(), adapter=path)
    extended = job.initial_adapter(plan, checkpoint, base)
    new = job.initial_adapter(replace(plan, adapter=None), checkpoint, base)
    assert extended.ids == new.ids == ids
    same = [np.array_equal(*(lora.weights["rows"][i] for lora in (extended, new))) for i in range(4)]
    assert same == [True, False, True, True]
    assert job.initial_adapter(replace(plan, chat=True), checkpoint, base).ids == (68,)


def test_layers_begin_as_the_base_with_the_adapter(model, tmp_path):
    """The model that would be saved before the first step has the logits of the base with its adapter."""
    config = tiny_config("gemma-mqa", layers=2)
    adapter = random_adapter(config, tokens=(68, 70))
    plan = job.TrainingPlan(
        str(model),
        (),
        tmp_path,
        TrainingSettings(),
        kind="layers",
        adapter=save_adapter(adapter, tmp_path / "a"),
    )
    checkpoint = open_checkpoint(model)
    base, layers = job.initial_params(plan, checkpoint)
    assert base.keys() == {"embed"} and layers.ids == (68, 70)
    saved = job.trained_model(checkpoint, layers, ("spm",))
    assert saved.fim_orders == {"spm"}
    save_model("gguf", tmp_path / "merged.gguf", saved)
    tuned, merged = load(model, cache_bytes=0), load(tmp_path / "merged.gguf", cache_bytes=0)
    tuned.add_adapter("a", adapter)
    ids = [2, 68, 300, 69, 70, 33, 44]
    expected = tuned.engine.logits(ids, adapter="a")
    assert np.abs(merged.logits(ids) - expected).max() < 2.0**-12 * np.abs(expected).max()


@pytest.mark.parametrize("ids", [(), (0, 68)])
def test_the_table_of_trained_layers_is_of_floats_with_its_trained_rows(tmp_path, ids):
    """Where the file's is quantised; read at once, and a few rows at a time."""
    checkpoint = open_checkpoint(
        write_tiny_gguf(tmp_path / "q.gguf", tiny_config("gemma-mqa", layers=2), "Q8_0")
    )
    rows = np.full((len(ids), 96), 0.75, np.float32) + np.arange(len(ids), dtype=np.float32)[:, None]
    trained = LoraParams({"rows": rows} if ids else {}, 1.0, ids)
    table = job.trained_model(checkpoint, trained, ()).tensors["embed"]
    wanted = dequantize(checkpoint.tensors["embed"])
    wanted[list(ids)] = rows
    assert table.type == "BF16"
    assert (np.abs(table.float32() - wanted) <= 2.0**-8 * np.abs(wanted)).all()
    parts = [table.rows(start, min(start + 50, 515)).data for start in range(0, 515, 50)]
    assert np.array_equal(np.concatenate(parts), table.data)


@pytest.mark.parametrize("kind", ["full", "layers", "lora", "qlora"])
def test_memory_is_stated_before_a_run(model, chats, tmp_path, kind):
    """Weights and moments are those of the run's arrays."""
    plan = small_plan(model, chats, tmp_path, TrainingSettings(), kind=kind)
    memory = job.TrainingJob(plan).memory
    base, trainable = job.initial_params(plan, open_checkpoint(model))
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (base, trainable)]
    assert (memory.base, memory.weights, memory.moments) == (*held, 2 * held[1])
    assert memory.gradients == (2 if plan.batch_tokens <= plan.settings.micro_tokens else 3) * memory.weights
    assert f"about {memory.total / 1e9:.1f} GB" in str(memory)


def test_what_rows_leave_out_is_not_held_out(model, tmp_path, monkeypatch):
    """Licences, data and copies; projects inside a folder do not hide the files beside them."""
    monkeypatch.setattr(tune, "build", lambda *args: None)
    repository = tmp_path / "a=b"
    for n in range(8):
        file = repository / ("inner" if n % 2 else "") / f"m{n}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"def f{n}(a):\n    return a * {n}\n")
    (repository / "inner" / "pyproject.toml").write_text("[project]\n")
    (repository / "copy.py").write_bytes((repository / "m0.py").read_bytes())
    (repository / "LICENSE").write_text("as is\n")
    lines = []
    options = tune.TuneOptions(repository, str(model), 1, tmp_path)
    tune.prepare(options, load(model).tokenizer, ("psm", "spm"), lines.append)
    assert lines == ["7 files to learn from, 0 to choose the best step by, 1 held out"]


def code(repository, files, functions=30):
    repository.mkdir()
    for n in range(files):
        (repository / f"m{n}.py").write_text(
            "".join(
                f"def f_{n}_{i}(a, b):\n    total = a + b * {i}\n    return total\n\n\n"
                for i in range(functions)
            )
        )
    return repository


@pytest.mark.parametrize("steps", [2, 60])
def test_tune_stopped_early_keeps_the_best_so_far(model, tmp_path, steps):
    """Before and after the first measurement; the files that choose are neither trained nor measured on."""
    repository, lines, reports = code(tmp_path / "app", 44), [], []

    def stop(report):
        reports.append(report)
        if len(reports) == min(steps, report.steps - 1):
            raise KeyboardInterrupt

    options = tune.TuneOptions(repository, str(model), 2.0, tmp_path / "made", rank=4, holes=9)
    result = tune.tune(options, stop, lines.append)
    assert lines[0] == "38 files to learn from, 2 to choose the best step by, 4 held out"
    assert (result.trained, result.held_out) == (38, 4)
    card = load_adapter(tmp_path / "made").card
    assert 0 < card["steps"] <= len(reports) + 1 and card["held_out"] > 0
    assert card["measured"].keys() == result.gains.keys()
    assert any("stopped early" in line for line in lines) and not (tmp_path / "made" / "work").exists()


def test_tune_measures_on_files_that_the_rows_do_not_hold(model, tmp_path):
    repository, lines = code(tmp_path / "app", 12), []
    options = tune.TuneOptions(repository, str(model), 0.2, tmp_path / "made", rank=4, holes=9)

    def log(line):
        lines.append(line)
        with pytest.raises(ValueError, match="made: is being written by another process: wait for it"):
            tune.tune(replace(options, resume=True), lambda report: None, lines.append)

    result = tune.tune(options, lambda report: None, log)
    assert result.trained + result.held_out == 12 and result.held_out >= 1
    card = load_adapter(tmp_path / "made").card
    assert card["measured"].keys() == result.gains.keys() and not (tmp_path / "made" / "work").exists()
    assert "before -> after" in result.text() and (tmp_path / "made" / "loss.svg").exists()
    with pytest.raises(ValueError, match="finite and above 0, got nan"):
        replace(options, minutes=float("nan"))
    with pytest.raises(ValueError, match="choose another folder"):
        tune.tune(options, lambda report: None, lines.append)


@pytest.mark.parametrize(
    ("change", "says", "not_"),
    [(0.5, "use it: ", "no gain"), (0.0, "no gain", "use it"), (-0.5, "worse than before", "use it: ")],
)
def test_tune_says_use_it_only_where_something_was_gained(tmp_path, change, says, not_):
    before = {str(n): 0.5 + n / 1000 for n in range(20)}
    after = {key: value + change for key, value in before.items()}
    gain = tune.Gain(0.5, 0.5 + change, compare(before, after))
    text = tune.TuneResult(tmp_path / "made", {"exact match": gain}, 9, 1).text()
    assert says in text and not_ not in text and str(tmp_path / "made") in text


def test_tune_measures_no_longer_than_its_share(monkeypatch):
    """Chunks of 20 s each: as many holes as fit, and all of them without a limit; progress tells how many."""
    shown, clock = [], SimpleNamespace(now=0.0)

    def answers(model, holes, layout):
        clock.now += 20
        return [dict.fromkeys(tune.MEASURES.values(), 1.0) for _ in holes]

    monkeypatch.setattr(tune, "LocalModel", lambda *_, **__: None)
    monkeypatch.setattr(tune.heldout, "answers", answers)
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: clock.now))
    values = tune.measure(None, [None] * 60, None, lambda *done: shown.append(done), seconds=30)
    assert {len(column) for column in values.values()} == {24}
    assert shown == [("measuring", 0, 60), ("measuring", 12, 60), ("measuring", 24, 24)]
    assert {len(column) for column in tune.measure(None, [None] * 60, None).values()} == {60}
    assert {len(column) for column in tune.measure(None, [None] * 60, None, seconds=0).values()} == {12}


def test_halfway_between_two_adapters():
    config = tiny_config("gemma-mqa", layers=2)
    first, second = (random_adapter(config, seed=seed, tokens=(7,)) for seed in (1, 2))
    mean = adapter_train.mean(first, second)
    for part in ("a", "b", "rows"):
        for key, value in getattr(mean, part).items():
            np.testing.assert_allclose(
                value, 0.5 * getattr(first, part)[key] + 0.5 * getattr(second, part)[key], rtol=1e-6
            )
    with pytest.raises(ValueError, match="have no mean"):
        adapter_train.mean(replace(first, alpha=2 * first.alpha), second)
