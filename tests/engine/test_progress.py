"""What a run tells of itself, by a clock that stands still between the steps."""

from __future__ import annotations

import io
import json
import os
import pty
from dataclasses import dataclass

import pytest
from rich.console import Console

from latentmill.engine.progress import (
    LINE_SECONDS,
    BarProgress,
    JsonProgress,
    LineProgress,
    QuietProgress,
    for_stream,
)
from latentmill.engine.worker import UnitResult
from latentmill.plan import Part, Plan, Unit
from latentmill.store.commit import Tally


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def plan(units: int = 4, items: int = 5, seconds: float = 60.0) -> Plan:
    cut = tuple(Unit(number, items, items * seconds) for number in range(units))
    part = Part(0, 0, units, units * items, units * items * seconds, 0.0, 0, 0, {})
    return Plan("/songs", {}, "mdct", {}, "parquet", {}, units=cut, parts=(part,))


def tally(unit: Unit, failed: int) -> Tally:
    """What the commit of a unit comes to whose other items were skipped."""
    failures = tuple((f"song {number}", "why") for number in range(failed))
    skips = tuple((f"song {number}", "short") for number in range(failed, unit.items))
    return Tally(unit.items, 0, len(skips), failed, 0.0, 0, {}, failures, skips)


def result(unit: int, failed: int = 0) -> UnitResult:
    return UnitResult(unit, 5 - failed, 0, failed, 60.0 * (5 - failed), (), {})


def lines() -> tuple[LineProgress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return LineProgress(stream, clock), stream, clock


def last(stream: io.StringIO) -> str:
    return stream.getvalue().splitlines()[-1]


def test_speed_and_time_left_follow_from_audio_and_clock() -> None:
    progress, stream, clock = lines()
    progress.begin(plan(), {})  # 4 units of 300 s
    clock.now += 20
    progress.tick(400.0)  # a third of the audio in a third of a minute
    assert last(stream) == "0/20 items, 0.111 h of audio, 20.0 x real time, 0:40 left, 0 failed"
    progress.unit_done(result(0))
    clock.now += 20
    progress.tick(600.0)
    assert last(stream) == "5/20 items, 0.167 h of audio, 15.0 x real time, 0:40 left, 0 failed"


def test_failed_items_count_as_done_and_shorten_the_rest() -> None:
    progress, stream, clock = lines()
    progress.begin(plan(), {})
    clock.now += 30
    progress.unit_done(result(0, failed=5))
    progress.unit_done(result(1))
    progress.tick(300.0)
    assert last(stream) == "10/20 items, 0.083 h of audio, 10.0 x real time, 1:00 left, 5 failed"


def test_a_resumed_run_counts_items_from_the_start_and_time_from_now() -> None:
    whole = plan()
    progress, stream, clock = lines()
    progress.begin(whole, {unit.name: tally(unit, failed=1) for unit in whole.units[:2]})
    clock.now += 60
    progress.tick(300.0)
    assert last(stream) == "10/20 items, 0.083 h of audio, 5.0 x real time, 1:00 left, 2 failed"


def test_the_end_of_a_run_is_told_with_what_was_committed() -> None:
    progress, stream, clock = lines()
    progress.begin(plan(units=1), {})
    clock.now += 3
    progress.unit_done(result(0))
    progress.tick(0.0)  # the actor was not asked again
    progress.end()
    assert last(stream) == "5/5 items, 0.083 h of audio, 100.0 x real time, 0:00 left, 0 failed"


def test_nothing_is_promised_before_there_is_audio() -> None:
    progress, stream, clock = lines()
    progress.begin(plan(seconds=3600), {})
    clock.now += 3600
    progress.tick(3.0)
    assert "-- left" in last(stream)
    clock.now += 3600 * 24
    progress.tick(3600.0 * 5)
    assert "75:00:00 left" in last(stream)


def test_lines_come_every_ten_seconds_and_at_once_for_a_lost_unit() -> None:
    progress, stream, clock = lines()
    progress.begin(plan(), {})
    for _ in range(300):
        clock.now += 0.1
        progress.tick(1.0)
    first, *others = stream.getvalue().splitlines()
    assert first == "20 items; starting the workers"
    assert len(others) == 30 // LINE_SECONDS
    progress.unit_lost(plan().units[1], 2, "killed")
    assert last(stream) == "unit 000001 was lost on attempt 2: killed"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = QuietProgress()
    quiet.begin(plan(), {})
    quiet.tick(1.0)
    quiet.unit_done(result(0))
    quiet.unit_lost(plan().units[0], 1, "killed")
    quiet.end()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_a_file_gets_lines() -> None:
    assert isinstance(for_stream(stream=io.StringIO()), LineProgress)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", 0) as screen:
        progress = for_stream(stream=terminal)
        assert isinstance(progress, BarProgress)
        progress.begin(plan(), {})
        progress.unit_done(result(0))
        progress.tick(400.0)
        progress.end()
        terminal.flush()
        os.set_blocking(master, False)
        shown = b"".join(iter(lambda: screen.read(4096), None)).decode()
    assert "encoding" in shown
    assert "━" in shown
    assert "\x1b[" in shown
    assert "5/20 items" in shown.replace("\r\n", "")


def test_a_bar_says_that_a_unit_was_lost() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=200), clock)
    progress.begin(plan(), {})
    clock.now += 10
    progress.tick(600.0)
    progress.unit_lost(plan().units[2], 1, "the worker [died]")
    progress.end()
    assert "unit 000002 was lost on attempt 1: the worker [died]" in stream.getvalue()
    assert "60.0 x real time, 0:10 left" in stream.getvalue()


def test_json_has_an_object_per_line() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = JsonProgress(stream, clock)
    assert isinstance(for_stream("json", stream), JsonProgress)
    clock.now += 2 * LINE_SECONDS
    progress.planning(7, 3)
    progress.begin(plan(), {})
    progress.workers(0, 2)
    progress.workers(2, 0)
    progress.unit_lost(plan().units[1], 2, "killed")
    progress.note("something\nelse")
    clock.now += 20
    progress.unit_done(result(0, failed=1))
    progress.tick(400.0)
    progress.end()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    names = "planning begin workers workers unit_lost note unit_done progress end"
    assert [event["event"] for event in events] == names.split()
    assert all(event["time"].endswith("+00:00") for event in events)
    assert events[1] | {"time": ""} == {
        "time": "",
        "event": "begin",
        "items": 20,
        "units": 4,
        "units_todo": 4,
    }
    assert events[4]["reason"] == "killed"
    assert (events[6]["unit"], events[6]["failed"]) == (0, 1)
    assert (events[7]["items_done"], events[7]["failed"]) == (5, 1)
    assert events[7]["x_real_time"] == 20.0
