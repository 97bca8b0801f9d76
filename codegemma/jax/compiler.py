"""XLA's flags for this process, and the compiler options of a training step."""

from __future__ import annotations

import os

import jax

FUSION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def configure_xla() -> None:
    """Turns off a fusion that XLA compiles wrongly on a CPU; call it before JAX first computes.

    Fused sums give wrong numbers or crash in jaxlib 0.10.2 and 0.11 (jax-ml/jax#39103, #39257, #40412);
    fused products are right and stay on. Does nothing where XLA_FLAGS sets the flag already.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if (0, 10, 2) <= jax.__version_info__ < (0, 12) and FUSION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FUSION_FLAG}=-reduce".strip()


def compiler_options(remat: str) -> dict[str, str]:
    """Options of `jax.jit` for a step with this rematerialisation (see forward.Remat).

    On a CPU, XLA's default schedule recomputes activations early and so saves no memory.
    """
    if remat == "none" or jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
