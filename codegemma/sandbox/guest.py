"""The inside of a box: runs each job in a jailed process and limits its time, output, disk and open files;
where no control group does so, its memory and processes too.

host.py starts this file under bubblewrap and sends it jobs as lines of JSON. Each process below is the parent
of the next: the supervisor reads jobs; a monitor, outside the job's process namespace, watches it; an init,
process 1 of that namespace, mounts the private folder; the program runs without capabilities or inherited
descriptors and sees no other process. Killing init kills everything in the job. Standard library only.
"""

import atexit
import base64
import ctypes
import errno
import json
import math
import os
import resource
import select
import shutil
import signal
import site
import stat
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
NONCE_BYTES = 16
LOOK_SECONDS = 0.05  # between two looks at the memory of a job without a control group
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
    """Runs one job in new namespaces and prints its reply; ends the process.

    The reply is a line of JSON whose "files" gives the sizes of the collected files; their bytes follow it.
    """
    content = b""
    try:
        check(libc.unshare(NEW_NS | NEW_UTS | NEW_IPC | NEW_PID), "unshare")
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "finished", "report")}
        readers = {reader: name for name, (reader, _) in pipes.items()}
        writers = {name: writer for name, (_, writer) in pipes.items()}
        nonce = os.urandom(NONCE_BYTES)
        started = time.monotonic()
        init = os.fork()
        if not init:
            run_init(job, writers, nonce)
        for writer in writers.values():
            os.close(writer)
        outcome, received = watch(job["limits"], readers, init, started + job["limits"]["seconds"])
        reply, content = judge(outcome, received)
        finished = received["finished"].startswith(nonce) or not job["must_finish"]
        if reply["outcome"] == "passed" and not finished:
            reply |= {"outcome": "failed", "note": "The program ended before its last statement."}
        output = {name: bytes(received[name][: job["limits"]["output"]]) for name in ("stdout", "stderr")}
        output["stderr"] += f"\n{reply['note']}\n".encode() if reply["note"] else b""
        reply |= {name: value.decode(errors="replace") for name, value in output.items()}
        reply["seconds"] = time.monotonic() - started
    except BaseException:
        reply, content = {"error": traceback.format_exc()}, b""
    try:
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + content)
        sys.stdout.buffer.flush()
    finally:
        os._exit(0)


def watch(limits, readers, init, deadline):
    """(outcome, {pipe: bytes}): reads the pipes until all are closed or a limit is reached, and ends the job.

    The outcome names the limit that was reached; None where none was. Whatever the program writes, on any
    descriptor, counts as output; each turn of the loop looks at the clock and the memory.
    """
    received = {name: bytearray() for name in readers.values()}
    outcome, output_left, next_look = None, limits["output"] + NONCE_BYTES, 0.0
    while readers and not outcome:
        wait = min(deadline - time.monotonic(), LOOK_SECONDS if limits["guest_memory"] else math.inf)
        ready = select.select([*readers, 0], [], [], max(0.0, wait))[0]
        for fd in (fd for fd in ready if fd):
            chunk = os.read(fd, 65_536)
            if not chunk:
                os.close(fd)
                del readers[fd]
                continue
            received[readers[fd]] += chunk
            if readers[fd] != "report":
                output_left -= len(chunk)
        if output_left < 0:
            outcome = "output_too_long"
        elif readers and (0 in ready or time.monotonic() >= deadline):  # 0: the host has closed the pipe
            outcome = "timed_out"
        elif limits["guest_memory"] and time.monotonic() >= next_look:  # there is no control group
            outcome = "out_of_memory" if memory_used() > limits["guest_memory"] else None
            next_look = time.monotonic() + LOOK_SECONDS
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    return outcome, received


def memory_used():
    """Bytes of memory that the job uses, private and shared, without the contents of its private folders.

    A page that n processes share counts as 1/n in each. Memory files (memfd) count even if nobody maps them.
    """
    used, files = 0, {}
    for folder in Path("/proc").glob("[0-9]*"):  # as mounted by init, whose mounts the monitor shares
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
            sizes = {name: int(value.split()[0]) << 10 for name, value in (line.split(":") for line in lines)}
            used += sizes["Pss"] - sizes.get("Pss_File", 0)
            for path in (folder / "fd").iterdir():
                if os.readlink(path).startswith("/memfd:"):
                    files[path.stat().st_ino] = path.stat().st_blocks * 512
        except OSError:  # the process has just ended
            continue
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        columns = line.split()
        if columns[6] == "0":  # attached to no process
            used += int(columns[14])
    return used + sum(files.values())


