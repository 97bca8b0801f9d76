"""The laws of preference training: rows of pairs, DPO's loss and gradient, resumption; how pairs are made."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("tree_sitter")
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import adapter_pairs
import jax.numpy as jnp
import training
from tiny import tiny_config, write_tiny_gguf

from codegemma import load
from codegemma.adapters.load import load as load_adapter
from codegemma.cli import main as cli
from codegemma.data.build import build
from codegemma.data.pack import Rows
from codegemma.data.recipe import BuildRecipe
from codegemma.train import job, preference
from codegemma.train.lora import new_lora
from codegemma.train.loss import BLOCK
from codegemma.train.objective import Objective
from codegemma.train.order import Order, microbatches
from codegemma.train.preference import Pair
from codegemma.train.session import Session
from codegemma.train.settings import TrainingSettings

END = 70


def random_pairs(count, seed=0):
    """Pairs in which the rejected answer runs on, is cut short, or is another one."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        draw = partial(rng.integers, 75, 300)
        prompt, chosen = [2, 67, *draw(size=rng.integers(1, 4)).tolist(), 68], draw(size=3).tolist()
        other = ([*chosen, *draw(size=2).tolist()], chosen[:1], draw(size=2).tolist())[number % 3]
        made.append(Pair(prompt, [*chosen, END], [*other, END]))
    return made


def test_a_pair_is_two_segments_of_one_row():
    pairs = random_pairs(20)
    too_long = Pair([2] * 20, [5], [6])
    rows, left_out = preference.rows([*pairs, too_long], 40)
    assert left_out == 1 and len({len(row["reference"]) for row in rows}) == 1
    found = []
    for row in rows:
        count = int(row["segments"].max())
        assert count % 2 == 0 and np.isfinite(row["reference"]).sum() == count // 2
        for first in range(1, count, 2):
            texts = []
            for segment in (first, first + 1):
                inside = row["segments"] == segment
                tokens, loss = row["tokens"][inside].tolist(), row["loss"][inside]
                assert row["positions"][inside].tolist() == list(range(inside.sum()))
                answer = int(loss.argmax())
                assert loss[answer:].all()
                texts.append((tokens[:answer], tokens[answer:]))
            assert texts[0][0] == texts[1][0]
            found.append(Pair(texts[0][0], texts[0][1], texts[1][1]))
    assert sorted(found) == sorted(pairs)
    with pytest.raises(ValueError, match="none of 1 pairs fits a row of 40 tokens, .*: raise --length"):
        preference.rows([too_long], 40)


def loss_in_float64(config, weights, pairs, references, settings, ids):
    """The summed DPO loss in float64 NumPy, each answer a sequence of its own."""
    params = {**weights, "embed": weights["embed"].copy()}
    params["embed"][list(ids)] = params.pop("rows")
    total = 0.0
    for pair, reference in zip(pairs, references, strict=True):
        sums = []
        for answer in (pair.chosen, pair.rejected):
            logits = training.reference.logits(config, params, [*pair.prompt, *answer])
            logits = logits[len(pair.prompt) - 1 : -1]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(log_p[np.arange(len(answer)), answer].sum())
        gained = settings.beta * (sums[0] - sums[1] - reference)
        total += np.log1p(np.exp(-gained)) - settings.likelihood * sums[0] / len(pair.chosen)
    return total


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_and_its_gradient_are_those_of_float64(parts):
    """Finite differences along a random direction of some parameters; parts are those of a mesh."""
    config = tiny_config("gemma3", layers=2, width=32, head_width=16, ffn_width=48, vocab=520)
    weights, ids, rng = training.reference.random_params(config, 0), (67, END), np.random.default_rng(1)
    pairs = random_pairs(6)
    rows, _ = preference.rows(pairs, 48)
    assert len(rows) > 1
    order = [Pair(*pair) for row in rows for pair in pairs_of(row)]
    references = rng.normal(0, 2, len(order))
    given = iter(references)
    for row in rows:
        row["reference"][np.isfinite(row["reference"])] = [next(given) for _ in pairs_of(row)]
    settings = TrainingSettings(precision="float32", beta=0.3, likelihood=0.5)
    base, layers = training.layers({name: jnp.asarray(value) for name, value in weights.items()}, ids)
    size = len(rows) + len(rows) % 2
    (batch,) = microbatches(rows, size, parts, BLOCK)
    exactly = partial(loss_in_float64, config, pairs=order, references=references, settings=settings, ids=ids)
    names = ("layers.0.q", "layers.1.down", "layers.1.attn_norm", "final_norm", "rows")
    training.check_gradient(Objective(config, settings), layers, base, batch, weights, exactly, names)


