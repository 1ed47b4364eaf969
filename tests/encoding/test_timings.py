"""Counters, and the sentence that says what a run was bound by."""

from __future__ import annotations

import threading

import pytest

from latentmill.encoding.timings import COUNTERS, Timings, bound


def test_counters_add_up_in_the_parent_too() -> None:
    whole = Timings()
    parts = [Timings(parent=whole) for _ in range(4)]

    def work(timings: Timings) -> None:
        for _ in range(500):
            timings.add("wait_seconds", 0.5)

    threads = [threading.Thread(target=work, args=[timings]) for timings in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [timings.snapshot()["wait_seconds"] for timings in parts] == [250.0] * 4
    assert whole.snapshot()["wait_seconds"] == 1000.0
    assert whole.steps == 2000
    assert set(whole.snapshot()) == set(COUNTERS)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({"model": 97, "wait": 3}, "bound by the model: it was busy 97% of the time"),
        (
            {"model": 57, "wait": 43, "decode": 80, "read": 5},
            "bound by loading: the model waited 43% of the time; more load threads or CPU cores "
            "would help",
        ),
        (
            {"model": 57, "wait": 43, "decode": 8, "read": 50},
            "bound by reading: the model waited 43% of the time; more load threads or a nearer "
            "source would help",
        ),
        (
            {"model": 50, "wait": 10, "idle": 40, "decode": 8},
            "bound by writing: the model was idle 40% of the time while shards were written; "
            "faster storage or larger units would help",
        ),
        ({}, None),
    ],
)
def test_the_bound_is_named_with_what_would_help(
    stages: dict[str, float], sentence: str | None
) -> None:
    assert bound({f"{name}_seconds": value for name, value in stages.items()}) == sentence
