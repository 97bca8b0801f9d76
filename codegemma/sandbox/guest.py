"""The inside of a box: runs each job in a jailed process, within limits of time, output, disk and open files;
where there is no control group, of memory and processes too.

host.py starts this file under bubblewrap; jobs and replies are lines of JSON. Each process below is the parent
of the next: the supervisor reads jobs; a monitor, outside the job's namespaces, watches time and output; an
init, process 1 of the job's namespaces, mounts the private folder; the program runs without capabilities or
inherited descriptors and sees no other process. Killing init kills everything in the job. Standard library
only.
"""

import atexit
import base64
import ctypes
import json
import os
import resource
import select
import signal
import site
import sys
import threading
import time
import traceback
from pathlib import Path

FOLDER = "/tmp"
NEW_NS, NEW_UTS, NEW_IPC, NEW_PID = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000  # linux/sched.h
NOSUID, NODEV, NOEXEC = 2, 4, 8  # linux/mount.h
PDEATHSIG = 1  # linux/prctl.h
CAPABILITY_V3 = 0x2008_0522  # linux/capability.h
for name in "collections copy functools heapq itertools math random re string typing".split():  # noqa: SIM905
    __import__(name)  # here, so that no program has to load it again
libc = ctypes.CDLL(None, use_errno=True)


def check(result, call):
    """Raises OSError, with the name of the call, where a C function has returned an error."""
    if result:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def mount(kind, target, flags, options):
    result = libc.mount(kind.encode(), target.encode(), kind.encode(), flags, options.encode())
    check(result, f"mount {target}")


def supervise():
    """Serves jobs until the host closes the pipe, or until a monitor dies."""
    site.setquit()
    print(json.dumps({"ready": sys.version.split()[0]}), flush=True)
    for line in sys.stdin:
        monitor = os.fork()
        if not monitor:
            run_monitor(json.loads(line))
        if os.waitpid(monitor, 0)[1]:
            sys.exit("a monitor died")


def run_monitor(job):
    """Runs one job in new namespaces and prints its reply; ends the process."""
    try:
        check(libc.unshare(NEW_NS | NEW_UTS | NEW_IPC | NEW_PID), "unshare")
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "finished", "report")}
        readers = {reader: name for name, (reader, _) in pipes.items()}
        writers = {name: writer for name, (_, writer) in pipes.items()}
        nonce = os.urandom(16)
        started = time.monotonic()
        init = os.fork()
        if not init:
            run_init(job, writers, nonce)
        for writer in writers.values():
            os.close(writer)
        reply = watch(job, readers, init, started + job["limits"]["seconds"])
        finished = reply.pop("finished").startswith(nonce) or not job["must_finish"]
        if reply["outcome"] == "passed" and not finished:
            reply["outcome"] = "failed"
            reply["stderr"] += b"\nThe program ended before its last statement.\n"
        reply["seconds"] = time.monotonic() - started
        reply |= {name: reply[name].decode(errors="replace") for name in ("stdout", "stderr")}
    except BaseException:
        reply = {"error": traceback.format_exc()}
    print(json.dumps(reply), flush=True)
    os._exit(0)


def watch(job, readers, init, deadline):
    """The reply: reads the job's pipes until all are closed, the time is up or the output is too long."""
    text = {name: bytearray() for name in readers.values()}
    outcome, output_left = None, job["limits"]["output"]
    while readers:
        ready = select.select([*readers, 0], [], [], max(0.0, deadline - time.monotonic()))[0]
        if 0 in ready or not ready:  # the host has closed the pipe, or the time is up
            outcome = outcome or "timed_out"
        for fd in (fd for fd in ready if fd):
            chunk = os.read(fd, 65_536)
            if not chunk:
                os.close(fd)
                del readers[fd]
                continue
            name = readers[fd]
            text[name] += chunk
            if name in ("stdout", "stderr"):
                output_left -= len(chunk)
        if output_left < 0:
            outcome = outcome or "output_too_long"
        if outcome:
            os.kill(init, signal.SIGKILL)
            break
    os.waitpid(init, 0)
    reply = {name: bytes(text[name][: job["limits"]["output"]]) for name in ("stdout", "stderr")}
    reply |= {"finished": bytes(text["finished"]), "exit_code": None, "files": {}, "peak": 0}
    if outcome:
        return reply | {"outcome": outcome}
    report = json.loads(text["report"])
    if "error" in report:
        raise OSError(report["error"])
    code = report["exit_code"]
    outcome = "timed_out" if code == -signal.SIGXCPU else "failed" if code else "passed"
    return reply | report | {"outcome": outcome}


