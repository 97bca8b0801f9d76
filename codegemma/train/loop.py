"""The training loop: steps, measurements on held-out rows, checkpoints.

`train` is an iterator of StepReports, which the CLI, `tune` and the tests read. The law it keeps: stopped at
any moment, by kill -9 too, and resumed, a run ends with the very parameters, moments and losses of one that
was not stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from codegemma.train import mesh as meshes
from codegemma.train.objective import Trainable
from codegemma.train.session import Session, StepReport

Keep = Callable[[Trainable, StepReport], None]


def train(session: Session, keep: Keep = lambda *_: None, until: float | None = None) -> Iterator[StepReport]:
    """Trains to the end of an entered session and reports each step.

    `keep` is called with what was best on the held-out rows, or at each checkpoint where there are none.
    `until`, a time of time.monotonic, ends the run early, after one step at least.
    """
    settings, state, store = session.settings, session.state, session.store
    over = session.finished
    while not over:
        with meshes.use(session.mesh):  # not while the caller has the report
            report = session.step()
            over = session.finished or until is not None and time.monotonic() > until
            if session.held_out and (over or state.step % settings.evaluate_every == 0):
                report = session.measure(report)
                over = over or session.finished
            saves = over or state.step % settings.save_every == 0
            store.log(state, asdict(report))
            if report.best or not session.held_out and saves:
                keep(state.trainable, report)
            if saves:
                store.save(state)
        yield report
