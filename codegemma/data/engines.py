"""The engines that run the tasks of a build: this process, a pool of processes, or Ray."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from codegemma.data.stages import Task, run_task

Engine = Callable[[Sequence[Task]], Iterator[Any]]  # runs independent tasks; yields when a task is done


@contextmanager
def local(workers: int) -> Iterator[Engine]:
    """A pool of processes; with one worker, this process alone."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    if workers == 1:
        yield lambda tasks: map(run_task, tasks)
        return
    _start_quiet_tracker()
    try:
        pool = ProcessPoolExecutor(workers, get_context("spawn"))
    except OSError as error:  # its semaphores are files in /dev/shm
        fault = f"worker processes cannot share memory in /dev/shm ({error.strerror})"
        raise ValueError(f"{fault}: make it writable, or pass --workers 1") from error
    with pool:

        def run(tasks: Sequence[Task]) -> Iterator[None]:
            try:
                for future in as_completed([pool.submit(run_task, task) for task in tasks]):
                    yield future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    f"a worker of stage {tasks[0].stage} died (out of memory?): continue with --resume and "
                    "fewer --workers"
                ) from error

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)


def _start_quiet_tracker() -> None:
    """Starts the process that removes a pool's semaphores if we leave without closing it, as at Ctrl-C.

    It removes them anyway, and need not warn of it.
    """
    if os.name == "posix":  # other systems have no such process
        from multiprocessing import resource_tracker

        quiet = "ignore:resource_tracker:UserWarning"  # Python passes its own -W options on
        sys.warnoptions.append(quiet)
        resource_tracker.ensure_running()
        sys.warnoptions.remove(quiet)


@contextmanager
def ray(workers: int) -> Iterator[Engine]:
    """Ray Data, one block for each task. The output folder must be on storage that every node shares."""
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address, log_to_driver=False, include_dashboard=False, num_cpus=None if address else workers)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(tasks: Sequence[Task]) -> Iterator[Any]:
        items = [{"task": pickle.dumps(task)} for task in tasks]
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        yield from blocks.map(_run_pickled, concurrency=workers).iter_rows()

    yield run


def _run_pickled(row: dict[str, bytes]) -> dict[str, bytes]:
    run_task(pickle.loads(row["task"]))
    return row


ENGINES: dict[str, Callable[[int], AbstractContextManager[Engine]]] = {"local": local, "ray": ray}
