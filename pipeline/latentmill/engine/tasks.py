"""A function applied to many small arguments, by Ray tasks on any nodes with free CPU cores."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from latentmill.engine.cluster import connect, describe
from latentmill.engine.loss import classify
from latentmill.errors import WorkerError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

TASKS_PER_CORE = 2  # submitted at a time, so that cores do not wait for the driver


def map_in_tasks(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], address: str | None
) -> Iterator[Result]:
    """Yield the results in the order of the arguments.

    `function` is pickled once for each worker process. A task whose process or node is lost is
    repeated by Ray, three times at most.

    Raises:
        WorkerError: A task was lost too often. Other errors are those of `function`.
        ConfigError: The cluster cannot be reached.
    """
    with connect(address, payloads=True):
        reference = ray.put(function)
        most = TASKS_PER_CORE * max(1, sum(describe().node_cpus))
        waiting: deque[ray.ObjectRef[Any]] = deque()
        try:
            for argument in arguments:
                waiting.append(_call.remote([reference], argument))
                if len(waiting) >= most:
                    yield _get(waiting.popleft())
            while waiting:
                yield _get(waiting.popleft())
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


@ray.remote(num_cpus=1, max_retries=3)
def _call(function: list[ray.ObjectRef[Any]], argument: Any) -> Any:
    return _function(function[0])(argument)


@functools.lru_cache(maxsize=1)
def _function(reference: ray.ObjectRef[Any]) -> Callable[[Any], Any]:
    """The function with this reference; a process keeps it for its next tasks."""
    function: Callable[[Any], Any] = ray.get(reference)
    return function


def _get(task: ray.ObjectRef[Any]) -> Any:
    try:
        return ray.get(task)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise WorkerError(
            f"A task on the Ray cluster was lost ({classify(error).reason}): run it again."
        ) from error