def judge(outcome, received):
    """(reply, bytes of the collected files): how the job ended, by the limit reached or by init's report."""
    reply = {"outcome": outcome, "exit_code": None, "peak": 0, "files": {}, "note": ""}
    if outcome:
        return reply, b""
    line, newline, content = bytes(received["report"]).partition(b"\n")
    report = json.loads(line) if newline else {"note": "The program ended process 1 of its sandbox."}
    if "error" in report:
        raise OSError(report["error"])
    reply |= report
    if len(content) != sum(reply["files"].values()):
        reply |= {"files": {}, "note": "Process 1 of the sandbox ended before it had handed back all files."}
    if not reply["outcome"]:
        code = reply["exit_code"]
        outcomes = {0: "passed", -signal.SIGXCPU: "timed_out"}
        reply["outcome"] = "failed" if reply["note"] else outcomes.get(code, "failed")
    return reply, content if reply["files"] else b""


def run_init(job, writers, nonce):
    """Process 1 of the job: makes private mounts, runs the program, reports its exit code and files.

    The program can signal this process and lower its limits. So signals keep their default handlers, which
    the kernel does not run in a process 1, and what goes wrong once the program runs is the program's fault.
    """
    report, program = {}, None
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        libc.prctl(PDEATHSIG, signal.SIGKILL)
        mount_folders(job)
        program = os.fork()
        if not program:
            run_program(job, writers, nonce)
        report["exit_code"] = os.waitstatus_to_exitcode(wait_for(program))
        report["peak"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report["files"] = collect(job["collect"], job["limits"]["disk"])
        if report["files"] is None:
            note = f"The files to hand back are larger than {job['limits']['disk']:,} bytes together."
            report |= {"outcome": "output_too_long", "files": {}, "note": note}
    except BaseException:
        fault = traceback.format_exc()
        report |= {"files": {}, "note": f"The sandbox failed: {fault}"} if program else {"error": fault}
    try:
        with os.fdopen(writers["report"], "wb") as file:
            file.write(json.dumps(report).encode() + b"\n")
            for name in report.get("files", ()):
                with open(os.path.join(FOLDER, name), "rb") as source:
                    shutil.copyfileobj(source, file)
    finally:
        os._exit(0)  # an exception must not reach the monitor's code, whose copy this process runs


def mount_folders(job):
    """Mounts the job's private folders and writes its files."""
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


def wait_for(program):
    """Waits for the program, and kills the processes that it left behind. Returns its wait status."""
    pid = 0
    while pid != program:
        pid, status = os.wait()
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        return status


def collect(names, max_bytes):
    """{path: size} of the named files and of all files in the named folders; no link is followed.

    None where paths and contents together are larger than `max_bytes`. The job's other processes have ended,
    so nothing changes meanwhile.
    """
    files, waiting = {}, [os.path.normpath(os.path.join(FOLDER, name)) for name in names]
    waiting = [path for path in waiting if os.path.realpath(path) == path]
    while waiting:
        path = waiting.pop()
        try:
            status = os.lstat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                continue  # the program has made no such file
            raise
        max_bytes -= len(path)
        if stat.S_ISDIR(status.st_mode):
            waiting += sorted((entry.path for entry in os.scandir(path)), reverse=True)
        elif stat.S_ISREG(status.st_mode):
            files[os.path.relpath(path, FOLDER)] = status.st_size
            max_bytes -= status.st_size
        if max_bytes < 0:
            return None
    return files


def run_program(job, writers, nonce):
    """Becomes the program; exit code 127 says that it could not be started."""
    source, limits = job["source"], job["limits"]
    try:
        # So when memory runs out, the kernel kills this process first, not the supervisor.
        Path("/proc/self/oom_score_adj").write_text("1000")
        finished = jail(limits, writers, keep_finished=source is not None)
        os.chdir(FOLDER)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if source is None:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would keep that
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(job["command"][0], job["command"], job["env"])
    except BaseException as error:
        os.write(2, f"cannot start {job['command'][0] if job['command'] else 'python'}: {error}\n".encode())
        os._exit(127)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(job["env"])
        code = run_source(source, finished, nonce)
    finally:
        os._exit(code)  # an exception must not reach init's code, whose copy this process runs


def jail(limits, writers, keep_finished):
    """Sets limits, drops capabilities and closes all descriptors but 0, 1, 2 and, if asked, "finished".

    Returns the descriptor of "finished", to which the program's last statement is reported.
    """
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    fds = [null, writers["stdout"], writers["stderr"], writers["finished"]]
    # By way of 100 to 103, because a descriptor that is still to be copied may itself be 0, 1, 2 or 3.
    copies = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
    for i, fd in enumerate(copies):
        os.dup2(fd, i, inheritable=i < 3)
    os.closerange(4 if keep_finished else 3, 4096)
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_DATA, limits["guest_memory"]),
    ):
        if value is not None:
            resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))
    header = (ctypes.c_uint32 * 2)(CAPABILITY_V3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    return 3


def run_source(source, finished, nonce):
    """Runs a program and returns the exit code that an interpreter would give it.

    When its last statement has run, writes the nonce to `finished`. A program that leaves early cannot
    pretend to have finished: it does not know the nonce (unless it searches its own interpreter for it).
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
