import itertools
import json
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaldata import Fixed, Letters, output_of, records
from tiny import random_adapter, tiny_config, write_tiny_gguf

import codegemma
from codegemma.cli import evals as cli
from codegemma.cli.main import main
from codegemma.evals import language
from codegemma.evals.local import LocalModel
from codegemma.evals.records import Records
from codegemma.evals.remote import RemoteModel
from codegemma.evals.report import compare_runs, load, markdown, write
from codegemma.evals.run import CARD, TASKS, EvalSettings, run
from codegemma.evals.task import ChoiceTask, Decoding, GenerationTask, Item, Verdict
from codegemma.prompts import parse_fim


def echo_items(_):
    return [Item(f"item/{i}", f"prompt {i}", target=str(i)) for i in range(12)], "0-shot"


def echo_judge(items, outputs):
    for i, (item, output) in enumerate(zip(items, outputs, strict=True)):
        yield i, Verdict(output.text.startswith(item.target), "judged", output="at 0x7f0011223344")


def pair_items(_):
    choices = (("a", " yes"), ("a", " no!"))
    return [Item(str(i), choices=choices, target=i % 2) for i in range(70)], "0-shot"


ECHO = GenerationTask("echo", "Echo", echo_items, echo_judge)
PAIRS = ChoiceTask("pairs", "Pairs", pair_items)


def even(prompt, number):
    """Echoes the prompt's number where it and the sample's number are both even or both odd."""
    word = prompt.split()[-1]
    return word if (int(word) + number) % 2 == 0 else "no"


