"""What a run tells of itself, by a clock that stands still between the steps."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pytest
from rich.console import Console

from latentmill.cli.log import messages_on_stderr, set_format
from latentmill.engine.holder import RunProgress
from latentmill.engine.progress import (
    LINE_SECONDS,
    BarProgress,
    JsonProgress,
    LogProgress,
    Progress,
    for_stream,
)
from latentmill.engine.tracker import Tracker
from latentmill.engine.underway import UnitProgress
from latentmill.engine.worker import UnitResult
from latentmill.plan import Plan, PlanPart, Unit
from latentmill.store.commit import Tally
from latentmill.text.log import get_logger


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


Capture: TypeAlias = pytest.LogCaptureFixture


def plan(units: int = 4, items: int = 5, seconds: float = 60.0) -> Plan:
    cut = tuple(Unit(number, items, items * seconds) for number in range(units))
    part = PlanPart(0, 0, units, units * items, units * items * seconds, 0.0, 0, 0, {})
    return Plan("/songs", {}, "mdct", {}, "parquet", {}, units=cut, parts=(part,))


def tally(unit: Unit, encoded: int) -> Tally:
    """What the commit of a unit comes to whose other items were skipped."""
    skips = tuple((f"song {number}", "short") for number in range(encoded, unit.items))
    return Tally(unit.items, encoded, len(skips), 0, 60.0 * encoded, 0, {}, (), skips)


def result(unit: int, failed: int = 0, seconds: float = 300.0) -> UnitResult:
    return UnitResult(unit, 5 - failed, 0, failed, seconds / 5 * (5 - failed), (), {})


def tracked(display: Progress, clock: Clock, planned: Plan | None = None) -> Tracker:
    return Tracker(planned or plan(), {}, display, clock=clock)


def lines(
    planned: Plan | None = None, tallies: Mapping[str, Tally] | None = None
) -> tuple[Tracker, Clock]:
    clock = Clock()
    return Tracker(planned or plan(), tallies or {}, LogProgress(clock), clock=clock), clock


@pytest.fixture(autouse=True)
def all_messages(caplog: Capture) -> None:
    caplog.set_level(logging.INFO, "latentmill")


def test_speed_and_time_left_follow_from_audio_and_clock(caplog: Capture) -> None:
    tracker, clock = lines()  # 4 units of 300 s
    clock.now += 20
    # A third of the audio in a third of a minute.
    tracker.tick({0: UnitProgress(270.0, 300.0, 4), 1: UnitProgress(130.0, 300.0, 2)})
    assert caplog.messages[-1] == (
        "6/20 items, 0.111 of 0.333 h of audio, 20.0x real time, 0:40 left, 0 failed"
    )
    tracker.unit_done(result(0))
    clock.now += 20
    tracker.tick({1: UnitProgress(300.0, 300.0, 5), 2: UnitProgress(0.0, 300.0, 0)})
    assert caplog.messages[-1] == (
        "10/20 items, 0.167 of 0.333 h of audio, 15.0x real time, 0:40 left, 0 failed"
    )


@pytest.mark.parametrize("true", [900.0, 100.0])  # seconds a unit; the plan says 300
def test_the_time_left_is_right_where_the_plan_is_not(caplog: Capture, true: float) -> None:
    tracker, clock = lines()
    step = true / 20  # seconds of audio in 10 seconds
    for tick in range(1, 80):
        clock.now += 10.0
        unit, part = divmod(tick * step, true)
        if part == 0:
            tracker.unit_done(result(int(unit) - 1, seconds=true))
        tracker.tick({int(unit): UnitProgress(part, true, int(5 * part / true))})
        text = caplog.messages[-1].split(", ")[3].split(" ")[0]
        hours, minutes, seconds = f"0:{text}".split(":")[-3:]
        left = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        assert left == pytest.approx(800 - tick * 10, abs=1), caplog.messages[-1]


def test_the_speed_is_that_of_the_last_two_minutes(caplog: Capture) -> None:
    planned = plan(units=1, seconds=7200)  # 10 hours
    tracker, clock = lines(planned)
    clock.now += 600  # starting Ray, and the model
    tracker.workers(1, 0)
    for second in range(1, 3001):
        clock.now += 1
        audio = min(second, 1000) * 10.0 + max(second - 1000, 0) * 4.0
        tracker.tick({0: UnitProgress(audio, 36_000.0, 0)})
        if second == 500:
            assert "10.0x real time, 51:40 left" in caplog.messages[-1]
    assert "4.0x real time, 1:15:00 left" in caplog.messages[-1]
    clock.now += 600  # a batch that takes long: the average until something moves again
    tracker.tick({0: UnitProgress(18_000.0, 36_000.0, 0)})
    assert "5.0x real time, 1:00:00 left" in caplog.messages[-1]


def test_failed_items_count_as_done_and_shorten_the_rest(caplog: Capture) -> None:
    tracker, clock = lines()
    clock.now += 30
    tracker.unit_done(result(0, failed=5))
    tracker.unit_done(result(1))
    tracker.tick({})  # as many are expected to fail of the rest
    assert caplog.messages[-1] == (
        "10/20 items, 0.083 of 0.167 h of audio, 10.0x real time, 0:30 left, 5 failed"
    )


def test_a_resumed_run_counts_items_from_the_start_and_time_from_now(caplog: Capture) -> None:
    whole = plan()
    done = {unit.name: tally(unit, encoded=5) for unit in whole.units[:2]}
    tracker, clock = lines(whole, done)
    clock.now += 60
    tracker.tick({2: UnitProgress(300.0, 300.0, 5)})
    assert caplog.messages[-1] == (
        "15/20 items, 0.250 of 0.333 h of audio, 5.0x real time, 1:00 left, 0 failed"
    )


def test_a_lost_unit_is_counted_again(caplog: Capture) -> None:
    tracker, clock = lines()
    clock.now += 20
    tracker.tick({0: UnitProgress(200.0, 300.0, 3)})
    assert caplog.messages[-1].startswith("3/20 items, 0.056 of")
    tracker.unit_lost(plan().units[0], 1, "killed")
    clock.now += 20
    tracker.tick({0: UnitProgress(0.0, 300.0, 0)})
    assert caplog.messages[-1] == "0/20 items, 0.000 of 0.333 h of audio, 0 failed"


def test_the_end_of_a_run_is_told_with_what_was_committed(caplog: Capture) -> None:
    tracker, clock = lines(plan(units=1))
    clock.now += 30
    tracker.unit_done(result(0))
    tracker.end()  # the worker was not asked again
    assert caplog.messages[-1] == (
        "5/5 items, 0.083 of 0.083 h of audio, 10.0x real time, 0:00 left, 0 failed"
    )


def test_what_is_published_is_what_is_shown() -> None:
    published: list[RunProgress] = []
    clock = Clock()
    tracker = Tracker(plan(), {}, Progress(), published.append, clock)
    clock.now += 20
    tracker.unit_done(result(0, failed=1))
    tracker.tick({1: UnitProgress(160.0, 300.0, 2), 2: UnitProgress(0.0, 300.0, 0)})
    assert [one.units_in_flight for one in published] == [0, 2]
    now = published[-1]
    assert (now.units, now.units_done, now.items, now.items_done, now.failed) == (4, 1, 20, 7, 1)
    assert now.audio_seconds == 240.0 + 160.0
    assert now.total_seconds == 240.0 + 300.0 + 600.0 * 540 / 600
    assert now.x_real_time == 20.0
    assert now.seconds_left == (1080.0 - 400.0) / 20
    assert RunProgress.model_validate_json(now.model_dump_json()) == now


def test_lines_come_every_ten_seconds_and_at_once_for_a_lost_unit(caplog: Capture) -> None:
    tracker, clock = lines()
    for _ in range(300):
        clock.now += 0.1
        tracker.tick({0: UnitProgress(1.0, 300.0, 0)})
    first, *others = caplog.messages
    assert first == "20 items; starting the workers"
    assert len(others) == 30 // LINE_SECONDS
    tracker.unit_lost(plan().units[1], 2, "killed")
    assert caplog.messages[-1] == "unit 000001 failed on attempt 2: killed"


def test_a_library_call_logs_lost_units_as_warnings_and_the_rest_as_info(caplog: Capture) -> None:
    tracker, clock = lines()
    clock.now += 20
    tracker.tick({0: UnitProgress(1.0, 300.0, 0)})
    tracker.unit_lost(plan().units[0], 1, "killed")
    tracker.end()
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING", "INFO"]
    assert {record.name for record in caplog.records} == {"latentmill.engine"}


def test_a_pause_is_followed_by_one_line(caplog: Capture) -> None:
    tracker, clock = lines()
    for pause in (40.0, 1.0, 1.0, 1.0):
        clock.now += pause
        tracker.tick({0: UnitProgress(1.0, 300.0, 0)})
    assert len(caplog.messages) == 2


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(caplog: Capture) -> None:
    assert isinstance(for_stream(stream=io.StringIO()), LogProgress)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", 0):
        assert isinstance(for_stream(stream=terminal), BarProgress)
        caplog.set_level(logging.ERROR, "latentmill")
        for log_format in ("text", "json"):
            assert type(for_stream(log_format, terminal)) is Progress  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (60.0, " 33%  0.111/0.333 h  20.0x  0:40 left"),
        (4e8, " 33%  740741/2222222 h  133333333.3x  0:40 left  12 failed"),
    ],
)
def test_a_bar_fits_a_terminal_of_80_columns_and_moves_with_audio(
    seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", 0) as screen:
        clock = Clock()
        display = BarProgress(Console(file=terminal), clock)
        tracker = tracked(display, clock, plan(seconds=seconds))
        clock.now += 20
        total = 5 * seconds  # of a unit; no unit is committed
        failed = 12 * ("failed" in shown)
        tracker._failed = failed
        tracker.tick({n: UnitProgress(total * 2 / 3, total, 1) for n in range(2)})
        display._bar.stop()
        terminal.flush()
        os.set_blocking(master, False)
        raw = b"".join(iter(lambda: screen.read(4096), None)).decode()
    assert "\x1b[" in raw
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    rows = [row for row in re.split(r"[\r\n]+", text) if row.strip()]
    assert all(len(row) <= 80 for row in rows), rows
    assert rows[-1].rstrip().endswith(shown), rows
    assert rows[-1].startswith("━━")


def test_messages_of_the_command_line_are_above_the_bar() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=80), clock)
    tracker = tracked(progress, clock)
    clock.now += 10
    tracker.unit_done(result(0))
    tracker.unit_done(result(1))
    with messages_on_stderr(logging.INFO):
        tracker.unit_lost(plan().units[2], 1, "the worker [died]")
    tracker.end()
    assert "unit 000002 failed on attempt 1: the worker [died]" in stream.getvalue()
    assert "60.0x  0:10 left" in stream.getvalue()


@pytest.mark.parametrize(("begun", "shown"), [(True, "  0%  0.000/0.333 h"), (False, "starting")])
def test_a_bar_is_not_drawn_again_after_an_interrupt(begun: bool, shown: str) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=80)
    tracker = tracked(BarProgress(console, clock), clock)
    if begun:
        clock.now += 10
        tracker.tick({0: UnitProgress(270.0, 300.0, 4)})
    with messages_on_stderr(logging.INFO):
        tracker.interrupted()
    seen = stream.getvalue()
    tracker.tick({0: UnitProgress(280.0, 300.0, 4)})
    tracker.end()
    assert stream.getvalue() == seen
    assert "interrupted: stopping the workers" in seen
    assert shown in seen.replace("\x1b[?25h", "").splitlines()[-1]


def test_json_has_an_object_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = JsonProgress(stream, clock)
    assert isinstance(for_stream("json", stream), JsonProgress)
    clock.now += 2 * LINE_SECONDS
    progress.planning(7, 3)
    tracker = tracked(progress, clock)
    tracker.workers(0, 2)
    tracker.workers(2, 0)
    tracker.unit_lost(plan().units[1], 2, "killed")
    with messages_on_stderr(logging.INFO):
        set_format("json")
        get_logger("engine").warning("something\nelse")
    clock.now += 20
    tracker.unit_done(result(0, failed=1))
    tracker.tick({1: UnitProgress(160.0, 300.0, 2)})
    tracker.end()
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
    assert (events[5]["level"], events[5]["text"]) == ("warning", "something\\nelse")
    assert (events[6]["unit"], events[6]["failed"]) == (0, 1)
    assert (events[7]["items_done"], events[7]["failed"]) == (7, 1)
    assert events[7]["x_real_time"] == 20.0
    assert events[7]["seconds_left"] == 34.0
