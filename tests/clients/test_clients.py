"""Large clients against `codegemma serve` with the default model: `make test-clients`.

npm's openai and ollama, Continue's adapters, Spyder's FIM worker, lm-eval's two API models, llm,
schemathesis. Their environments are .venv-clients and node_modules beside this file.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from evaldata import records
from serving import ROOT, Process
from tiny import tiny_config, write_tiny_gguf

from codegemma import load
from codegemma.evals.language import TASKS
from codegemma.evals.local import LocalModel
from codegemma.evals.task import encode_choice

HERE = Path(__file__).parent
TOOLS = ROOT / ".venv-clients" / "bin"
pytestmark = pytest.mark.filterwarnings("ignore:Gemma 3 270M was made")  # it chats, badly

PREFIX = 'def area(width, height):\n    """The area of a rectangle."""\n    return '
SUFFIX = "\n\nprint(area(2, 3))\n"


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def server(model):
    with Process("--no-keep-cache") as process:
        yield process


def run(*command, **options):
    """The output of a program. Where it fails, the assertion shows its last messages."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=1800, **options
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_npm_clients_and_continue(server, model):
    answers = json.loads(run("node", HERE / "clients.mjs", server.url, PREFIX, SUFFIX))
    middle = model.complete(PREFIX, SUFFIX, max_tokens=8).text
    for name in ("openai", "openai_stream", "ollama", "ollama_stream", "continue_openai", "continue_mistral"):
        assert answers[name] == middle, name
    chat = model.chat([("user", "Say hi.")], max_tokens=8).text
    assert (
        answers["openai_chat"] == answers["ollama_chat"] == chat
        and answers["openai_models"] == "gemma-3-270m"
    )
    assert ".Suffix" in answers["ollama_template"]  # then Continue sends a suffix
    rendered = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    assert answers["continue_raw"] == model.generate(rendered, raw=True, max_tokens=8).text


def test_spyders_fim_worker_by_each_of_its_backends(server, model):
    """The worker strips its answers. Its chat backend writes the FIM prompt into a message, in which control
    tokens are text."""
    answers = json.loads(
        run(TOOLS / "python", HERE / "fim_worker.py", server.url, "codegemma", PREFIX, SUFFIX)
    )
    rendered = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    middle = model.complete(PREFIX, SUFFIX, max_tokens=8).text.strip()
    assert middle and answers == {
        "ollama_generate": middle,
        "openai_completions": middle,
        "codestral": middle,
        "chat": model.chat([("user", rendered)], max_tokens=8).text.strip(),
    }


@pytest.mark.parametrize(("name", "count"), [("piqa", 12), ("hellaswag", 4)])
def test_lm_eval_scores_as_our_own_evaluation(server, model, tmp_path, name, count):
    """lm-eval's remote tokenizer adds no <bos>, so the task writes it."""
    items = TASKS[name].items(records(name))[0][:count]
    rows = [
        {
            "context": item.choices[0][0],
            "choices": [text.strip() for _, text in item.choices],
            "label": item.target,
        }
        for item in items
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ours.yaml").write_text(f"""
task: ours_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "<bos>{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    arguments = (
        f"model=gemma-3-270m,base_url={server.url}/v1/completions,tokenizer_backend=remote,"
        "num_concurrent=2,max_retries=1"
    )
    run(
        TOOLS / "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--model_args",
        arguments,
        "--tasks",
        f"ours_{name}",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
        "--batch_size",
        "1",
        env=os.environ
        | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    (sample_file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = sorted(
        (json.loads(line) for line in sample_file.read_text().splitlines()),
        key=lambda sample: sample["doc_id"],
    )
    ours = LocalModel(model)
    for sample, row in zip(samples, rows, strict=True):
        pairs = [encode_choice(model.tokenizer, (row["context"], f" {choice}")) for choice in row["choices"]]
        expected = [sum(score.logprobs) for score in ours.score(pairs)]
        theirs = [
            float(answer[0][0]) if isinstance(answer[0], list) else float(answer[0])
            for answer in sample["filtered_resps"]
        ]
        assert theirs == pytest.approx(expected, abs=1e-4)
        assert sample["acc"] == float(max(range(len(expected)), key=expected.__getitem__) == row["label"])


def test_lm_eval_generates_through_the_chat_route(server, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"Count to {n}.", "answer": "x"}) + "\n" for n in (2, 3))
    )
    (tmp_path / "ours.yaml").write_text(f"""
task: ours_chat
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""")
    arguments = f"model=gemma-3-270m,base_url={server.url}/v1/chat/completions,num_concurrent=1,max_retries=1"
    run(
        TOOLS / "lm_eval",
        "run",
        "--model",
        "local-chat-completions",
        "--model_args",
        arguments,
        "--tasks",
        "ours_chat",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
        "--apply_chat_template",
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"},
    )
    (sample_file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in sample_file.read_text().splitlines()]
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_llm_and_its_openai_plug_in(server, model, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(f"""
- model_id: ours
  model_name: gemma-3-270m
  api_base: {server.url}/v1
- model_id: ours-completion
  model_name: gemma-3-270m
  api_base: {server.url}/v1
  completion: true
""")
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    options = ("-o", "temperature", "0", "-o", "max_tokens", "8", "--no-log", "--key", "none")
    expected = model.chat([("user", "Say hi.")], max_tokens=8).text
    for stream in ((), ("--no-stream",)):
        assert (
            run(TOOLS / "llm", "-m", "ours", *options, *stream, "Say hi.", env=environment).strip()
            == expected.strip()
        )
    text = run(TOOLS / "llm", "-m", "ours-completion", *options, "def area(", env=environment)
    assert text.strip() == model.generate("def area(", max_tokens=8).text.strip()


def test_no_request_that_our_openapi_document_allows_fails(tmp_path):
    """With a tiny model, since there are thousands of answers."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa", context=512), "Q8_0")
    with Process("--no-keep-cache", "-m", str(path)) as server:
        run(
            TOOLS / "schemathesis",
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            "not_a_server_error",
            "--max-examples",
            "15",
            "--phases",
            "examples,coverage,fuzzing",
            "--request-timeout",
            "120",
            "--generation-deterministic",
            "--workers",
            "2",
            "--no-color",
            cwd=tmp_path,
        )
        assert not [line for line in server.log if re.search(r": 50[02]$|Traceback", line)]
