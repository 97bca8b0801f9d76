"""What training writes on a full disk: an error with a path and a remedy; what was there before is kept."""

import errno
import gc
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("tree_sitter")
pytest.importorskip("resource")

import resource

import jax.numpy as jnp
from vocabularies import small

from codegemma.files import explain
from codegemma.tokenizer import Tokenizer
from codegemma.train import job, tune
from codegemma.train.curve import draw
from codegemma.train.session import StepReport
from codegemma.train.settings import TrainingSettings
from codegemma.train.store import RunState, Store, disk_errors_name

REPORT = StepReport(1, 9, 2.5, 0.5, None, 10, 100, 1.0, 1e9, 1e-3, 1.0)
STAMP = {"settings": {}}
LINE = {"loss": 2.5, "tokens": 100, "held_out": None}


@contextmanager
def small_files(size):
    """No file may grow beyond `size` bytes: the system refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def named_path(caught):
    """The path in an error of a full disk, whose text has a remedy too."""
    path = Path(caught.value.filename)
    assert explain(caught.value).startswith(f"{path}: File too large: ") and "name a folder" in explain(
        caught.value
    )
    return path


def run_state(seed, step):
    """A run's state; its checkpoint takes two megabytes."""
    values = np.random.default_rng(seed).standard_normal((2, 512, 512), np.float32)
    weights = {f"w{n}": jnp.asarray(part) for n, part in enumerate(np.split(values[0], 64))}
    return RunState(weights, {"m": jnp.asarray(values[1])}, step)


def test_a_refusal_of_the_disk_names_a_path_whoever_reports_it(tmp_path):
    with pytest.raises(OSError) as caught, disk_errors_name(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError) as caught, disk_errors_name(tmp_path / "x"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(OSError) as caught, disk_errors_name(tmp_path / "x"):
        raise ValueError(f"Failed to write 9 bytes: No space left on device [os_error_code='{errno.ENOSPC}']")
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError, match="^another$"), disk_errors_name(tmp_path / "x"):
        raise ValueError("another")


def test_a_checkpoint_that_does_not_fit_is_an_error_without_a_traceback(tmp_path, caplog):
    """Orbax writes in threads, which log tracebacks; it raises ValueError with a message of TensorStore."""
    store, state = Store(tmp_path / "run", 2, STAMP, False), run_state(0, 0)
    store.restore(state)
    store.log(state, LINE)
    state.step = 1
    with small_files(100_000):
        store.save(state)
        with pytest.raises(OSError) as caught:
            store.close()
    assert named_path(caught) == tmp_path / "run" / "checkpoints"
    assert not [record.message for record in caplog.records if record.exc_info]
    for expected_step in (0, 1):  # the first has no checkpoint to continue from
        store, resumed = Store(tmp_path / "run", 2, STAMP, True), run_state(1, 0)
        store.restore(resumed)
        assert resumed.step == expected_step
        if not expected_step:
            store.log(resumed, LINE)
            store.save(state)
        store.close()
    assert all(np.array_equal(resumed.weights[name], value) for name, value in state.weights.items())
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


def test_metrics_of_a_run_outlive_a_resumption_without_room(tmp_path):
    store, state = Store(tmp_path, 2, STAMP, False), run_state(0, 0)
    store.restore(state)
    for _ in range(3):
        store.log(state, LINE)
        state.step += 1
    store.save(state)
    store.log(state, LINE)  # a step that no checkpoint has
    store.close()
    text = store.metrics.read_text()
    with small_files(100):
        with pytest.raises(OSError) as caught:
            Store(tmp_path, 2, STAMP, True).restore(run_state(1, 0))
        assert named_path(caught) == store.metrics and store.metrics.read_text() == text
        with pytest.raises(OSError) as caught:
            store.log(state, LINE)
        assert named_path(caught) == store.metrics
    (tmp_path / ".loss.svg.999999999-ab.part").write_text("of a killed process")
    store = Store(tmp_path, 2, STAMP, True)
    store.restore(resumed := run_state(1, 0))
    store.close()
    assert resumed.step == len(resumed.history) == 3 and len(store.metrics.read_text().splitlines()) == 3
    assert not [*tmp_path.glob(".*.part")]


def test_a_curve_that_does_not_fit_leaves_the_older_one(tmp_path):
    file = tmp_path / "loss.svg"
    draw([LINE], file)
    drawn = file.read_bytes()
    assert drawn.startswith(b"<?xml") and b"</svg>" in drawn
    with small_files(1000), pytest.raises(OSError) as caught:
        draw([LINE] * 3, file)
    assert named_path(caught) == file and file.read_bytes() == drawn and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("size", "held_out_lines", "name"),
    [(1000, 600, "code"), (60_000, 30_000, "held-out.jsonl"), (60_000, 600, "ready")],
)
def test_tune_without_room_is_not_ready(tmp_path, monkeypatch, size, held_out_lines, name):
    """A line of code takes 2 bytes, and in held-out.jsonl 3; `ready` lists 400 paths of 200 letters."""
    documents = [
        tune.Document("code", f"{'d' * 200}/{n}.py", "x\n" * (600 if n else held_out_lines), "python")
        for n in range(420)
    ]
    monkeypatch.setattr(tune, "_documents", lambda _: documents)
    monkeypatch.setattr(tune, "hold_out", lambda *_: (documents[1:], documents[:1]))
    monkeypatch.setattr(tune, "build", lambda *_: None)
    options = tune.TuneOptions(tmp_path / "code", "m", 1.0, tmp_path / "out")
    with small_files(size), pytest.raises(OSError) as caught:
        tune.prepare(options, Tokenizer.from_sentencepiece(small()), job.FIM_ORDERS, lambda _: None)
    assert named_path(caught).relative_to(options.work).parts[0] == name
    assert not (options.work / "ready").exists()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that cannot be flushed
def test_events_for_tensorboard_are_written_at_once_and_say_where_they_do_not_fit(tmp_path):
    pytest.importorskip("tensorboardX")
    plan = job.TrainingPlan("m", ("rows",), tmp_path, TrainingSettings(), tensorboard=True)
    with job._tensorboard(plan) as write:
        write(REPORT)
        (events,) = (tmp_path / "tensorboard").iterdir()
        stored = events.read_bytes()
        assert all(name.encode() in stored for name in ("loss", "right", "learning_rate", "gradient_norm"))
    with small_files(100), pytest.raises(OSError) as caught, job._tensorboard(plan) as write:
        write(REPORT)
    assert named_path(caught) == tmp_path / "tensorboard"
    del write, caught
    gc.collect()
