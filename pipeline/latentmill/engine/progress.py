"""Displays the progress of a run: a bar in a terminal, log messages elsewhere, or JSON.

`tracker.py` computes the numbers.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from latentmill.engine.holder import RunProgress
from latentmill.plan import Unit
from latentmill.text.log import get_logger
from latentmill.text.printing import clock_time, counted, printable_json
from latentmill.text.redact import redact_text

if TYPE_CHECKING:
    from latentmill.engine.worker import UnitResult

LINE_SECONDS = 10.0

LogFormat = Literal["text", "json"]

_log = get_logger("engine")


class Progress:
    """Displays nothing; only lost units are logged. Base class of the displays."""

    def planning(self, items: int, headers: int) -> None:
        """Called while planning, with the number of items listed and headers read so far."""

    def begin(self, now: RunProgress) -> None:
        """Called when the run starts. Units that were committed before count as done."""

    def unit_done(self, result: UnitResult) -> None:
        """Called when a unit was committed."""

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        """Called when an attempt at a unit failed."""
        _log.warning("unit %s failed on attempt %d: %s", unit.name, attempt, reason)

    def workers(self, ready: int, starting: int) -> None:
        """Called when the number of ready or starting workers changed."""

    def tick(self, now: RunProgress) -> None:
        """Called about once a second."""

    def end(self, now: RunProgress) -> None:
        """Called when the run ends, also after an error. `now` has the average speed."""


class _EveryTenSeconds(Progress):
    """Base class of displays that print at most one progress line in ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + LINE_SECONDS

    def begin(self, now: RunProgress) -> None:
        self._next = self._clock() + LINE_SECONDS

    def _is_due(self) -> bool:
        now = self._clock()
        due = now >= self._next
        while self._next <= now:  # more than once after a pause, such as the start of Ray
            self._next += LINE_SECONDS
        return due


class LogProgress(_EveryTenSeconds):
    """Messages in the log."""

    def planning(self, items: int, headers: int) -> None:
        if self._is_due():
            _log.info("%s", _listing(items, headers))

    def begin(self, now: RunProgress) -> None:
        super().begin(now)
        _log.info("%s; starting the workers", counted(now.items, "item"))

    def tick(self, now: RunProgress) -> None:
        if self._is_due():
            _log.info("%s", _line(now))

    def end(self, now: RunProgress) -> None:
        _log.info("%s", _line(now))


class BarProgress(_EveryTenSeconds):
    """A bar in a terminal, on one line of 80 columns. It shows the share of audio that is done."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._bar = Bar(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("starting the workers", total=1.0)

    def planning(self, items: int, headers: int) -> None:
        if self._is_due():
            self._bar.console.print(_listing(items, headers))

    def begin(self, now: RunProgress) -> None:
        super().begin(now)
        self._bar.start()

    def tick(self, now: RunProgress) -> None:
        if now.audio_seconds or now.items_done:
            self._bar.update(self._task, completed=now.share, description=_short(now))

    def end(self, now: RunProgress) -> None:
        if now.share or self._bar.tasks[self._task].completed:
            self._bar.update(self._task, completed=now.share, description=_short(now))
        self._bar.stop()


class JsonProgress(_EveryTenSeconds):
    """One JSON object per line, with `event`, `time` (UTC) and the values of the event."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream

    def planning(self, items: int, headers: int) -> None:
        if self._is_due():
            self._print("planning", items=items, headers=headers)

    def begin(self, now: RunProgress) -> None:
        super().begin(now)
        todo = now.units - now.units_done
        self._print("begin", items=now.items, units=now.units, units_todo=todo)

    def unit_done(self, result: UnitResult) -> None:
        self._print("unit_done", **dataclasses.asdict(result))

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self._print("unit_lost", unit=unit.number, attempt=attempt, reason=redact_text(reason))

    def workers(self, ready: int, starting: int) -> None:
        self._print("workers", ready=ready, starting=starting)

    def tick(self, now: RunProgress) -> None:
        if self._is_due():
            self._print("progress", **_rounded(now))

    def end(self, now: RunProgress) -> None:
        self._print("end", **_rounded(now))

    def _print(self, event: str, **values: object) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = printable_json({"time": now, "event": event, **values})
        print(line, file=self._stream, flush=True)


def for_stream(log_format: LogFormat = "text", stream: TextIO | None = None) -> Progress:
    """The display for a stream (default: stderr): JSON, else a bar in a terminal, else messages.

    Nothing is displayed if the log level is above INFO.
    """
    stream = stream or sys.stderr
    if not _log.isEnabledFor(logging.INFO):
        return Progress()
    if log_format == "json":
        return JsonProgress(stream)
    console = Console(file=stream)
    return BarProgress(console) if console.is_terminal else LogProgress()


def _line(now: RunProgress) -> str:
    speed = "" if now.x_real_time is None else f"{_speed(now)} real time, "
    left = "" if now.seconds_left is None else f"{_left(now)} left, "
    return (
        f"{now.items_done}/{now.items} items, {now.audio_seconds / 3600:.3f} of "
        f"{now.total_seconds / 3600:.3f} h of audio, {speed}{left}{now.failed} failed"
    )


def _short(now: RunProgress) -> str:
    """The progress in less than 70 columns, even for a million hours."""
    done, total = now.audio_seconds / 3600, now.total_seconds / 3600
    digits = 3 if total < 1 else 1 if total < 1000 else 0
    failed = f"  {now.failed} failed" if now.failed else ""
    return (
        f"{now.share:4.0%}  {done:.{digits}f}/{total:.{digits}f} h  {_speed(now)}  "
        f"{_left(now)} left{failed}"
    )


def _speed(now: RunProgress) -> str:
    return "--" if now.x_real_time is None else f"{now.x_real_time:.1f}x"


def _left(now: RunProgress) -> str:
    return "--" if now.seconds_left is None else clock_time(now.seconds_left)


def _rounded(now: RunProgress) -> dict[str, object]:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in now}
    return {**rounded, "share": round(now.share, 4)}


def _listing(items: int, headers: int) -> str:
    read = f", {counted(headers, 'header')} read" if headers else ""
    return f"listing the source: {counted(items, 'item')}{read}"
