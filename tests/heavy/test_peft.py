"""Adapters that we save, loaded by peft on a random model, against our own runtime.

PYTHONPATH=.:tests .venv-bench/bin/python -m pytest tests/heavy/test_peft.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import numpy as np
import pytest
from reference import golden, tolerance
from tiny import random_adapter

from codegemma.adapters.merge import merge as merge_adapters
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.tensors import ArrayTensor
from codegemma.generate.engine import Engine
from codegemma.native import Native

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gemma1-mqa", {"kinds": "qv"}),
        ("gemma1-mha", {"ranks": (5, 3)}),
        ("gemma2", {"tokens": (7, 70)}),
        ("gemma3", {"tokens": (67, 68), "ranks": (40,)}),
    ],
)
def test_peft_gives_our_logits(kind, changes, tmp_path):
    from make_golden_lora import base, logits

    config, params, ids, _ = golden(kind)
    ids[:4] = [2, 7, 67, 70]
    adapter = random_adapter(config, **changes)
    theirs = logits(
        peft.PeftModel.from_pretrained(base(kind), save_adapter(adapter, tmp_path / "a")).eval(), ids
    )
    checkpoint = Checkpoint(
        tmp_path, config, {name: ArrayTensor.of(value) for name, value in params.items()}, {}, None
    )
    merged = {name: tensor.float32() for name, tensor in merge_adapters(checkpoint, adapter).tensors.items()}
    backend = Native(checkpoint)
    engine = Engine(backend)
    engine.add_adapter("one", adapter)
    ours = engine.logits(ids, adapter="one")
    assert np.abs(ours - theirs).max() < 2 * tolerance(config, merged, ids)
    assert np.abs(engine.logits(ids) - theirs).max() > 0.1
