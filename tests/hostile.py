"""Programs that attack the sandbox, and what becomes of them, as JSON: python hostile.py [cgroups].

test_sandbox.py runs it as root and as an ordinary user, with control groups and without.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from codegemma.evals.doctor import self_test
from codegemma.sandbox import Sandbox, SandboxError

PYTHON = str(Path(sys._base_executable).resolve())
SIGNALS = """
import os, signal, time
for pid in (1, os.getppid()):
    for number in signal.valid_signals():
        os.kill(pid, number)
time.sleep(0.1)
"""
LIMIT = "import resource\nresource.prlimit(1, resource.RLIMIT_{0}, (0, 0))"
ORPHANS = """
import os
for _ in range(1500):
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        os.fork()
        os._exit(0)
"""
FORKS = "import os, time\nfor _ in range(3): os.fork()\n"
PROGRAMS = {
    "every signal to process 1": SIGNALS,
    "SIGINT to process 1, and on": "import os, signal\nos.kill(1, signal.SIGINT)\nprint('on')",
    "a signal to itself": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)",
    "no open files for process 1": LIMIT.format("NOFILE"),
    "no memory for process 1": LIMIT.format("AS"),
    # Process 1 has much to run for here, so that most ticks of the clock find it running.
    "no time for process 1": LIMIT.format("CPU") + ORPHANS,
    "process 1 first to be killed": "open('/proc/1/oom_score_adj', 'w').write('1000')\nx = []\n"
    "while True: x.append(b'x' * (1 << 24))",
    "endless writing to descriptor 3": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "eight that write to descriptor 3": FORKS + "while True: os.write(3, b'x' * 65536)",
    "eight that write single bytes": FORKS + "while True:\n    os.write(3, b'x')\n    time.sleep(0.01)",
    "a few bytes to descriptor 3": "import os\nos.write(3, b'passed')",
    "children with memory": "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n"
    "        x = b'x' * (200 << 20)\n        time.sleep(60)\nassert os.wait()[1] == 0",
    "shared memory": "import mmap\nm = mmap.mmap(-1, 4 << 30)\nfor i in range(0, 4 << 30, 4096): m[i] = 1",
    "memory files": "import os\nfor fd in [os.memfd_create('x') for _ in range(100)]:\n"
    "    for _ in range(60): os.write(fd, b'x' * (1 << 20))",
    "a storm of signals to itself": "import os, signal, time\nparent = os.getpid()\nif os.fork():\n"
    "    time.sleep(1)\nwhile os.getppid() == parent: os.kill(parent, signal.SIGINT)",
}
COLLECTED = {  # programs whose folder "out" and file "one/file" are handed back
    "sparse files": "import os\nos.mkdir('out')\nfor i in range(200):\n"
    "    with open(f'out/{i}', 'wb') as file: file.truncate(63 << 20)",
    "many names": "import os\nos.makedirs('out/' + '/'.join(['d' * 200] * 15))\n"
    "os.chdir('out/' + '/'.join(['d' * 200] * 15))\nfor i in range(30000): open(f'{i}', 'w').close()",
    "a link to a folder": "import os\nos.symlink('/usr/share', 'out')",
    "a link to process 1": "import os\nos.symlink('/proc/1', 'out')",
    "a link above a file": "import os\nos.symlink('/etc', 'one')\n"
    "os.mkdir('out')\nos.symlink('/etc', 'out/x')",
    "loops of links": "import os\nos.symlink('one', 'one')\nos.symlink('out', 'out')",
    "folders without end": "import os\nos.mkdir('out')\nos.chdir('out')\n"
    "for _ in range(3000):\n    os.mkdir('dir')\n    os.chdir('dir')",
    "no limits for process 1": "import os, resource\nos.mkdir('out')\nopen('out/x', 'w').close()\n"
    "resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
    "an honest one": "import os\nos.makedirs('out/a')\nopen('out/a/b', 'wb').write(bytes(range(256)))\n"
    "os.mkdir('one')\nopen('one/file', 'w').write('x')",
}


def results(use_cgroups):
    """{name: outcome, or [outcome, {file: size}]} of each program, doctor's self-test and a last program."""
    outcomes = {}
    with Sandbox(workers=1, use_cgroups=use_cgroups) as box:
        outcomes["doctor"] = [row for row in self_test(box) if not row[1]]
        for name, source in PROGRAMS.items():
            outcomes[name] = box.run_python(source, seconds=4, memory=256 << 20).outcome
        for name, source in COLLECTED.items():
            result = box.run(
                [PYTHON, "-c", source], collect=["out", "one/file"], seconds=30, memory=256 << 20
            )
            outcomes[name] = [result.outcome, {name: len(content) for name, content in result.files.items()}]
        outcomes["afterwards"] = box.run_python("import os\nassert os.listdir('.') == []").outcome
    return outcomes


if __name__ == "__main__":
    try:
        print(json.dumps(results("cgroups" in sys.argv)))
    except SandboxError as error:
        print(json.dumps({"error": str(error)}))
