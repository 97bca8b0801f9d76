import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from evaldata import output_of
from programs import NO_SANDBOX, needs_bwrap

from codegemma.evals.code import judge_python
from codegemma.evals.doctor import ATTACKS
from codegemma.evals.task import Item
from codegemma.sandbox import Limits, Sandbox, SandboxError, host
from codegemma.sandbox.cgroup import Cgroup


@pytest.fixture(scope="module")
def box():
    if NO_SANDBOX:
        pytest.skip(NO_SANDBOX)
    with Sandbox(workers=1) as sandbox:
        yield sandbox


# What becomes of the programs of hostile.py, however the sandbox is limited and whoever starts it.
BECOMES = {
    "doctor": [],
    "every signal to process 1": "passed",
    "SIGINT to process 1, and on": "passed",
    "a signal to itself": "failed",
    "no open files for process 1": "passed",
    "no memory for process 1": "passed",
    "process 1 first to be killed": "out_of_memory",
    "endless writing to descriptor 3": "output_too_long",
    "eight that write to descriptor 3": "output_too_long",
    "eight that write single bytes": "timed_out",
    "a few bytes to descriptor 3": "failed",
    "children with memory": "out_of_memory",
    "shared memory": "out_of_memory",
    "memory files": "out_of_memory",
    "a storm of signals to itself": "failed",
    "sparse files": ["output_too_long", {}],
    "many names": ["output_too_long", {}],
    "a link to a folder": ["passed", {}],
    "a link to process 1": ["passed", {}],
    "a link above a file": ["passed", {}],
    "loops of links": ["passed", {}],
    "folders without end": ["passed", {}],
    "no limits for process 1": ["failed", {}],
    "an honest one": ["passed", {"one/file": 1, "out/a/b": 256}],
    "afterwards": "passed",
}
ROOT = Path(__file__).resolve().parents[1]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@needs_bwrap
@pytest.mark.parametrize("user", ["root", "ordinary"])
@pytest.mark.parametrize("limited_by", ["cgroups", "rlimits"])
def test_a_program_decides_only_its_own_outcome(user, limited_by):
    is_root, group = os.geteuid() == 0, None
    if user == "root" and not is_root:
        pytest.skip("needs root")
    command = [sys.executable]
    if user == "ordinary" and is_root:
        command = [*NOBODY, python_of_nobody()]
    if limited_by == "cgroups":
        try:
            group = Cgroup()
        except OSError as error:
            pytest.skip(str(error))
        if user == "ordinary" and is_root:
            if group._is_v2:
                group.close()
                pytest.skip("only root can delegate a group of version 2 that holds processes")
            for folder in group._folders:
                for file in (folder, folder / "cgroup.procs"):
                    os.chown(file, 65534, 65534)
            command = group.joining(command)
    command += ["-B", str(ROOT / "tests/hostile.py"), limited_by]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if group:
        group.close()
    found = json.loads(result.stdout or json.dumps({"error": result.stderr}))
    if (user, limited_by) == ("root", "rlimits"):
        assert "run as an ordinary user" in found["error"]
    else:
        # Process 1 without time is killed, and the program with it, if a tick of the clock finds it running.
        assert found.pop("no time for process 1") in ("failed", "passed")
        assert found == BECOMES


def python_of_nobody():
    """A Python that an ordinary user can start and that finds the package, or else skips the test."""
    probe = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import codegemma.evals.doctor\n"
    probe += "assert os.access(sys._base_executable, os.X_OK)"
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([*NOBODY, python, "-B", "-c", probe], capture_output=True, cwd="/").returncode == 0:
            return python
    pytest.skip("an ordinary user can read neither a Python interpreter nor this package here")


def broken_guest(folder):
    """A copy of guest.py whose monitor dies of a program that holds the word FAULT."""
    text = host.GUEST.read_text()
    assert "def run_monitor(job):" in text
    text = text.replace('    content = b""\n    try:', '    content = b""\n    DIE\n    try:')
    text = text.replace("    DIE\n", "    if 'FAULT' in str(job['source']):\n        os._exit(1)\n")
    (folder / "guest.py").write_text(text)
    return folder / "guest.py"


@needs_bwrap
def test_a_fault_of_one_program_ends_one_item(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "GUEST", broken_guest(tmp_path))
    programs = ["pass", "FAULT = 1", "assert False", "x = 'FAULT'", "pass # again"]
    items = [Item(str(i), target=program) for i, program in enumerate(programs)]
    with Sandbox(workers=2) as sandbox:
        monkeypatch.setattr(host, "default", lambda: sandbox)
        monkeypatch.setattr("codegemma.sandbox.default", lambda: sandbox)
        outputs = [output_of("")] * len(items)
        verdicts = dict(judge_python(lambda item, _: item.target, 60.0, items, outputs))
    assert [verdicts[i].passed for i in range(5)] == [True, False, False, False, True]
    assert "runs others" in verdicts[1].output and "runs others" not in verdicts[2].output


@needs_bwrap
def test_a_sandbox_that_fails_whatever_it_runs_raises(tmp_path, monkeypatch):
    guest = broken_guest(tmp_path)
    guest.write_text(guest.read_text().replace("if 'FAULT' in str(job['source']):", "if True:"))
    monkeypatch.setattr(host, "GUEST", guest)
    with Sandbox(workers=1) as sandbox, pytest.raises(SandboxError, match="ended without an answer"):
        sandbox.run_python("pass")


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
        source = source.replace("PORT", str(server.getsockname()[1]))
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
        for name in ("/etc/x", "../x", "a/../../x", "", ".", "a\0b"):
            with pytest.raises(ValueError, match="stay inside"):
                sandbox.run(["true"], {name: ""})
        with pytest.raises(ValueError, match="command is empty"):
            sandbox.run([])
