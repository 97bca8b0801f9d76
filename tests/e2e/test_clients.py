"""Real clients of `codegemma serve`, run with the default model: they get the answers of the Python API."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import ROOT, Process

from codegemma import Sampling, load

pytestmark = pytest.mark.filterwarnings("ignore:Gemma 3 270M was made")  # not made for chat, which is tested

PREFIX = 'def area(width, height):\n    """The area of a rectangle."""\n    return '
SUFFIX = "\n\nprint(area(2, 3))\n"


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An environment with an empty cache, which shares only models and tokenizers with the user's."""
    cache = tmp_path_factory.mktemp("cache") / "codegemma"
    cache.mkdir()
    shared = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "codegemma")
    for name in ("models", "tokenizers"):
        (cache / name).symlink_to(shared / name)
    return os.environ | {"XDG_CACHE_HOME": str(cache.parent)}


@pytest.fixture(scope="module")
def server(model, home):
    with Process(environment=home) as process:
        yield process


@pytest.fixture(scope="module")
def completed(model):
    completion = model.complete(PREFIX, SUFFIX, max_tokens=8)
    assert completion.text
    return completion


@pytest.fixture(scope="module")
def middle(completed):
    return completed.text


@pytest.fixture(scope="module")
def count(completed):
    return len(completed.ids)


def test_openai(server, model, middle, count):
    from openai import BadRequestError, OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        arguments = {"model": "any", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 8, "temperature": 0}
        done = client.completions.create(**arguments)
        assert done.choices[0].text == middle and done.usage.completion_tokens == count
        chunks = list(
            client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
        )
        assert (
            "".join(choice.text for chunk in chunks for choice in chunk.choices) == middle
            and chunks[-1].usage.completion_tokens == count
        )
        ids = model.tokenizer.encode("def f(", bos=True)
        scored = client.completions.create(
            model="any", prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        assert len(scored.choices[0].logprobs.token_logprobs) == len(ids) + 1
        messages = [{"role": "user", "content": "Say hi."}]
        expected = model.chat([("user", "Say hi.")], max_tokens=6).text
        chat = client.chat.completions.create(
            model="any", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
        )
        assert (
            chat.choices[0].message.content == expected
            and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
        )
        streamed = client.chat.completions.create(
            model="any", messages=messages, max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
        assert [entry.id for entry in client.models.list()] == ["gemma-3-270m", *model.adapters]
        with pytest.raises(BadRequestError, match="temperature"):
            client.completions.create(**arguments | {"temperature": -1})
        first, second = (
            client.completions.create(model="any", prompt="def f(", max_tokens=8, temperature=1.0, seed=s)
            for s in (1, 2)
        )
        assert (
            first.choices[0].text
            == model.generate("def f(", max_tokens=8, sampling=Sampling(1.0, seed=1)).text
        )
        assert first.choices[0].text != second.choices[0].text


def test_ollama(server, model, middle, count):
    from ollama import Client, ResponseError

    client = Client(host=server.url)
    options = {"num_predict": 8, "temperature": 0}
    assert client.generate("any", PREFIX, SUFFIX, options=options).response == middle
    parts = list(client.generate("any", PREFIX, SUFFIX, options=options, stream=True))
    assert (
        "".join(part.response for part in parts) == middle
        and parts[-1].done
        and parts[-1].eval_count == count
    )
    expected = model.chat([("user", "Say hi.")], max_tokens=8).text
    assert (
        client.chat("any", [{"role": "user", "content": "Say hi."}], options=options).message.content
        == expected
    )
    assert "insert" in client.show("any").capabilities and ".Suffix" in client.show("any").template
    assert client.list().models[0].model == "gemma-3-270m:latest" and client.ps().models
    with pytest.raises(ResponseError, match="does not support thinking"):
        client.generate("any", "x", think=True)


# The client leaves a socket to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mistral(server, middle, count):
    from mistralai.client import Mistral

    with Mistral(api_key="none", server_url=server.url, timeout_ms=300_000) as client:
        arguments = {"model": "any", "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 8, "temperature": 0}
        done = client.fim.complete(**arguments)
        assert done.choices[0].message.content == middle and done.usage.completion_tokens == count
        with client.fim.stream(**arguments) as events:
            assert "".join(event.data.choices[0].delta.content for event in events) == middle
    gc.collect()


def test_curl_as_llama_vim_sends(server, middle):
    body = {
        "id_slot": 0,
        "input_prefix": PREFIX.rpartition("\n")[0] + "\n",
        "prompt": PREFIX.rpartition("\n")[2],
        "input_suffix": SUFFIX,
        "input_extra": [],
        "n_predict": 8,
        "n_indent": 0,
        "top_k": 40,
        "top_p": 0.9,
        "samplers": ["top_k", "top_p", "infill"],
        "stream": False,
        "cache_prompt": True,
        "stop": [],
        "t_max_prompt_ms": 60000,
        "t_max_predict_ms": 60000,
        "response_fields": [
            "content",
            "timings/prompt_n",
            "timings/predicted_n",
            "truncated",
            "tokens_cached",
        ],
    }
    command = ["curl", "--silent", "--no-buffer", "--request", "POST", "--url", f"{server.url}/infill"]
    command += ["--header", "Content-Type: application/json", "--data", "@-"]
    out = subprocess.run(
        command, input=json.dumps(body), capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert '"content":"' in out and json.loads(out)["content"] == middle


def test_tabby_and_the_terms(server, model):
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        answer = client.post(
            "/v1/completions",
            json={"language": "python", "segments": {"prefix": PREFIX, "suffix": SUFFIX}, "seed": 1},
        ).json()
        assert (
            answer["choices"][0]["text"] == model.complete(PREFIX, SUFFIX, max_tokens=64).text
            and answer["id"]
        )
        terms = client.get("/terms").text
        assert "Gemma Terms of Use" in terms and "Prohibited Use Policy" in terms and "Section 3" in terms
        assert client.get("/").status_code == 200


def test_many_clients_at_once_get_what_each_gets_alone(server, model):
    """Eight clients with eight holes."""
    holes = [(f"def power_{n}(x):\n    return ", f"\n\nprint(power_{n}(2))\n") for n in range(8)]
    expected = [model.complete(*hole, max_tokens=6).text for hole in holes]

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300, trust_env=False) as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/infill",
                        json={
                            "input_prefix": prefix,
                            "input_suffix": suffix,
                            "n_predict": 6,
                            "session": str(n),
                        },
                    )
                    for n, (prefix, suffix) in enumerate(holes)
                )
            )
        return [answer.json()["content"] for answer in answers]

    assert asyncio.run(ask()) == expected


