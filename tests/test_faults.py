"""A fault of one request is its own: with faults planted in tokenizer, sampler, trimming and adapters, every
other request of the batch gets what it gets alone."""

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from serving import served
from tiny import KINDS, random_adapter, write_tiny_gguf

from codegemma import Sampling, load
from codegemma.generate import sampling
from codegemma.generate.engine import Batch
from codegemma.generate.request import Request
from codegemma.serve import requests as jobs
from codegemma.serve.scheduler import Scheduler
from codegemma.tokenizer import Tokenizer

EVIL_SEED, EVIL_TOP, EVIL_ID, EVIL_TEXT, EVIL_SESSION = 666, 13, 300, "\u2603", "evil"
ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    MemoryError,
    RuntimeError,
    OSError,
    AssertionError,
    RecursionError,
)
SHARED = [2, *range(110, 160)]  # of many prompts: the first that comes computes it for all


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = replace(KINDS["gemma-mqa"], context=1024)
    return write_tiny_gguf(tmp_path_factory.mktemp("faults") / "tiny.gguf", config, "Q8_0", seed=3)


def opened(path):
    """A model with an adapter "ours" that works, and one, "evil", whose computation fails."""
    model = load(path, threads=1)
    config = model.engine.backend.config
    for seed, name in ((1, "ours"), (2, "evil")):
        model.engine.add_adapter(name, random_adapter(config, seed, name=name))
    return model


@pytest.fixture
def faults(monkeypatch):
    """Plants faults that a request asks for by its seed, bias, text and so on; returns a function that plants
    one in a model's backend."""
    chance = random.Random(0)

    def fail(where):
        raise chance.choice(ERRORS)(f"planted in {where}")

    def planted(function, where, is_evil):
        def run(*arguments, **options):
            if is_evil(*arguments, **options):
                fail(where)
            return function(*arguments, **options)

        return run

    def plant(owner, name, where, is_evil):
        monkeypatch.setattr(owner, name, planted(getattr(owner, name), where, is_evil))

    def plant_in_backend(model):
        digest = model.engine.adapters["evil"]

        def is_evil(slices, *_):
            return any(part.adapter == digest and chance.random() < 0.7 for part in slices)

        model.engine.backend.run = planted(model.engine.backend.run, "an adapter", is_evil)

    plant(sampling, "choose", "the sampler", lambda s, *_: s.seed == EVIL_SEED and chance.random() < 0.5)
    plant(sampling, "top", "the likeliest", lambda values, k: k == EVIL_TOP)
    plant(Tokenizer, "decode_bytes", "the decoder", lambda self, ids, *_, **__: EVIL_ID in ids)
    plant(Tokenizer, "encode", "the encoder", lambda self, text, *_, **__: EVIL_TEXT in text)
    plant(jobs.Job, "take", "trimming", lambda job, step: job.request.session == EVIL_SESSION)
    return plant_in_backend


# The batch.


def alone(model, request):
    """The tokens of a request of ids, without a cache of others."""
    model.engine.cache.forget_all()
    return model.engine.generate(request).ids


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_goes_on_without_the_request_that_fails(path, faults, seed):
    """Whichever it is: the one that computes the prompt of all, one with a draft, one that has just begun."""
    model, rng = opened(path), random.Random(seed)
    good = [
        Request(
            SHARED + [rng.randrange(110, EVIL_ID) for _ in range(rng.randrange(60))],
            max_tokens=rng.randrange(1, 12),
            sampling=Sampling(rng.choice([0.0, 0.8]), seed=number, bias=((EVIL_ID, -100),)),
            adapter=rng.choice(["none", "ours"]),
        )
        for number in range(5)
    ]
    evil = [
        Request(SHARED, 9, Sampling(0.5, seed=EVIL_SEED)),
        Request(SHARED + SHARED, 9, top_logprobs=EVIL_TOP),
        Request(SHARED, 9, Sampling(bias=((EVIL_ID, 100),))),
        Request(SHARED, 9, adapter="evil"),
        Request(SHARED[:40], 0, adapter="evil"),
    ]
    expected = {number: alone(model, request) for number, request in enumerate(good)}
    model.engine.cache.forget_all()
    faults(model)
    batch, owners = Batch(model.engine, chunk=rng.choice([16, 64])), {}
    waiting = [*enumerate(good), *((None, request) for request in evil)]
    rng.shuffle(waiting)
    ids, errors = {number: [] for number in expected}, []
    while waiting or batch.running:
        if waiting and (not batch.running or rng.random() < 0.5):
            number, request = waiting.pop()
            owners[batch.add(request)] = number
        for running, step in batch.step():
            number = owners[running]
            if isinstance(step, Exception):
                assert number is None and running not in batch.running, step
                errors.append(step)
            elif number is not None and step.token is not None:
                ids[number].append(step.token)
    assert ids == expected and len(errors) >= 3  # some are lucky
    assert {number: alone(model, request) for number, request in enumerate(good)} == expected


