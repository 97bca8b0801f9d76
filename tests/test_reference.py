"""The float64 twin against transformers, and a check that the golden files exercise every feature."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from reference import golden, logits, tolerance

KINDS = ("gemma1-mqa", "gemma1-mha", "gemma2", "gemma3")


@cache
def load(kind):
    config, params, ids, theirs = golden(kind)
    return config, params, ids, theirs, tolerance(config, params, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_twin_equals_transformers(kind):
    config, params, ids, theirs, bound = load(kind)
    ours = logits(config, params, ids)
    assert np.abs(ours - theirs).max() < bound
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize(
    "kind, change",
    [
        ("gemma1-mqa", {"rope_base": 11_000.0}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"window": 17}),
        ("gemma2", {"query_scale": 24**-0.5}),
        ("gemma3", {"window": 11}),
        ("gemma3", {"rope_scale": 7.0}),
        ("gemma3", {"rope_base": 9e5}),
        ("gemma3", {"rope_base_local": 9e3}),
        ("gemma3", {"global_every": 5}),
    ],
)
def test_golden_files_notice_each_field(kind, change):
    config, params, ids, theirs, bound = load(kind)
    assert np.abs(logits(replace(config, **change), params, ids) - theirs).max() > 10 * bound


def test_future_tokens_change_nothing():
    config, params, ids, *_ = load("gemma3")
    all_TV, first_TV = logits(config, params, ids), logits(config, params, ids[:40])
    assert np.abs(all_TV[:40] - first_TV).max() < 1e-12
