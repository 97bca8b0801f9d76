"""The sweep in its shortest form: one run of each case of files, ten seconds of clients of the tiny model.

PYTHONPATH=.:tests .venv/bin/python -m pytest tests/heavy/test_sweep.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest

pytest.importorskip("fastapi")  # of this package's own environment, not of those of `make test-formats`
program = pytest.importorskip("sweep.__main__")
storage = pytest.importorskip("sweep.storage")

CASES = ("convert", "data build", "cache saving", "pull from a folder", "train")


@pytest.mark.parametrize("case", [*CASES, "the tiny model"])
def test_no_law_is_broken(case, tmp_path):
    if case == "train":
        pytest.importorskip("jax")
    rows = list(program.sweep(runs=1, seconds=10, only=case, seed=0, root=tmp_path))
    for row in rows:
        print(row)
    assert len(rows) == (len(storage.FAULTS) if case in CASES else 1)
    assert not [(row.case, row.violations) for row in rows if row.violations]
