"""The sweep in its shortest form: one run of each case of files, ten seconds of clients of the tiny model.

PYTHONPATH=.:tests .venv/bin/python -m pytest tests/heavy/test_sweep.py
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("typer")

from sweep.__main__ import sweep
from sweep.storage import FAULTS

CASES = ("convert", "data build", "cache saving", "pull from a folder", "train")


@pytest.mark.parametrize("case", [*CASES, "the tiny model"])
def test_no_law_is_broken(case, tmp_path):
    if case == "train":
        pytest.importorskip("jax")
    rows = list(sweep(runs=1, seconds=10, only=case, seed=0, root=tmp_path))
    for row in rows:
        print(row)
    assert len(rows) == (len(FAULTS) if case in CASES else 1)
    assert not [(row.case, row.violations) for row in rows if row.violations]
