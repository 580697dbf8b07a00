"""Tasks over workers that hold what is slow to make: processes of this machine, or actors of a Ray cluster.

`make(device)` is called once in every worker, and what it returns is called with each task there; `make`, tasks and results are
picklable. A task whose worker dies, or that fails by a bug, comes back as `Lost`; an InputError ends everything."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ldm_sg.data.pool import cores, end_with_parent
from ldm_sg.errors import InputError, need_package, one_line

if TYPE_CHECKING:
    import torch  # each process that is started reads this file

Task = TypeVar("Task")
Result = TypeVar("Result")
_JOBS = [  # where a job says which of how many it is: its number, their count, the first number, the step between numbers
    tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")),
    ("RANK", "WORLD_SIZE", "", ""),
]
Make = Callable[[str], Callable[[Task], Result]]


@dataclass(frozen=True)
class Lost:
    """What came of a task instead of a result."""

    why: str


@dataclass(frozen=True)
class Part:
    """Of `of` jobs that share the tasks of one output the one with number `index`, from 0: every `of`-th task is its own."""

    index: int
    of: int

    def __contains__(self, task: int) -> bool:
        return task % self.of == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def read_part(text: str | None) -> Part | None:
    """I/N; without it what a Slurm array or torchrun says of this process, if there is one."""
    if text is not None:
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise InputError(f"--part {text}: I/N with I from 0 to N - 1, for example 0/8")
        return Part(int(index), int(of))
    for index, of, first, step in _JOBS:
        if index in os.environ and os.environ.get(of, "1") != "1":
            said = {name: os.environ[name] for name in (index, of, first, step) if name in os.environ}
            if not all(value.isdecimal() for value in said.values()):
                raise InputError(f"{said}: not the numbers of a job; give --part I/N")
            by = int(said.get(step, 1)) or 1
            number, odd = divmod(int(said[index]) - int(said.get(first, 0)), by)
            if odd or not 0 <= number < int(said[of]):
                raise InputError(f"{said}: not one of evenly numbered jobs, as in --array=0-7; give --part I/N")
            return Part(number, int(said[of]))
    return None


class Settings(Protocol):
    """Those of the config of a verb: executor (local, ray), processes (0 = one a GPU, or one; Ray: as the cluster has room for)
    and address (of a Ray cluster; None = $RAY_ADDRESS, or one that is started on this machine)."""

    executor: str
    processes: int
    address: str | None


def devices(settings: Settings, device: "torch.device") -> list[str]:
    """One a worker of this machine."""
    names = [str(device)]
    if device.type == "cuda" and device.index is None:
        from torch.cuda import device_count

        names = [f"cuda:{i}" for i in range(device_count())]
    return [names[i % len(names)] for i in range(settings.processes or len(names))]


def run(
    make: Make, tasks: Sequence[Task], settings: Settings, device: "torch.device",
    on_wait: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Task, Any]]:  # fmt: skip
    """(task, result or Lost) as they come; `on_wait` is called about once a second."""
    if settings.executor == "ray":
        return _on_ray(make, tasks, settings, device, on_wait)
    return _in_processes(make, tasks, devices(settings, device), on_wait)


def alone(settings: Settings, device: "torch.device") -> bool:
    """Whether this process does everything itself."""
    return settings.executor == "local" and len(devices(settings, device)) == 1


def in_order(make: Make, tasks: Sequence[Task], settings: Settings, device: "torch.device") -> Iterator[Any]:
    """Results in the order of the tasks, of which none may be lost; in this process where it is alone."""
    if alone(settings, device):
        yield from map(make(str(device)), tasks)
        return
    found: dict[int, Any] = {}
    place = 0
    for (number, task), result in run(partial(_numbered, make), list(enumerate(tasks)), settings, device):
        if isinstance(result, Lost):
            raise InputError(f"{str(task)[:200]}: {result.why}; give the same command again")
        found[number] = result
        while place in found:
            yield found.pop(place)
            place += 1


def _numbered(make: Make, device: str) -> Callable[[tuple[int, Task]], Result]:
    work = make(device)
    return lambda task: work(task[1])


def _in_processes(
    make: Make, tasks: Sequence[Task], devices: list[str], on_wait: Callable[[], object]
) -> Iterator[tuple[Task, Any]]:
    context, todo = multiprocessing.get_context("spawn"), deque(tasks)
    busy: dict[Any, tuple[Any, str, Task]] = {}  # our end of the pipe -> process, its device, its task

    def hand(pipe: Connection, process: Any, device: str) -> None:
        task = todo.popleft()
        busy[pipe] = process, device, task
        with suppress(OSError):  # it has just died, as `wait` will find
            pipe.send(task)

    def start(device: str) -> None:
        pipe, other = context.Pipe()
        threads = max(1, cores() // len(devices))
        process = context.Process(target=_serve, args=(other, make, device, threads))
        process.start()
        other.close()
        hand(pipe, process, device)

    try:
        for device in devices[: len(todo)]:
            start(device)
        while busy:
            for pipe in wait(list(busy), timeout=1):
                process, device, task = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else "ended by itself"
                    answer = Lost(f"its worker {how}")
                if isinstance(answer, InputError):
                    raise answer
                yield task, answer
                if todo and not isinstance(answer, Lost):
                    hand(pipe, process, device)
                    continue
                pipe.close()  # which ends the process: on a device that has failed once all else would fail
                if todo:
                    start(device)
            on_wait()
    finally:
        for process, _, _ in busy.values():
            process.terminate()


def _serve(pipe: Connection, make: Make, device: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what `work` has opened is closed
    threading.Thread(target=end_with_parent, daemon=True).start()
    if torch := sys.modules.get("torch"):  # what `make` is may have imported it
        torch.set_num_threads(threads)
    try:
        work = make(device)
        while True:
            pipe.send(_answer(work, pipe.recv()))
    except InputError as err:
        pipe.send(err)
    except EOFError:
        pass


def _answer(work: Callable[[Task], Result], task: Task) -> Result | Lost | InputError:
    try:
        return work(task)
    except InputError as err:
        return err
    except Exception as err:
        traceback.print_exc()
        return Lost(f"{type(err).__name__}: {one_line(err)}")


class _Actor:
    def __init__(self, make: Make, device: str) -> None:
        self.make, self.device, self.work = make, device, None

    def run(self, task: Any) -> Any:
        try:
            self.work = self.work or self.make(self.device)
        except InputError as err:
            return err
        return _answer(self.work, task)


def _on_ray(
    make: Make, tasks: Sequence[Task], settings: Settings, device: "torch.device",
    on_wait: Callable[[], object],
) -> Iterator[tuple[Task, Any]]:  # fmt: skip
    ray = need_package("ray", "executor=ray", "'ldm-sg[distributed]'")
    ours, address = not ray.is_initialized(), settings.address or os.environ.get("RAY_ADDRESS")
    if ours:
        quiet = {"include_dashboard": False, "logging_level": "warning", "log_to_driver": True}
        try:  # a cluster of our own listens on this machine alone
            ray.init(address, **quiet) if address else ray.init(_node_ip_address="127.0.0.1", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as err:
            raise InputError(f"address={address!r}: no Ray cluster answers there: {one_line(err)}") from err
    there = ray.cluster_resources()
    gpus, cpus = (int(there.get(kind, 0)) for kind in ("GPU", "CPU"))
    count = min(len(tasks), settings.processes or gpus or max(1, cpus // 4))
    on = (
        "cuda" if gpus and getattr(settings, "device", "") == "auto" else device.type
    )  # the cluster's, not this machine's
    share = min(1.0, gpus / max(count, 1)) if on == "cuda" else 0
    actor = ray.remote(num_gpus=share, num_cpus=min(1.0, cpus / max(count, 1)))(_Actor)
    todo, busy = deque(tasks), {}

    def hand(worker: Any) -> None:
        task = todo.popleft()
        busy[worker.run.remote(task)] = worker, task

    try:
        for _ in range(count):
            hand(actor.remote(make, on))
        while busy:
            for ref in ray.wait(list(busy), timeout=1)[0]:
                worker, task = busy.pop(ref)
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayError as err:  # the actor, or its node, is gone
                    answer = Lost(one_line(err))
                if isinstance(answer, InputError):
                    raise answer
                yield task, answer
                if isinstance(answer, Lost):
                    ray.kill(worker)
                if todo:
                    hand(actor.remote(make, on) if isinstance(answer, Lost) else worker)
            on_wait()
    finally:
        for worker, _ in busy.values():
            ray.kill(worker)
        if ours:
            ray.shutdown()
