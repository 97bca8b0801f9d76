"""LoRA training beside transformers and peft: tokens per second, peak memory, share of the machine's peak.

    PYTHONPATH=.:benchmarks .venv/bin/python benchmarks/train.py [--rounds 3] [--length 1024] [--2b] [--log]

Every contender trains an adapter of the same shape (all linear layers) on random tokens, one row of `length`
at a time. Each runs alone, in its own process; the first two steps are not counted, of the others the median
is. "Peak" is the rate that this machine's multipliers reach in the same minutes: in bfloat16 if it has such
instructions, else in float32.
"""

from __future__ import annotations

import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from logbook import parser, publish
from peers import BENCH, PYTHON, exported

STEPS = 3
REMAT = {
    "kernels, all tokens, products kept": "products",  # elementwise results are recomputed
    "kernels, all tokens, layers kept": "layer",  # all within a layer is recomputed
}
XLA = "XLA alone, all tokens"
OURS = ("kernels, all tokens", *REMAT, "kernels, middle only", XLA, f"{XLA}, bfloat16")
THEIRS = ("float32 eager", "float32 compiled", "bfloat16 eager", "bfloat16 compiled")
MIDDLE = 0.15  # share of a row's tokens that are targets if the loss is on the middle only


def ours(name: str, model: str, length: int, rank: int) -> dict[str, float]:
    """Median seconds of a step of ours, peak memory, and operations of a step."""
    import jax
    import numpy as np

    from codegemma import hub
    from codegemma.checkpoints import open_checkpoint
    from codegemma.jax.compiler import compiler_options
    from codegemma.jax.forward import params_of
    from codegemma.train.lora import new_lora
    from codegemma.train.loss import BLOCK
    from codegemma.train.objective import Objective, flops_of
    from codegemma.train.optimizer import optimizer, schedule
    from codegemma.train.order import microbatches
    from codegemma.train.session import prepare_process, trim_heap
    from codegemma.train.settings import TrainingSettings

    prepare_process()
    checkpoint = open_checkpoint(hub.resolve(model))
    config, kernels = checkpoint.config, name.startswith("kernels")
    dtype: Any = "bfloat16" if "bfloat16" in name else "float32"
    remat: Any = REMAT.get(name, "none")
    settings = TrainingSettings(remat=remat, dtype=dtype)
    options: Any = {"matrices": "stored"} if kernels else {"dtype": jax.numpy.dtype(dtype)}
    base = params_of(checkpoint, **options)
    lora = new_lora(base, rank)
    rng = np.random.default_rng(0)
    row = {
        "tokens": rng.integers(0, config.vocab, length, np.int32),
        "positions": np.arange(length, dtype=np.int32),
        "segments": np.ones(length, np.uint16),
        "loss": rng.random(length) < (1 if "all" in name else MIDDLE),
    }
    batch = next(microbatches([row], 1, 1, BLOCK))
    rule = optimizer(settings, schedule(settings, 100))
    moments = rule.init(lora)

    @partial(jax.jit, compiler_options=compiler_options(remat))
    def step(lora, moments, base):
        (loss, _), gradients = Objective(config, settings).gradient(lora, base, batch)
        changes, moments = rule.update(gradients, moments, lora)
        return jax.tree.map(lambda a, b: a + b, lora, changes), moments, loss

    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        lora, moments, loss = jax.block_until_ready(step(lora, moments, base))
        seconds.append(time.perf_counter() - start)
        if len(seconds) <= 2:
            trim_heap()  # as a session does at its start
    targets = int(batch.count_C.sum())
    return {
        "seconds": statistics.median(seconds[2:]),
        "bytes": _peak(),
        "flops": flops_of(config, length, length, targets, lora),
    }


def theirs(name: str, folder: str, length: int, rank: int) -> dict[str, float]:
    """Median seconds of a step of transformers and peft, and peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    kind = torch.bfloat16 if name.startswith("bfloat16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    model = get_peft_model(model, lora)
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    forward = torch.compile(model) if "compiled" in name else model
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        forward(input_ids=ids, labels=ids).loss.backward()
        rule.step()
        rule.zero_grad()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 120:
            break
    return {"seconds": statistics.median(seconds[min(2, len(seconds) - 1) :]), "bytes": _peak()}


def peak() -> tuple[str, float]:
    """The type of the peak, and the operations per second that all multipliers reach in it."""
    from codegemma.native import _native, usable_cpus

    pool = _native.Pool(usable_cpus())
    rounded = _native.measure_products("auto", pool, True)
    return ("bfloat16", rounded) if rounded else ("float32", _native.measure_products("auto", pool, False))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(
    python: str | Path, kind: str, name: str, model: str, length: int, rank: int
) -> dict[str, float] | None:
    """The figures of a contender, from a process of its own; None if that fails."""
    command = [str(python), __file__, "--child", kind, name, model, str(length), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def large_model(rank: int) -> str:
    """The entry on one step of a 2B geometry with random weights."""
    path = BENCH / "random-2b-q4_0.gguf"
    if not path.exists():
        program = str(Path(__file__).with_name("random_model.py"))
        subprocess.run([sys.executable, program, "2b", "q4_0"], check=True)
    result = _run(sys.executable, "ours", [*REMAT][-1], str(path), 512, rank)
    assert result
    return (
        f"\n2B geometry, Q4_0 blocks, length 512, rank {rank}, `--remat layer`: "
        f"{512 / result['seconds']:.1f} tokens/s, peak memory "
        f"{result['bytes'] / 1e9:.2f} GB, {result['flops'] / result['seconds'] / 1e9:.0f} GFLOP/s\n"
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, name, model, length, rank = sys.argv[2:]
        print(json.dumps((ours if kind == "ours" else theirs)(name, model, int(length), int(rank))))
        return
    options = parser(__doc__, 3)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument(
        "--2b", dest="large", action="store_true", help="a 2B geometry in Q4_0 alone, length 512"
    )
    options.add_argument("--skip", action="append", default=[], help="a contender to leave out; repeatable")
    args = options.parse_args()
    if args.large:
        publish(large_model(args.rank), args.log)
        return
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        kind_of_peak, limit = peak()
        for kind, python, names, model in (
            ("ours", sys.executable, OURS, "gemma-3-270m"),
            ("theirs", PYTHON, THEIRS, str(exported())),
        ):
            for name in names:
                if name in args.skip:
                    continue
                result = _run(python, kind, name, model, args.length, args.rank)
                if result:
                    times.setdefault(name, []).append(result["seconds"])
                    memory[name] = max(memory.get(name, 0), result["bytes"])
                    if "flops" in result:
                        shares.setdefault(name, []).append(result["flops"] / result["seconds"] / limit)
    best = min((statistics.median(times[name]) for name in THEIRS if name in times), default=float("nan"))
    lines = [
        f"\n## {datetime.date.today()}: LoRA training beside transformers and peft\n",
        f"`benchmarks/train.py --rounds {args.rounds}`: rank {args.rank}, {args.length} tokens a step.\n",
        f"| | tokens/s | ratio to their best | peak memory GB | share of the {kind_of_peak} peak |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        share = f"{statistics.median(shares[name]):.0%}" if name in shares else ""
        speed = f"{args.length / median:.1f} | {best / median:.2f}"
        lines.append(f"| {name} | {speed} | {memory[name] / 1e9:.2f} | {share} |")
    publish("\n".join(lines) + "\n", args.log)


if __name__ == "__main__":
    main()
