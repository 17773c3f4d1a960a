"""Run idempotent tasks over a cluster: whatever dies is done again, and the slow is done twice."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vision_plugin.scale._cluster import ClusterError

logger = logging.getLogger(__name__)

Task = TypeVar("Task", bound=Hashable)

RETRIES = 10
"""How often a task is begun again after its process or its machine died."""
IN_FLIGHT = 2
"""Tasks per slot that wait or run: the next is there when one ends."""
_SLOW, _SLOW_SECONDS = 2.0, 5.0
"""A task is done twice once it takes so many times the median, and so many seconds more."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Slot:
    """What one task occupies."""

    cores: int = 1
    gpus: int = 0

    def count(self, ray: Any) -> int:
        """Return how many tasks run at once on the machines that are there now; 0 for none."""
        found = 0
        for node in ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            fits = [has.get("CPU", 0) // self.cores] if self.cores else []
            fits += [has.get("GPU", 0) // self.gpus] if self.gpus else []
            found += int(min(fits, default=1))
        return found


@dataclass
class _Flight:
    task: Any
    begun: float
    again: bool = False


def spread(
    ray: Any, do: Callable[[Any], Any], tasks: Sequence[Task], slot: Slot, *, twice: bool = True
) -> Generator[tuple[Task, Any], None, None]:
    """Run a function on each task, on whatever machines a cluster has; yield results as they come.

    A task may run more than once, at the same time too, so it has to be idempotent. Each task is
    yielded once.

    Args:
        ray: The connected module.
        do: Function of one task, importable on every machine.
        tasks: Tasks, all different.
        slot: What a task occupies.
        twice: Whether a slow task may be done a second time at once.

    Raises:
        ClusterError: no machine has room for a task, or one died with every process that did it.
        Exception: what the function raises.
    """
    slots = slot.count(ray)
    if tasks and not slots:
        gpus = f" and {slot.gpus} GPUs" if slot.gpus else ""
        raise ClusterError(
            f"no machine of the cluster has {slot.cores} cores{gpus} for a task: add one, or "
            "lower cores="
        )
    remote = ray.remote(
        num_cpus=slot.cores, num_gpus=slot.gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
    )(do)
    waiting, flights, done = deque(tasks), dict[Any, _Flight](), set[Any]()
    seconds: list[float] = []
    looked = time.monotonic()
    try:
        while waiting or flights:
            while waiting and len(flights) < IN_FLIGHT * slots:
                task = waiting.popleft()
                flights[remote.remote(task)] = _Flight(task, time.monotonic())
            ready, _ = ray.wait(list(flights), num_returns=1, timeout=_LOOK_SECONDS)
            for ref in ready:
                flight = flights.pop(ref)
                if flight.task in done:
                    continue
                result = _result(ray, ref, flight.task)
                done.add(flight.task)
                seconds.append(time.monotonic() - flight.begun)
                _forget(ray, flights, flight.task)
                yield flight.task, result
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                slots = max(1, slot.count(ray))
                # Not only where a slot is free: of a machine that is cut off, all seem busy.
                if twice and not waiting and seconds:
                    _repeat_slowest(remote, flights, statistics.median(seconds))
    finally:
        for ref in flights:
            ray.cancel(ref, force=True)


def _repeat_slowest(remote: Any, flights: dict[Any, _Flight], median: float) -> None:
    """Begin the task once more that has taken longest, if it has taken very long."""
    slow = [f for f in flights.values() if not f.again]
    if not slow:
        return
    slowest = min(slow, key=lambda flight: flight.begun)
    if time.monotonic() - slowest.begun > _SLOW * median + _SLOW_SECONDS:
        logger.info("task %s takes long: doing it a second time elsewhere", slowest.task)
        slowest.again = True
        flights[remote.remote(slowest.task)] = _Flight(slowest.task, time.monotonic(), True)


def _forget(ray: Any, flights: dict[Any, _Flight], task: Any) -> None:
    """Stop whoever else is doing a task that is done."""
    for ref in [ref for ref, flight in flights.items() if flight.task == task]:
        del flights[ref]
        ray.cancel(ref, force=True)


def _result(ray: Any, ref: Any, task: Any) -> Any:
    errors = ray.exceptions
    try:
        return ray.get(ref)
    except errors.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
        raise ClusterError(
            f"the processes that did task {task} died {RETRIES + 1} times "
            f"({' '.join(str(error).split())[:200]}): give a task more memory with more cores=, "
            "and run the same command again"
        ) from error
    except errors.RayError as error:
        raise ClusterError(
            f"the cluster lost task {task} ({' '.join(str(error).split())[:200]}): run the same "
            "command again, which continues"
        ) from error
