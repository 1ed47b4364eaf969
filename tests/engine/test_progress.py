"""What a run tells of itself, by a clock that stands still between the steps."""

from __future__ import annotations

import io
import os
import pty
from dataclasses import dataclass

import pytest
from rich.console import Console

from latentmill.engine.progress import (
    LINE_SECONDS,
    BarProgress,
    LineProgress,
    QuietProgress,
    for_terminal,
)
from latentmill.engine.worker import UnitResult
from latentmill.plan import Plan, Unit
from latentmill.sources.base import Item
from latentmill.store.schema import Commit, ItemEntry

BYTES_PER_SECOND = 176_400  # what a WAV file is estimated by


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def plan(units: int = 4, items: int = 5, seconds: float = 60.0) -> Plan:
    def item(name: str) -> Item:
        return Item(name, f"/songs/{name}.wav", round(seconds * BYTES_PER_SECOND), "1")

    cut = tuple(Unit(u, tuple(item(f"{u}-{i}") for i in range(items))) for u in range(units))
    return Plan("/songs", cut, {}, "mdct", {}, "parquet", {})


def commit(unit: Unit, failed: int) -> Commit:
    """The commit of a unit whose other items were skipped."""
    entries = [
        ItemEntry(key=item.key, status="failed" if index < failed else "skipped", reason="why")
        for index, item in enumerate(unit.items)
    ]
    values = {"unit": unit.name, "fingerprint": "", "bytes": 0, "rows": 0, "audio_seconds": 0}
    return Commit(**values, items=entries, timings={})


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
    progress.begin(whole, {unit.name: commit(unit, failed=1) for unit in whole.units[:2]})
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
    assert isinstance(for_terminal(io.StringIO()), LineProgress)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", 0) as screen:
        progress = for_terminal(terminal)
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