def test_after_a_stop_and_after_a_kill(home):
    """SIGTERM saves the cached prompts; after SIGKILL a new server has those that were saved last."""
    body = {"input_prefix": "def f(x):\n    return x\n" * 20, "input_suffix": "", "n_predict": 1}

    def cached(url: str) -> int:
        deadline = time.monotonic() + 60  # the cache is read in the background
        while time.monotonic() < deadline:
            tokens = httpx.post(f"{url}/infill", json=body, timeout=300, trust_env=False).json()[
                "tokens_cached"
            ]
            if tokens:
                break
        return tokens

    with Process(environment=home) as first:
        assert (
            httpx.post(f"{first.url}/infill", json=body, timeout=300, trust_env=False).json()["tokens_cached"]
            == 0
        )
    with Process(environment=home) as second:
        before = cached(second.url)
        assert before > 100
        second.child.send_signal(signal.SIGKILL)
        second.child.wait()
    with Process(environment=home) as third:
        assert cached(third.url) == before


def test_an_open_address_needs_keys_and_two_workers_share_them(home, tmp_path):
    refused = subprocess.run(
        [sys.executable, "-m", "codegemma.cli", "serve", "--host", "0.0.0.0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "--api-key-file" in refused.stderr
    (tmp_path / "keys").write_text("a-key-of-some-length\n")
    with Process(
        "--host", "0.0.0.0", "--workers", "2", "--api-key-file", str(tmp_path / "keys"), environment=home
    ) as server:
        url = f"http://127.0.0.1:{server.url.rpartition(':')[2]}"
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            answers = [
                httpx.post(
                    f"{url}/v1/completions",
                    json={"prompt": "def f(", "max_tokens": 4, "temperature": 0},
                    timeout=300,
                    headers={"Authorization": "Bearer a-key-of-some-length"},
                    trust_env=False,
                ).json()["choices"]
                for _ in range(4)
            ]
            assert all(answer == answers[0] for answer in answers)
