"""Kernels of SIMD levels that this CPU may lack, against the plain ones.

AVX-512 and AVX-VNNI are translated to AVX2 by SIMDe, the levels of ARM run on emulated processors, the tile
unit of AMX is imitated (tiles.h). Quantised products must be equal bit for bit, those of tiles and their
attention must equal their definition, and all else must agree within its rounding (levels.cpp).

    apt-get install libsimde-dev                            # AVX-512, AVX-VNNI
    apt-get install g++-aarch64-linux-gnu qemu-user         # ARM
"""

import platform
import re
import subprocess
from pathlib import Path

import pytest
from programs import needs_compiler

from codegemma.native import _native


def available(level):
    try:
        return bool(_native.level(level))
    except ValueError:
        return False


TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "codegemma" / "native" / "src"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wno-psabi",
    f"-I{SOURCES}",
    f"-isystem{TESTS}",
]
SIMDE = Path("/usr/include/simde/x86/avx512.h")
BY_SIMDE = ["-mavx2", "-mfma", "-mf16c", "-include", TESTS / "simde_avx512.h"]
BY_CPU = [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")), *BY_SIMDE[:3]]
needs_simde = pytest.mark.skipif(
    not SIMDE.exists() or platform.machine() != "x86_64",
    reason="needs an x86-64 processor and SIMDe (apt-get install libsimde-dev)",
)
needs_avx512 = pytest.mark.skipif(not available("avx512"), reason="needs a processor with AVX-512")


def run(*commands):
    """Runs commands in parallel and returns their outputs; fails with the output of the first that fails."""
    started = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


KERNELS = ("kernels", "matrix")


def compile_kernels(level, directory, compiler, options=(), sources=KERNELS):
    """The commands that compile the kernels as one level."""
    flags = [*FLAGS, f"-DCG_LEVEL={level}", f'-DCG_LEVEL_NAME="{level}"', *options]
    return [
        [compiler, *flags, "-c", SOURCES / f"{source}.cpp", "-o", directory / f"{level}_{source}.o"]
        for source in sources
    ]


def compare(level, directory, compiler, options, sources=KERNELS):
    """Compiles the kernels as `level` and as plain, links levels.cpp to both, and runs it."""
    program = directory / level
    run(
        *compile_kernels("plain", directory, compiler),
        *compile_kernels(level, directory, compiler, options, sources),
        [compiler, *FLAGS, "-c", TESTS / "levels.cpp", f"-DOTHER={level}", "-o", directory / "main.o"],
    )
    run([compiler, "-static", *directory.glob("*.o"), "-o", program])
    return run([program])[0]


@needs_compiler("g++")
@needs_simde
@pytest.mark.parametrize(
    "level, defined", [("avxvnni", ["-DCG_AVX2", "-DCG_AVXVNNI"]), ("avx512", ["-DCG_AVX512"])]
)
def test_levels_of_x86_equal_plain(level, defined, tmp_path):
    assert f"{level}: " in compare(level, tmp_path, "g++", [*defined, *BY_SIMDE])


@needs_compiler("g++")
@pytest.mark.parametrize(
    "options", [pytest.param(BY_CPU, marks=needs_avx512), pytest.param(BY_SIMDE, marks=needs_simde)]
)
def test_amx_equals_its_definition(options, tmp_path):
    imitated = ["-DCG_AVX512", *options, "-DCG_AMX", "-DCG_IMITATE_TILES"]
    sources = (*KERNELS, "tile_product")
    assert "amx_imitated: " in compare("amx_imitated", tmp_path, "g++", imitated, sources)


@pytest.fixture(scope="module")
def program_for_arm(tmp_path_factory):
    """levels.cpp with all levels of ARM, each compiled with its own flags as in a build."""
    directory, compiler = tmp_path_factory.mktemp("arm"), "aarch64-linux-gnu-g++"
    levels = re.findall(r"add_level\((neon\w*) (.+)\)", (TESTS.parent / "CMakeLists.txt").read_text())
    sources = [TESTS / "levels.cpp", *(SOURCES / f"{name}.cpp" for name in ("program", "pool", "amx"))]
    commands = compile_kernels("plain", directory, compiler)
    for level, options in levels:
        commands += compile_kernels(level, directory, compiler, options.split())
    commands += [[compiler, *FLAGS, "-c", path, "-o", directory / f"{path.stem}.o"] for path in sources]
    for i in range(0, len(commands), 2):
        run(*commands[i : i + 2])
    run([compiler, "-static", *directory.glob("*.o"), "-o", directory / "levels"])
    return directory / "levels"


@needs_compiler("aarch64-linux-gnu-g++", "qemu-aarch64")  # apt-get install g++-aarch64-linux-gnu qemu-user
@pytest.mark.parametrize(
    "processor, level",
    [("cortex-a53", "neon"), ("cortex-a72", "neon"), ("cortex-a76", "neondot"), ("max", "neoni8mm")],
)
def test_levels_of_arm_are_chosen_and_equal_plain(processor, level, program_for_arm):
    """A processor that meets an instruction it lacks ends the program."""
    assert run(["qemu-aarch64", "-cpu", processor, program_for_arm])[0].startswith(f"{level}: ")
