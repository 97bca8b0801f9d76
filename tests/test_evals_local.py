"""The evaluated model on this machine, against the engine's own logits and answers."""

import numpy as np
import pytest
from tiny import tiny_config, write_tiny_gguf

from codegemma import load
from codegemma.evals.local import LocalModel
from codegemma.evals.task import Decoding
from codegemma.generate.request import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_config("gemma-mqa"))
    return LocalModel(load(path))


def random_ids(count, seed):
    return [2, *np.random.default_rng(seed).integers(3, 500, count - 1).tolist()]


def test_likelihoods_are_those_of_the_logits(model):
    contexts = [random_ids(n, seed) for seed, n in enumerate([1, 2, 70, 150, 150])]
    contexts[4][:100] = contexts[3][:100]
    continuations = [random_ids(n, seed)[1:] for seed, n in enumerate([2, 21, 14, 6])]
    pairs = [(context, ids) for context in contexts for ids in continuations]
    scores = model.score(pairs)
    assert scores == model.score(pairs)  # also from the cache
    for (context, ids), score in zip(pairs, scores, strict=True):
        logits_TV = model.engine.logits([*context, *ids])[len(context) - 1 : -1].astype(np.float64)
        sums_T = np.logaddexp.reduce(logits_TV, axis=1)
        assert score.logprobs == pytest.approx(logits_TV[range(len(ids)), ids] - sums_T, abs=1e-4)
        assert score.greedy == (logits_TV.argmax(1).tolist() == ids)
    with pytest.raises(ValueError, match="a context and a continuation"):
        model.score([([], [3])])


def test_samples_are_the_engines_and_do_not_depend_on_each_other(model):
    prompts = [random_ids(n, n) for n in range(3, 45)]  # more than run together
    outputs = {(i, n): output for i, n, output in model.sample(prompts, Decoding(6, frozenset()))}
    for (i, _), output in outputs.items():
        completion = model.engine.generate(Request(prompts[i], 6))
        assert output.ids == completion.ids and output.stop_reason == "length"
    decoding = Decoding(6, frozenset(), temperature=1.0, samples=2)
    alone = {n: output.ids for _, n, output in model.sample([prompts[7]], decoding)}
    together = {n: output.ids for i, n, output in model.sample(prompts, decoding) if i == 7}
    assert alone == together and alone[0] != alone[1]
