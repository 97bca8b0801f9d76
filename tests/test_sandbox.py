import os
import platform
import shutil
import socket
import subprocess
import sys

import pytest

from codegemma.evals.doctor import ATTACKS, self_test
from codegemma.sandbox import Limits, Sandbox, SandboxError

needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def box():
    if not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def test_attacks_fail_and_good_programs_pass(box):
    broken = [(name, message) for name, held, message in self_test(box) if not held]
    assert not broken


@needs_bwrap
@pytest.mark.skipif(os.geteuid() == 0, reason="the kernel limits root's processes by cgroup only")
def test_attacks_fail_with_rlimits_alone():
    with Sandbox(workers=1, use_cgroups=False) as sandbox:
        assert not [(name, message) for name, held, message in self_test(sandbox) if not held]


@pytest.mark.parametrize(
    "name",
    [
        "network",
        "reading the host's files",
        "seeing other processes",
        "reading the environment of its parents",
        "a forged verdict",
        "leaving before the tests",
        "leaving by exception",
    ],
)
def test_attacks_succeed_outside_the_sandbox(name, tmp_path):
    """Outside the sandbox these attacks succeed: one that always fails would prove nothing."""
    (tmp_path / "secret").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = ATTACKS[name].program.replace("SECRET", repr(str(tmp_path / "secret")))
        source = source.replace("HOST", str(server.getsockname()[1]))
        source = source.replace("/proc/1/", f"/proc/{os.getpid()}/")
        result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert result.returncode == 0 or "outcome" in result.stdout


@pytest.mark.parametrize(
    ("source", "outcome", "code"),
    [
        ("print('out'); import sys; print('err', file=sys.stderr)", "passed", 0),
        ("raise SystemExit(3)", "failed", 3),
        ("raise SystemExit('no')", "failed", 1),
        ("1/0", "failed", 1),
        ("x = (", "failed", 1),
        ("import os; os.kill(os.getpid(), 9)", "failed", -9),
        ("import os\nif os.fork(): os._exit(0)", "failed", 0),
        ("import threading\nthreading.Thread(target=print, args=['late']).start()", "passed", 0),
        ("from dataclasses import dataclass\n@dataclass\nclass A: x: int\nassert A(1) == A(1)", "passed", 0),
    ],
)
def test_outcomes(box, source, outcome, code):
    result = box.run_python(source)
    assert (result.outcome, result.exit_code) == (outcome, code), result.stderr


def test_stdout_and_stderr_are_returned(box):
    source = "print('out'); import sys; print('err', file=sys.stderr); print(input() if 0 else '')"
    result = box.run_python(source)
    assert (result.stdout, result.stderr) == ("out\n\n", "err\n")
    assert box.run_python("raise SystemExit(0)", must_finish=False).outcome == "passed"


def test_jobs_do_not_see_each_other(box):
    first = "open('file', 'w').write('x')\nimport math\nmath.pi = 3"
    second = "import os, math\nassert os.listdir('.') == [] and math.pi > 3.1"
    assert box.run_python(first).outcome == "passed"
    assert box.run_python(second).outcome == "passed"


def test_commands_read_files_and_return_those_they_write(box):
    result = box.run(
        ["/bin/sh", "-c", "mkdir -p out/a; cat in/x > out/a/y; ln -s /etc/passwd out/z; echo $WORD"],
        {"in/x": "hello"},
        env={"WORD": "there"},
        collect=["out", "missing"],
    )
    assert (result.outcome, result.stdout, result.files) == ("passed", "there\n", {"out/a/y": b"hello"})
    assert box.run(["no-such-program"]).exit_code == 127


def test_a_dead_box_is_replaced_not_scored(box):
    assert box.run_python("pass").outcome == "passed"
    broken = box._idle.get()
    broken.process.kill()
    broken.process.wait()
    box._idle.put(broken)
    assert box.run_python("pass").outcome == "passed"


def test_a_sandbox_that_cannot_be_created_raises(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Sandbox() as sandbox, pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        sandbox.run_python("pass")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with Sandbox() as sandbox, pytest.raises(SandboxError, match="needs Linux, not Darwin"):
        sandbox.run_python("pass")
    monkeypatch.undo()


@needs_bwrap
def test_bubblewrap_that_refuses_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    with Sandbox() as sandbox, pytest.raises(SandboxError, match="No permissions(.|\n)*apparmor"):
        sandbox.run_python("pass")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="memory"):
        Limits(memory=0)
    with Sandbox() as sandbox:
        for name in ("/etc/x", "../x", "a/../../x"):
            with pytest.raises(ValueError, match="stay inside"):
                sandbox.run(["true"], {name: ""})
        with pytest.raises(ValueError, match="command is empty"):
            sandbox.run([])