def pairs_of(row):
    """(prompt, chosen, rejected) of each pair of a row."""
    for first in range(1, int(row["segments"].max()), 2):
        sides = []
        for segment in (first, first + 1):
            inside = row["segments"] == segment
            tokens, answer = row["tokens"][inside].tolist(), int(row["loss"][inside].argmax())
            sides.append((tokens[:answer], tokens[answer:]))
        yield sides[0][0], sides[0][1], sides[1][1]


def run(folder, kind="lora", stop=0, resume=False, steps=6, **options):
    """(reports, weights at the end) of a run over pairs."""
    config, params = training.tiny()
    rows, _ = preference.rows(random_pairs(24), 64)
    base, trainable = training.layers(params, (67, END)) if kind == "layers" else (params, None)
    trainable = trainable or new_lora(params, 4, (67, END))
    settings = TrainingSettings(
        5e-3, steps=steps, save_every=2, precision="float32", **{"micro_tokens": 128} | options
    )
    order = Order([rows], 256, epochs=20)
    reports = []
    with Session(config, base, trainable, order, settings, folder, resume=resume) as session:
        for report in session.train():
            reports.append(report)
            if report.step == stop:
                break
        return reports, {name: np.asarray(value) for name, value in session.state.weights.items()}


@pytest.mark.parametrize("kind", ["lora", "layers"])
def test_the_loss_falls_and_the_chosen_answers_are_preferred(kind, tmp_path):
    reports, _ = run(tmp_path, kind, steps=30)
    assert reports[0].loss == pytest.approx(np.log(2), rel=1e-5)  # nothing is preferred yet
    assert reports[-1].loss < 0.5 and reports[-1].right > 0.9


def test_a_resumed_run_keeps_its_references_and_ends_the_same(tmp_path, monkeypatch):
    _, whole = run(tmp_path / "whole")
    run(tmp_path / "cut", stop=3)
    (kept,) = (tmp_path / "cut").glob("reference-*.npy")
    assert kept.read_bytes() == next((tmp_path / "whole").glob("reference-*.npy")).read_bytes()
    monkeypatch.setattr(Objective, "margins", lambda *_: pytest.fail("computed twice"))
    _, resumed = run(tmp_path / "cut", resume=True)
    for name, values in whole.items():
        assert resumed[name].tobytes() == values.tobytes(), name
    assert training.metrics(tmp_path / "cut") == training.metrics(tmp_path / "whole")


def test_the_microbatch_of_pairs_does_not_change_the_step(tmp_path):
    (many, ours), (one, theirs) = run(tmp_path / "a", micro_tokens=64), run(tmp_path / "b", micro_tokens=256)
    assert np.allclose([r.loss for r in many], [r.loss for r in one], rtol=2.0**-13)
    for name, values in theirs.items():
        apart = np.sqrt(np.mean((ours[name] - values) ** 2))
        assert apart < 2**10 * 2.0**-24 * (np.sqrt(np.mean(values**2)) + 5e-3), name


# ----------------------------------------------------------------------------------- jobs, and pairs to make
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_config("gemma-mqa", layers=2))


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """Rows of a small code base, in the tiny model's own vocabulary."""
    root = tmp_path_factory.mktemp("code")
    (root / "app").mkdir()
    for number in range(6):
        text = "".join(f"def f{number}_{i}(a):\n    return a * {i}\n\n\n" for i in range(30))
        (root / "app" / f"m{number}.py").write_text(text)
    recipe = BuildRecipe(1.0, length=480, window=(128, 400), stride=300, loss=("middle", "terminator"))
    build([str(root / "app")], root / "rows", load(model).tokenizer, recipe)
    return root / "rows"


