"""Training as users start it: chats and rows into adapters and models, and `codegemma tune` on a small code base."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("tree_sitter")

from tiny import tiny_config, write_tiny_gguf

from codegemma import load, lora
from codegemma.data.documents import Document
from codegemma.prompts import Message
from codegemma.train import job, sft, tune
from codegemma.train.loop import Settings

TURNS = [Message("user", "add one and one"), Message("assistant", "two")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_config("gemma-mqa", layers=2))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"input": f"what is {n} plus {n}?", "output": f"it is {2 * n}"}) + "\n" for n in range(40)))
    return file


@pytest.mark.parametrize("line", [
    {"messages": [{"role": "user", "content": "add one and one"}, {"role": "assistant", "content": "two"}]},
    {"conversations": [{"from": "human", "value": "add one and one"}, {"from": "gpt", "value": "two"}]},
    {"input": "add one and one", "output": "two"}, {"prompt": "add one and one", "completion": "two"},
    {"instruction": "add one and one", "input": "", "output": "two"}])
def test_every_form_of_a_dialogue_is_read(line, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(line) + "\n\n")
    assert list(sft.read(file)) == [TURNS]


@pytest.mark.parametrize("line", ['{"text": "no pair"}', '{"input": 3, "output": "x"}', "[1]", "{",
                                  '{"messages": [{"role": "user", "content": "and?"}]}'])
def test_a_wrong_line_is_named(line, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input": "a", "output": "b"}\n' + line)
    with pytest.raises(ValueError, match="bad.jsonl, line 2: "):
        list(sft.read(tmp_path / "bad.jsonl"))


def test_rows_of_chats_teach_the_answers_alone(model):
    tokenizer = load(model).tokenizer
    rows, left = sft.rows([TURNS, TURNS, [Message("user", "long " * 500), Message("assistant", "x")]], tokenizer, 64)
    assert left == 1 and sum(row["segments"].max() for row in rows) == 2
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            learned = row["tokens"][here & row["loss"]].tolist()
            assert learned[-1] == tokenizer.control.end_of_turn and tokenizer.decode(learned[:-1]) == "two"
            assert row["tokens"][here][0] == tokenizer.control.bos and row["positions"][here][0] == 0
    with pytest.raises(ValueError, match="none of 1 dialogues fits"):
        sft.rows([TURNS], tokenizer, 8)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_a_job_ends_with_something_that_loads_and_has_learned(kind, model, chats, tmp_path):
    settings = Settings(5e-3, micro_tokens=256, save_every=3)
    plan = job.Plan(str(model), (str(chats),), tmp_path / "out", settings, chat=True, kind=kind, rank=4, batch_tokens=512,
                    length=128, epochs=8.0)
    reports = []
    made = job.run(plan, tell=reports.append)
    assert reports[-1].loss < reports[0].loss - 0.5 and made == plan.result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, ids = load(model, cache_bytes=0), load(model).tokenizer.encode("what is 3 plus")
        if kind == "full":
            assert not np.array_equal(load(made).logits(ids), base.logits(ids))
        else:
            base.add_adapter("made", lora.load(made))
            assert not np.array_equal(base.engine.logits(ids, adapter="made"), base.logits(ids))


def test_a_job_whose_time_is_up_leaves_what_it_has(model, chats, tmp_path):
    plan = job.Plan(str(model), (str(chats),), tmp_path / "out", Settings(save_every=100), chat=True, rank=4, batch_tokens=512,
                    length=128, epochs=8.0)
    reports = []
    assert lora.load(job.run(plan, tell=reports.append, until=0.0)).rank == 4
    assert [report.step for report in reports] == [1] and job.steps_of(plan) > 1


def test_files_are_held_out_by_a_hash_and_never_all():
    documents = [Document("r", f"{n}.py", "x = 1\n", "python") for n in range(50)]
    taught, kept = tune.hold_out(documents, Path("/nowhere"), 0)
    assert len(kept) == 5 and {one.path for one in taught} | {one.path for one in kept} == {one.path for one in documents}
    assert tune.hold_out(documents[::-1], Path("/nowhere"), 0)[1] == kept
    assert tune.hold_out(documents, Path("/nowhere"), 1)[1] != kept


def test_tune_measures_on_files_that_the_rows_do_not_hold(model, tmp_path):
    repository = tmp_path / "app"
    repository.mkdir()
    for n in range(12):
        (repository / f"m{n}.py").write_text("".join(f"def f_{n}_{i}(a, b):\n    total = a + b * {i}\n    return total\n\n\n"
                                                      for i in range(30)))
    said = []
    result = tune.tune(repository, str(model), 0.2, tmp_path / "made", "auto", 4, 9, 0, False, lambda total: lambda report: None,
                       said.append)
    assert result.trained + result.held_out == 12 and result.held_out >= 1
    adapter = lora.load(tmp_path / "made")
    assert adapter.card["measured"].keys() == result.figures.keys() and not (tmp_path / "made" / "work").exists()
    assert "before -> after" in result.text() and (tmp_path / "made" / "loss.svg").exists()
    with pytest.raises(ValueError, match="choose another folder"):
        tune.tune(repository, str(model), 1, tmp_path / "made", "auto", 4, 9, 0, False, lambda total: None, said.append)
