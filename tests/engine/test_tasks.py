"""Functions in Ray tasks: order, errors, lost workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from latentmill.engine.tasks import map_in_tasks
from latentmill.errors import StorageError, WorkerError


def test_results_are_in_the_order_of_the_arguments(ray_session: Path) -> None:
    assert list(map_in_tasks(lambda n: n * n, range(40), None)) == [n * n for n in range(40)]


def test_an_error_of_the_function_is_raised_as_it_is(ray_session: Path) -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise StorageError("The disk is full: make room.")
        return number

    results = map_in_tasks(fail, range(40), None)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StorageError, match="disk is full"):
        next(results)


def test_a_task_is_repeated_when_its_process_is_killed(ray_session: Path, tmp_path: Path) -> None:
    def die_once(number: int) -> int:
        mark = tmp_path / str(number)
        if number % 4 == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert list(map_in_tasks(die_once, range(9), None)) == list(range(9))


@pytest.mark.slow
def test_a_task_that_is_always_killed_ends_the_call(ray_session: Path) -> None:
    def die(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(WorkerError, match="was lost"):
        list(map_in_tasks(die, range(2), None))