def test_a_run_is_the_same_bytes_and_resumes(tmp_path):
    settings = EvalSettings(samples=3, temperature=0.5)
    summary = run(ECHO, Fixed(even), Records(), tmp_path / "a", settings)
    assert summary["score"] == pytest.approx(0.5) and summary["more"] == {"pass@1": pytest.approx(0.5)}
    with pytest.raises(KeyboardInterrupt):
        run(ECHO, Fixed(even, interrupted_after=20), Records(), tmp_path / "b", settings)
    model = Fixed(even)
    run(ECHO, model, Records(), tmp_path / "b", settings, resume=True)
    assert len(model.prompts) == 6
    for name in ("echo.jsonl", "echo.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "0x7f" not in (tmp_path / "a/echo.jsonl").read_text()
    assert not list(tmp_path.glob("*/*.part*"))


def test_the_unfinished_run_resumes_where_an_older_one_has_finished(tmp_path):
    run(ECHO, Fixed(lambda prompt, number: "no"), Records(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(ECHO, Fixed(even, interrupted_after=5), Records(), tmp_path)
    summary = run(ECHO, model := Fixed(even), Records(), tmp_path, resume=True)
    assert len(model.prompts) == 7 and summary["score"] == 0.5
    assert json.loads((tmp_path / "echo.json").read_text()) == summary


def test_a_set_without_items_is_reported(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text("")
    with pytest.raises(LookupError, match="HumanEval.jsonl has no records: download the file again"):
        run(TASKS["humaneval"], Fixed(even), Records(tmp_path, offline=True), tmp_path)
    empty = replace(ECHO, load_items=lambda records: ([], "0-shot"))
    with pytest.raises(LookupError, match="echo: the set has no items"):
        run(empty, Fixed(even), Records(), tmp_path)


def test_seconds_are_wall_time_and_answers_that_overlap_are_not_added_up(tmp_path, monkeypatch):
    clock = itertools.count(1000)  # one second an answer, and none between two runs
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    run(ECHO, Fixed(even), Records(), tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(ECHO, Fixed(even, interrupted_after=5), Records(), tmp_path / "b")
    next(itertools.islice(clock, 500, None))
    run(ECHO, Fixed(even), Records(), tmp_path / "b", resume=True)
    for name in "ab":
        times = json.loads((tmp_path / name / "echo.times.json").read_text())
        assert (times["seconds"], times["answer_seconds"], times["samples"]) == (12.0, 0.5, 12)
        rate = times["tokens"] / 12
        assert f"| Echo | 12.0 | {rate:.1f} | 0.500 | {times['tokens']} |" in markdown(load(tmp_path / name))


def test_both_rules_of_gsm8k_are_reported(tmp_path):
    def rows(_):
        return [Item(str(i), str(i), target="#### 7") for i in range(4)], "0-shot"

    answers = ["#### 7", "it is 7", "#### 7 of 9", "#### 8"]
    task = replace(TASKS["gsm8k"], load_items=rows)
    summary = run(task, Fixed(lambda prompt, _: answers[int(prompt)]), Records(), tmp_path)
    assert summary["score"] == 0.5 and summary["more"] == {"strict": 0.5, "flexible": 0.5}
    assert summary["outcomes"] == {"flexible": 1, "strict": 1, "strict+flexible": 1, "wrong": 1}


def test_a_line_that_was_cut_off_is_dropped_and_other_settings_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(ECHO, Fixed(even, interrupted_after=4), Records(), tmp_path)
    with (tmp_path / "echo.partial.jsonl").open("a") as file:
        file.write('{"item/3": [{"te')
    with pytest.raises(ValueError, match="of another run"):
        run(ECHO, Fixed(even), Records(), tmp_path, EvalSettings(seed=1), resume=True)
    assert run(ECHO, Fixed(even), Records(), tmp_path, resume=True)["score"] == 0.5
    run(ECHO, untouched := Fixed(even), Records(), tmp_path, resume=True)
    assert not untouched.prompts
    with pytest.raises(ValueError, match="of another run"):
        run(ECHO, Fixed(even), Records(), tmp_path, EvalSettings(seed=1), resume=True)
    with pytest.raises(ValueError, match="pass a temperature"):
        EvalSettings(samples=5)


@pytest.mark.parametrize("name", ["echo.json", "echo.jsonl", "report.md", "report.html"])
def test_files_of_the_same_names_are_not_written_over(tmp_path, name):
    """A folder of data may well hold a gsm8k.jsonl."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists, and no evaluation wrote it"):
        run(ECHO, Fixed(even), Records(), tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len([*tmp_path.iterdir()]) == 1
    (tmp_path / name).unlink()
    run(ECHO, Fixed(even), Records(), tmp_path)
    write(tmp_path)
    run(ECHO, Fixed(even), Records(), tmp_path)


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_of_a_task_is_refused_while_the_first_runs(tmp_path, resume):
    """Another task may run into the same folder."""
    refusals = []

    def second(name, done, total):
        with pytest.raises(ValueError, match=r"echo\.partial\.jsonl: is being written by another process"):
            run(ECHO, Fixed(even), Records(), tmp_path, resume=resume)
        if not refusals:
            pairs = Fixed(logprob=lambda context, continuation: -1.0)
            run(PAIRS, pairs, Records(), tmp_path)
        refusals.append(done)

    summary = run(ECHO, Fixed(even), Records(), tmp_path, progress=second)
    assert len(refusals) == 12 and summary["score"] == 0.5
    run(ECHO, Fixed(even), Records(), tmp_path / "alone")
    for name in ("echo.jsonl", "echo.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial.jsonl"))
    empty = replace(ECHO, load_items=lambda records: ([], "0-shot"))
    with pytest.raises(LookupError):
        run(empty, Fixed(even), Records(), tmp_path)
    assert not list(tmp_path.glob("*.partial.jsonl"))  # the next --resume shall see the summary


def test_choices_are_scored_by_likelihood(tmp_path):
    model = Fixed(logprob=lambda context, continuation: -1.0 if "yes" in continuation else -2.0)
    summary = run(PAIRS, model, Records(), tmp_path)
    assert summary["score"] == 0.5 and summary["items"] == 70
    sample = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[1])
    assert (sample["completion"], sample["passed"], sample["logprobs"]) == (" yes", False, [-4.0, -8.0])


@pytest.fixture
def command(capsys):
    """Runs `codegemma eval` in this process and returns (exit code, what it printed)."""

    def run_command(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["eval", *map(str, arguments)])
        return exit.value.code or 0, "".join(capsys.readouterr())

    return run_command


def test_the_report_and_the_comparison(command, tmp_path):
    for name, answer in (("a", even), ("b", lambda prompt, number: prompt.split()[-1] + "</script>")):
        run(ECHO, Fixed(answer), Records(), tmp_path / name)
        page = write(tmp_path / name).read_text()
    assert "</script>\n" in page and page.count("</script>") == 1 and '"score": 1.0' in page
    markdown = (tmp_path / "a/report.md").read_text()
    assert re.search(r"\| Echo \| 50\.0 \| 25\.4 - 74\.6 \| 12 \|", markdown)
    assert "token 12" in markdown and "0.500" in markdown
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")["echo"]
    assert (comparison.difference, len(comparison.gained), comparison.lost) == (0.5, 6, [])
    code, text = command("compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "echo: +50.0 points" in text and "+ item/1" in text
    with pytest.raises(ValueError, match="no finished benchmark"):
        load(tmp_path)
    for folders in ((tmp_path / "a", tmp_path / "none"), (tmp_path / "none", tmp_path / "a")):
        code, text = command("compare", *folders)
        assert code == 2 and "none is no folder" in text


def test_the_command_runs_benchmarks_by_name(command, tmp_path, monkeypatch):
    records("boolq")
    from evaldata import FOLDER

    monkeypatch.setattr(cli, "open_model", lambda *_: Fixed(logprob=lambda context, rest: -len(rest)))
    code, text = command("boolq", "piqa", "--limit", 20, "--data", FOLDER, "--out", tmp_path)
    assert code == 0 and "BoolQ" in text, text
    assert (tmp_path / "report.html").exists()
    code, text = command("run", "nonsense")
    assert code == 2 and "nonsense" in text
    monkeypatch.setattr(cli, "open_model", lambda *_: Fixed())
    code, text = command("math", "--data", tmp_path, "--out", tmp_path)
    assert code == 2 and "hendrycks_math" in text


@pytest.mark.parametrize(
    ("benchmark", "options", "order", "adapter"),
    [
        ("infill-single", [], "spm", "mine"),
        ("infill-span", [], "spm", "mine"),
        ("infill-single-psm", [], "psm", "none"),
        ("infill-single-spm", ["--adapter", "auto"], "spm", "mine"),
        ("infill-single", ["--adapter", "none"], "psm", "none"),
    ],
)
def test_infilling_asks_as_complete_does_unless_told(
    benchmark, options, order, adapter, command, tmp_path, monkeypatch
):
    """`complete` applies the model's own adapter, and prefers SPM where the adapter was trained in it."""
    config = tiny_config("gemma-mqa", context=2048)
    model = codegemma.load(write_tiny_gguf(tmp_path / "tiny.gguf", config))
    model.add_adapter("mine", replace(random_adapter(config), card={"fim": {"spm": True}}))
    monkeypatch.setattr(model, "_completing_adapter", "mine")
    monkeypatch.setattr(codegemma, "load", lambda _: model)
    row = {"task_id": "x", "prompt": "def f():\n", "suffix": "\n", "canonical_solution": "    return 1\n"}
    for name in ("SingleLine", "RandomSpan"):
        file = tmp_path / f"HumanEval-{name}Infilling.jsonl"
        file.write_text(json.dumps(row | {"test": "def check(f): pass", "entry_point": "f"}))
    seen = []

    def sample(self, prompts, decoding):
        seen.append((parse_fim(self.tokenizer, prompts[0]).layout, self.adapter))
        yield 0, 0, output_of("    return 1\n")

    monkeypatch.setattr(LocalModel, "sample", sample)
    monkeypatch.setattr("codegemma.evals.doctor.require_safe", lambda _: None)
    verdict = Verdict(True, "passed", "x")
    monkeypatch.setattr("codegemma.evals.infill.judge_python", lambda *_: iter([(0, verdict)]))
    status, text = command(benchmark, *options, "--data", tmp_path, "--out", tmp_path / "out")
    assert status == 0 and seen == [(order, adapter)], text
    assert f"FIM ids in {order.upper()} order" in text and ("with mine" in text) == (adapter == "mine")


@pytest.mark.parametrize("name", ["nowhere", "a file", "nowhere/below"])
def test_a_data_folder_that_is_none_is_named_at_once(name, command, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("{}")
    monkeypatch.setattr(cli, "open_model", lambda *_: pytest.fail("a model was loaded first"))
    for benchmarks in (["boolq"], ["infill-single"], ["card"]):
        code, text = command(*benchmarks, "--data", tmp_path / name, "--out", tmp_path / "out")
        fault = "is a file, not a folder" if name == "a file" else "does not exist"
        assert code == 2 and f"{tmp_path / name} {fault}" in " ".join(text.split()), text


def test_the_card_is_the_model_cards_tables():
    assert len(CARD) == 2 + 2 + 16 + 7 + 2 and "babelcode-mbpp-kotlin" in CARD and set(CARD) <= set(TASKS)


@pytest.mark.parametrize(
    ("name", "file", "count", "shots"),
    [
        ("boolq", "boolq", 3270, 0),
        ("piqa", "piqa", 1838, 0),
        ("triviaqa", "triviaqa", 7988, 5),
        ("arc-c", "arc-c-test", 1172, 25),
        ("arc-e", "arc-e-test", 2376, 0),
        ("hellaswag", "hellaswag", 10032, 10),
        ("mmlu", "mmlu-test", None, 5),
        ("winogrande", "winogrande", 1262, 5),
        ("gsm8k", "gsm8k-test", 1319, 5),
    ],
)
def test_language_items(name, file, count, shots):
    benchmark = records(file)
    items, note = TASKS[name].load_items(benchmark)
    assert len(items) == (count or len(benchmark(file))) and len({item.id for item in items}) == len(items)
    assert f"{shots}-shot" in note
    contexts = [context for item in items[:3] for context, _ in item.choices]
    contexts = contexts or [item.prompt for item in items[:3]]
    assert all(context.count("\n\n") >= shots for context in contexts)
    if items[0].choices:
        assert all(text.startswith(" ") for item in items for _, text in item.choices)
        assert all(0 <= item.target < len(item.choices) for item in items)


def test_winogrande_scores_the_text_after_the_blank():
    class Sentences:
        def __call__(self, name):
            options = {"option1": "Ann", "option2": "Bo", "answer": "2"}
            return [{"sentence": f"{i} Ann met Bo and _ spoke."} | options for i in range(7)]

        def maybe(self, name):
            return []

    items, note = language.winogrande_items(Sentences())
    assert len(items) == 2 and "not scored" in note and items[0].target == 1
    assert items[0].choices[0][0].endswith("3 Ann met Bo and Ann") and items[0].choices[0][1] == " spoke."
    assert "0 Ann met Bo and Bo spoke.\n\n" in items[0].choices[0][0]


def test_examples_from_the_scored_set_are_named_after_it():
    """ARC-Challenge is scored on its test set."""
    question = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}

    class TestSet:
        def __call__(self, name):
            return [question] * 40

        def maybe(self, name):
            return []

    items, note = TASKS["arc-c"].load_items(TestSet())
    assert len(items) == 15
    assert note == "25-shot: 25 items of arc-c-test spread over the set, which are not scored"


def test_records_that_are_nowhere_say_where_to_get_them(tmp_path):
    with pytest.raises(LookupError, match="hellaswag_val|Rowan/hellaswag"):
        Records(tmp_path, offline=True)("hellaswag")
    (tmp_path / "HumanEval.jsonl").write_text('{"task_id": "x"}\n{"task')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        Records(tmp_path, offline=True)("humaneval")


class Server(BaseHTTPRequestHandler):
    """A completions server with fixed answers. `echoes`: it gives the log-probabilities of a prompt."""

    echoes = True

    def do_GET(self):
        self.reply({"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [256, ord("!")]:
            return self.reply({"error": "too hot"}, 400)
        if body.get("echo"):
            values = [None, *(-float(i) for i in body["prompt"][1:]), -1.0]
            top = [{"x": v if v != -98.0 else 0.0} if v else None for v in values]
            logprobs = {"token_logprobs": values, "top_logprobs": top}
            return self.reply({"choices": [{"text": "", "logprobs": logprobs if self.echoes else None}]})
        choice = {"text": f"{len(body['prompt'])} {body['seed']}", "finish_reason": "stop"}
        return self.reply({"choices": [choice | {"stop_reason": "\n" if body["stop"] else None}]})

    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_server_answers_in_place_of_a_model(endpoint, monkeypatch):
    model = RemoteModel(endpoint, Letters())
    assert model.name == "served"
    decoding = Decoding(5, frozenset({257}), ("\n",), temperature=0.5, seed=1, samples=2)
    outputs = {(i, number): output for i, number, output in model.sample([[1, 2], [3]], decoding)}
    assert {key: output.text for key, output in outputs.items()} == {
        (0, 0): "2 1000003",
        (0, 1): "2 1000004",
        (1, 0): "1 1000003",
        (1, 1): "1 1000004",
    }
    assert {output.stop_reason for output in outputs.values()} == {"stop"}
    first, second = model.score([([256, 97], [98, 99]), ([256], [97, 99])])
    assert (first.logprobs, first.greedy, second.greedy) == ([-98.0, -99.0], False, True)
    with pytest.raises(ValueError, match="400: .*too hot"):
        list(model.sample([[256, ord("!")]], Decoding(5, frozenset({257}), temperature=0.5, seed=1)))
    monkeypatch.setattr(Server, "echoes", False)
    with pytest.raises(ValueError, match="use vLLM, or a local model"):
        model.score([([256], [97])])
    model.client.close()


def test_a_server_that_cannot_be_reached():
    with pytest.raises(ValueError, match="is the server running"):
        RemoteModel("http://127.0.0.1:9", Letters(), "x").score([([1], [2])])


def test_trivia_accepts_any_alias():
    target = {"value": "Sunset Boulevard", "aliases": ["Sunset Blvd"], "normalized_aliases": []}
    outputs = list(map(output_of, [" The Sunset Boulevard!\nQuestion: more", "sunset blvd.", "Sunset"]))
    verdicts = language.judge_trivia([Item("x", target=target)] * 3, outputs)
    assert [verdict.passed for _, verdict in verdicts] == [True, True, False]
