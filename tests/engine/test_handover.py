"""Outcomes are written in another thread; errors of either side end both."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from latentmill.engine.handover import OUTCOMES_WAITING, written_beside
from latentmill.record import Outcome


def outcomes(count: int) -> Iterator[Outcome]:
    for number in range(count):
        yield Outcome(f"{number}", "skipped", "why")


def test_outcomes_arrive_in_order_in_another_thread() -> None:
    def write(some: Iterator[Outcome]) -> tuple[list[str], str]:
        return [one.key for one in some], threading.current_thread().name

    keys, thread = written_beside(outcomes(100), write)
    assert keys == [f"{number}" for number in range(100)]
    assert thread.startswith("write")


def test_items_are_encoded_while_others_are_written_and_only_a_few_wait() -> None:
    encoded = 0
    full = threading.Event()

    def counted() -> Iterator[Outcome]:
        nonlocal encoded
        for outcome in outcomes(5 * OUTCOMES_WAITING):
            encoded += 1
            if encoded == OUTCOMES_WAITING:
                full.set()  # while the first one is being written
            yield outcome

    def write(some: Iterator[Outcome]) -> int:
        assert full.wait(60)
        most = 0
        for number, _ in enumerate(some):
            most = max(most, encoded - number)
        return most

    # One is being written, one waits to be queued.
    assert OUTCOMES_WAITING <= written_beside(counted(), write) <= OUTCOMES_WAITING + 2


@pytest.mark.parametrize("at", [0, 3, 50])
def test_an_error_while_encoding_reaches_the_writer(at: int) -> None:
    cleaned = threading.Event()

    def broken() -> Iterator[Outcome]:
        yield from outcomes(at)
        raise MemoryError("no more")

    def write(some: Iterator[Outcome]) -> None:
        try:
            for _ in some:
                pass
        except MemoryError:
            cleaned.set()
            raise

    with pytest.raises(MemoryError, match="no more"):
        written_beside(broken(), write)
    assert cleaned.is_set()


def test_an_error_while_writing_ends_encoding() -> None:
    taken = 0

    def endless() -> Iterator[Outcome]:
        nonlocal taken
        while True:
            taken += 1
            yield Outcome("a", "skipped", "why")

    def write(some: Iterator[Outcome]) -> None:
        next(some)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        written_beside(endless(), write)
    assert not [one for one in threading.enumerate() if one.name.startswith("write")]
