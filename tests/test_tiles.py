"""Level amx on every x86-64 machine, with the tile unit imitated (tiles.h).

The engine is built once more, with level amx-imitated. On it run the tests of products by numerics v2, of the
engine's laws, with adapters too, of the default model's distance from its float64 twin, and of training.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from programs import needs_compiler
from test_levels import BY_SIMDE, SIMDE, available

ROOT = Path(__file__).parent.parent
TESTS = {  # float32 weights are not multiplied by tiles
    "test_native.py": "numerics_v2",
    "test_engine.py": "(change_nothing or change_no_step) and not F32",
    "test_lora.py": "(change_nothing or change_no_step) and not F32",
    "test_golden.py": "llamacpp_and_the_twin",
}
if find_spec("jax"):
    TESTS["test_xla.py"] = "products_of_bfloat16_factors or any_number_of_threads"


@needs_compiler("g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_the_laws_hold_on_tiles(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for program in ("cmake", "ninja"):
        if not shutil.which(program, path=environment["PATH"]):
            pytest.skip(f"{program} is not installed (pip install {program})")
    options = ["-DCG_IMITATE_TILES=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if not available("avx512"):
        if not SIMDE.exists():
            pytest.skip("needs a processor with AVX-512, or SIMDe (apt-get install libsimde-dev)")
        options.append(f"-DIMITATION_FLAGS={';'.join(map(str, BY_SIMDE))}")
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *options], environment)
    run(["ninja", "-C", tmp_path], environment)
    (engine,) = tmp_path.glob("_native*.so")
    environment |= {"OTHER_ENGINE": str(engine), "CODEGEMMA_SIMD": "amx-imitated"}
    for file, chosen in TESTS.items():
        pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "other_engine", "-p", "no:cacheprovider"]
        out = run(
            [*pytest_, ROOT / "tests" / file, "-k", chosen], environment | {"PYTHONPATH": ROOT / "tests"}
        )
        assert " passed" in out or " skipped" in out, out


def run(command, environment):
    """The output of a command, which must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout
