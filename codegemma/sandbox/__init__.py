"""Runs untrusted programs: without a network, on a read-only system, with a private /tmp."""

from codegemma.sandbox.host import Limits, Outcome, Result, Sandbox, SandboxError, default, run, run_python

__all__ = ["Limits", "Outcome", "Result", "Sandbox", "SandboxError", "default", "run", "run_python"]