def test_a_job_learns_preferences_of_ids_and_of_texts(model, tmp_path):
    ids, texts = tmp_path / "ids.jsonl", tmp_path / "texts.jsonl"
    faulty = ['{"prompt": [2], "chosen": [5], "rejected": [515]}', '{"prompt": "a", "chosen": [5]}', "{"]
    ids.write_text("\n".join([*(json.dumps(pair._asdict()) for pair in random_pairs(30)), *faulty]))
    question = {"role": "user", "content": "one and one?"}
    two, three = ([{"role": "assistant", "content": text}] for text in ("two", "three or so"))
    forms = [
        {"prompt": "one and one?", "chosen": "two", "rejected": "three or so"},
        {"prompt": [question], "chosen": two, "rejected": three},
        {"chosen": [question, *two], "rejected": [question, *three]},
    ]
    texts.write_text("".join(json.dumps(form) + "\n" for form in forms * 8))
    tokenizer = load(model).tokenizer
    pairs, left_out = preference.read(texts, 515, tokenizer)
    assert len(set(map(str, pairs))) == 1 and not left_out
    assert tokenizer.decode(pairs[0].chosen[:-1]) == "two"
    assert tokenizer.decode(pairs[0].rejected[:-1]) == "three or so"
    assert pairs[0].chosen[-1] == tokenizer.control.end_of_turn
    forms += [
        {"chosen": [question, *two], "rejected": [{**question, "content": "two and two?"}, *three]},
        {"chosen": [question, *two, question, *two], "rejected": [question, *three]},
    ]
    texts_of_several = tmp_path / "several.jsonl"
    texts_of_several.write_text("".join(json.dumps(form) + "\n" for form in forms))
    several, reasons = preference.read(texts_of_several, 515, tokenizer)
    assert several == pairs[:3] and reasons == {"answers to different prompts": 2}
    assert preference.read(ids, 515)[1].total() == 3
    for kind, source, chat in (("layers", ids, False), ("qlora", texts, True)):
        plan = job.TrainingPlan(
            str(model),
            (str(source),),
            tmp_path / kind,
            TrainingSettings(1e-3, micro_tokens=256, likelihood=0.1),
            chat=chat,
            preferences=True,
            kind=kind,
            rank=4,
            batch_tokens=256,
            length=128,
            epochs=10.0,
        )
        reports = []
        training_job = job.TrainingJob(plan)
        assert training_job.left_out.total() == (0 if chat else 3)
        result = training_job.run(on_step=reports.append)
        assert reports[-1].loss < reports[0].loss and reports[-1].right > 0.9
        card = (
            json.loads((result / "card.json").read_text()) if kind == "layers" else load_adapter(result).card
        )
        assert (card["beta"], card["likelihood"]) == (0.1, 0.1)


def test_invalid_preferences_are_refused(model, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def refused(*options):
        with pytest.raises(SystemExit):
            cli.main(["train", str(file), "-m", str(model), "--out", str(tmp_path / "out"), *options])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "prompt must be a list of token ids, got 'a'" in refused("--preferences")
    assert "--preferences where it holds pairs of answers" in refused()
    for option in ("--z-loss", "--horizon"):
        assert "are not for pairs" in refused("--preferences", option, "0.1")


@pytest.mark.parametrize(
    "answer, stopped, fault",
    [
        ("a + b", True, None),
        ("a - b", True, None),
        ("a + b", False, "runs on"),
        ("a + b\n    c", True, "runs on"),
        ("a", True, "cut short"),
        ("", True, "cut short"),
        ("a - b\n    return total", True, "repeats the suffix"),
        ("a + b\n    return total", False, "repeats the suffix"),
    ],
)
def test_faults_of_an_answer(answer, stopped, fault):
    assert adapter_pairs.fault(answer, "a + b", "\n    return total\n", stopped) == fault
    assert adapter_pairs.fault("a + b\n)", "a + b", "\n)\n", True) == "runs on"  # too short to say anything


def test_pairs_are_of_the_rows_and_the_same_bytes_from_the_same_seed(model, built, tmp_path, monkeypatch):
    """Each chosen answer ends a row's example; each rejected one is the engine's, with a fault."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "other.jsonl")]
    for file, seed, batch in zip(files, ("3", "3", "4"), (256, 4, 256), strict=True):
        monkeypatch.setattr(adapter_pairs, "BATCH", batch)
        options = [
            "--out",
            str(file),
            "-m",
            str(model),
            "--holes",
            "12",
            "--max-tokens",
            "60",
            "--seed",
            seed,
        ]
        monkeypatch.setattr(sys, "argv", ["adapter_pairs.py", str(built), *options])
        adapter_pairs.main()
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) >= 12 and {line["fault"] for line in lines} <= {
        "runs on",
        "cut short",
        "repeats the suffix",
    }
    rows, engine = Rows(built), load(model)
    examples = {}
    for number in range(len(rows)):
        tokens = rows[number]["tokens"]
        for example in rows.examples(number):
            ids = tokens[example["start"] : example["end"]].tolist()
            cut = ids.index(68) + 1
            examples[tuple(ids[:cut])] = ids[cut:]
    for line in lines:
        assert line["prompt"][0] == 2 and examples[tuple(line["prompt"][1:])] == line["chosen"]
        assert line["chosen"][-1] == 70 and len(line["chosen"]) <= 31 and line["rejected"] != line["chosen"]
    # the first answer to a hole is the greedy one
    prompt, answer = lines[0]["prompt"], lines[0]["rejected"]
    for n, token in enumerate(answer[:6]):
        assert np.atleast_2d(engine.logits([*prompt, *answer[:n]]))[-1].argmax() == token
    pairs, left_out = preference.read(files[0], 515)
    assert len(pairs) == len(lines) and not left_out
