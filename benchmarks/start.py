"""A cold `codegemma complete --json` in a new process: seconds to the first token, and peak memory.

PYTHONPATH=. .venv/bin/python benchmarks/start.py [--rounds 5] [--log]
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from logbook import ROOT, parser, publish

from codegemma import hub
from codegemma.config import GEMMA3_270M

ARGUMENTS = "complete examples/ledger.py --at 20:1 -n 1 --json"
COMMAND = [sys.executable, "-m", "codegemma.cli", *ARGUMENTS.split()]


def main() -> None:
    arguments = parser(__doc__)
    args = arguments.parse_args()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    seconds, tokens = [], 0
    for _ in range(args.rounds + 1):  # the first run fills the file cache and compiles Python's modules
        start = time.perf_counter()
        result = subprocess.run(
            COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        tokens = json.loads(result.stdout)["prompt_tokens"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    file = hub.stores.weight_bytes(hub.resolve()) / 2**20
    cache = -(-tokens // 64) * 64 * GEMMA3_270M.kv_bytes_per_token / 2**20
    first = statistics.median(seconds[1:])
    entry = (
        f"\n## {datetime.date.today()}: cold start\n\n`benchmarks/start.py --rounds {args.rounds}`: "
        f"`codegemma complete --json` on a prompt of {tokens} tokens, one token generated: {first:.2f} s "
        "from start to exit (median; target 0.8 s to the first token).\n"
        f"Peak memory {peak:.0f} MB: the file's {file:.0f}, its keys and values {cache:.0f}, and "
        f"{peak - file - cache:.0f} more (bound 150).\n"
    )
    publish(entry, args.log)


if __name__ == "__main__":
    main()