def test_a_fault_of_the_backend_alone_fails_all_and_one_is_raised_to_its_caller(path):
    model = opened(path)

    def broken(*_):
        raise MemoryError("no pages")

    sound, model.engine.backend.run = model.engine.backend.run, broken
    batch = Batch(model.engine)
    both = [batch.add(Request(SHARED, 4)), batch.add(Request(SHARED[::-1], 4))]
    assert [(running, str(error)) for running, error in batch.step()] == [(one, "no pages") for one in both]
    with pytest.raises(MemoryError, match="no pages"):
        list(model.engine.generate(Request(SHARED, 4)))
    model.engine.backend.run = sound
    assert (
        model.engine.generate(Request(SHARED, 4)).ids == opened(path).engine.generate(Request(SHARED, 4)).ids
    )


# The server.

CLIENTS, REQUESTS = 8, 1000


def good_bodies():
    rng = random.Random(5)
    bodies = []
    for number in range(24):
        ids = SHARED + [rng.randrange(110, EVIL_ID) for _ in range(rng.randrange(80))]
        body = {"prompt": ids, "max_tokens": rng.randrange(1, 6), "temperature": rng.choice([0, 0.9])}
        body |= {"seed": number, "logit_bias": {str(EVIL_ID): -100}}
        body |= {"adapter": "ours"} if number % 3 == 0 else {}
        body |= {"echo": True, "logprobs": 1} if number % 5 == 0 else {}
        bodies.append(body)
    return bodies


EVIL_BODIES = [
    {"prompt": SHARED, "seed": EVIL_SEED, "temperature": 1, "max_tokens": 20},
    {"prompt": SHARED, "logprobs": EVIL_TOP},
    {"prompt": SHARED, "logit_bias": {str(EVIL_ID): 100}},
    {"prompt": SHARED, "adapter": "evil"},
    {"prompt": SHARED, "adapter": "evil", "echo": True, "logprobs": 1},
    {"prompt": [SHARED, SHARED], "adapter": "evil", "n": 3},
    {"prompt": EVIL_TEXT},
    {"prompt": "def f(", "suffix": ")", "session": EVIL_SESSION},
    {"prompt": SHARED, "session": EVIL_SESSION},
    {"prompt": "def f(", "suffix": EVIL_TEXT},
]


def result(answer):
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["text"], choice["finish_reason"], choice["logprobs"]


def attack(url, stop, chance):
    """A hostile client, until `stop`: each of its requests fails in words, or is abandoned."""
    count = 0
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while not stop.is_set():
            body, count = chance.choice(EVIL_BODIES), count + 1
            kind = chance.random()
            if kind < 0.2:
                with contextlib.suppress(httpx.TimeoutException):
                    client.post("/v1/completions", json=body, timeout=chance.choice([0.001, 0.01]))
            elif kind < 0.5:
                answer = client.post("/v1/completions", json=body | {"stream": True})
                if answer.status_code == 200 and "[DONE]" not in answer.text:
                    assert '"error"' in answer.text and "planted in" in answer.text
            else:
                answer = client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    assert answer.status_code in (400, 429, 500) and answer.json()["error"]["message"]
    return count


def test_eight_clients_of_which_one_is_hostile(path, faults):
    bodies = good_bodies()
    with served(scheduler_of(opened(path))) as server:
        expected = [result(server.post("/v1/completions", json=body)) for body in bodies]
    model = opened(path)
    faults(model)
    stop, chance = threading.Event(), random.Random(7)
    numbers = [chance.randrange(len(bodies)) for _ in range(REQUESTS)]
    with served(scheduler_of(model)) as server, ThreadPoolExecutor(CLIENTS) as pool:
        hostile = pool.submit(attack, server.url, stop, chance)

        def ask(number):
            return number, result(server.post("/v1/completions", json=bodies[number]))

        try:
            for number, answer in pool.map(ask, numbers):
                assert answer == expected[number]
        finally:
            stop.set()
        assert hostile.result(60) > 20
        deadline = time.monotonic() + 30
        while server.service.metrics.running or server.service.metrics.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not server.service._batch.running and not server.service._jobs
        assert [result(server.post("/v1/completions", json=body)) for body in bodies] == expected


def scheduler_of(model):
    async def open_scheduler():
        return Scheduler(model)

    return open_scheduler


def test_each_planted_fault_has_its_own_status(path, faults):
    """A fault that a client meets says so, on plain and on streamed answers."""
    model = opened(path)
    faults(model)
    with served(scheduler_of(model)) as server:
        for body in EVIL_BODIES[1:3] + EVIL_BODIES[6:]:
            answer = server.post("/v1/completions", json=body)
            assert answer.status_code in (400, 500) and answer.json()["error"]["message"], body
            streamed = server.post("/v1/completions", json=body | {"stream": True})
            assert '"error"' in streamed.text and "[DONE]" not in streamed.text
