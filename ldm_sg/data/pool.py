"""Processes that decode images: started afresh (never forked from a process with torch's threads or a GPU in it), fed a
bounded number of jobs ahead, answered in order."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from ldm_sg.data.images import share_large

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """How many cores this process may use, which in a container or a batch job is not how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(pool: Executor, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int) -> Iterator[Result]:
    """function(job) for every job, in the jobs' order; jobs are drawn as needed, so many ahead."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class DecoderPool(ProcessPoolExecutor):
    """`workers` processes. They leave Ctrl-C to their parent and end with it, however it ends."""

    def __init__(self, workers: int):
        self.workers = workers
        context = multiprocessing.get_context("spawn")
        super().__init__(workers, mp_context=context, initializer=_start, initargs=(context.Lock(),))

    def in_order(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Two jobs a worker ahead."""
        return in_order(self, function, jobs, 2 * self.workers)

    def __exit__(self, *error: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def decoder_pool(workers: int) -> DecoderPool:
    """A pool to share between calls of `image_batches`; -1 = one process a core, less one for the caller's own work."""
    return DecoderPool(max(1, cores() - 1) if workers < 0 else max(1, workers))


def _start(large: Any) -> None:
    share_large(large)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