def run_init(job, writers, nonce):
    """Process 1 of the job: makes private mounts, runs the program, reports its exit code and files."""
    try:
        libc.prctl(PDEATHSIG, signal.SIGKILL)
        disk = job["limits"]["disk"]
        mount("tmpfs", FOLDER, NOSUID | NODEV, f"size={disk},nr_inodes=65536,mode=700")
        mount("tmpfs", "/dev/shm", NOSUID | NODEV | NOEXEC, f"size={disk},nr_inodes=1024,mode=700")
        mount("proc", "/proc", NOSUID | NODEV | NOEXEC, "")
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        for name, content in job["files"].items():
            path = Path(FOLDER, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
            path.chmod(0o700)
        program = os.fork()
        if not program:
            run_program(job, writers, nonce)
        report = {
            "exit_code": os.waitstatus_to_exitcode(wait_for(program)),
            "files": collect(job["collect"], disk),
            "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }
    except BaseException:
        report = {"error": traceback.format_exc()}
    with os.fdopen(writers["report"], "w") as file:
        json.dump(report, file)
    os._exit(0)


def wait_for(program):
    """The program's wait status. Reaps orphans until then, and kills the processes that it left behind."""
    pid = 0
    while pid != program:
        pid, status = os.wait()
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        return status


def collect(folders, max_bytes):
    """{path: base64} of the named files and of all files in the named folders, without symlinks."""
    files = {}
    for folder in folders:
        top = os.path.join(FOLDER, folder)
        paths = [os.path.join(parent, name) for parent, _, names in os.walk(top) for name in names] or [top]
        for path in paths:
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    files[os.path.relpath(path, FOLDER)] = base64.b64encode(file.read(max_bytes)).decode()
    return files


def run_program(job, writers, nonce):
    """Becomes the program; exit code 127 says that it could not be started."""
    source, limits = job["source"], job["limits"]
    try:
        # Out of memory, the kernel then kills this process first, not the supervisor.
        Path("/proc/self/oom_score_adj").write_text("1000")
        finished = jail(limits, writers, keep_finished=source is not None)
        os.chdir(FOLDER)
        if source is None:
            os.execvpe(job["command"][0], job["command"], job["env"])
    except BaseException as error:
        os.write(2, f"cannot start {job['command'][0] if job['command'] else 'python'}: {error}\n".encode())
        os._exit(127)
    os.environ.clear()
    os.environ.update(job["env"])
    os._exit(run_source(source, finished, nonce))


def jail(limits, writers, keep_finished):
    """Sets limits, drops capabilities and closes all descriptors but 0, 1, 2 and, if asked, "finished".

    Returns the descriptor of "finished", to which the program's last statement is reported.
    """
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    fds = [null, writers["stdout"], writers["stderr"], writers["finished"]]
    copies = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]  # some of them may be 0, 1, 2 or 3
    for i, fd in enumerate(copies):
        os.dup2(fd, i, inheritable=i < 3)
    os.closerange(4 if keep_finished else 3, 4096)
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_DATA, limits["data"]),
    ):
        if value is not None:
            resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_V3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    return 3


def run_source(source, finished, nonce):
    """Runs a program and returns the exit code that an interpreter would give it.

    When its last statement has run, writes the nonce, which the program cannot know, to `finished`.
    """
    code, program = 0, os.getpid()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
    sys.argv = ["program.py"]
    sys.modules["__main__"] = module = type(sys)("__main__")
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        if os.getpid() == program:  # not a forked child, whose end proves nothing
            os.write(finished, nonce)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc(limit=-8)
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 120
    return code & 0xFF


if __name__ == "__main__":
    supervise()
