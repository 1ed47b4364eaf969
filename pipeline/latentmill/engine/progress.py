"""Telling how a run goes: a bar in a terminal, plain lines elsewhere, JSON, or nothing.

Audio hours, times real time, the time left, failed items so far. The time left follows from the
estimated length of the units that are still open.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from latentmill.plan import Plan, Unit
from latentmill.printing import printable, printable_json
from latentmill.redact import redact_text
from latentmill.store.commit import Tally

if TYPE_CHECKING:
    from latentmill.engine.worker import UnitResult

LINE_SECONDS = 10.0

LogFormat = Literal["text", "json"]


class QuietProgress:
    """Says nothing; base of those that do."""

    def planning(self, items: int, headers: int) -> None:
        """The source is being listed: so many items, and headers read, so far."""

    def begin(self, plan: Plan, tallies: Mapping[str, Tally]) -> None:
        """The run starts; the commits of these `tallies`, by unit name, are there already."""

    def unit_done(self, result: UnitResult) -> None:
        """A unit was committed."""

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        """A unit was lost with its actor."""

    def note(self, text: str) -> None:
        """Something that a person may want to know."""

    def workers(self, ready: int, starting: int) -> None:
        """So many actors are at work, and so many have no place or no model yet."""

    def tick(self, audio_seconds: float) -> None:
        """Seconds of audio that the actors have encoded so far in this run."""

    def end(self) -> None:
        """The run is over, whichever way."""


Progress = QuietProgress


class _Counting(QuietProgress):
    """Keeps the counts that are shown; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def begin(self, plan: Plan, tallies: Mapping[str, Tally]) -> None:
        self._began = self._clock()
        self._items = plan.num_items
        self._estimates = {unit.number: unit.seconds for unit in plan.units}
        for unit in plan.units:
            if unit.name in tallies:
                self._estimates[unit.number] = 0.0
        self._todo = sum(self._estimates.values())
        self._done_items = sum(tally.items for tally in tallies.values())
        self._failed = sum(tally.failed for tally in tallies.values())
        self._committed = 0.0  # audio seconds of units that this run committed
        self._estimated = 0.0  # what those units were estimated at
        self._audio = 0.0

    def unit_done(self, result: UnitResult) -> None:
        self._done_items += result.encoded + result.skipped + result.failed
        self._failed += result.failed
        self._committed += result.audio_seconds
        self._estimated += self._estimates[result.unit]
        self._audio = max(self._audio, self._committed)

    def tick(self, audio_seconds: float) -> None:
        self._audio = max(audio_seconds, self._committed)

    @property
    def _elapsed(self) -> float:
        return max(self._clock() - self._began, 1e-6)

    @property
    def _share(self) -> float:
        """Share of this run's work that is done, 0 to 1."""
        ahead = self._audio - self._committed
        total = self._committed + max(self._todo - self._estimated, ahead)
        return self._audio / total if total else 0.0

    def _text(self) -> str:
        share = self._share
        left = self._elapsed * (1 - share) / share if share > 0.01 else None
        return (
            f"{self._done_items}/{self._items} items, {self._audio / 3600:.3f} h of audio, "
            f"{self._audio / self._elapsed:.1f} x real time, "
            f"{'--' if left is None else _minutes(left)} left, {self._failed} failed"
        )


class LineProgress(_Counting):
    """Plain lines, one every ten seconds: for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream
        self._next = self._clock() + LINE_SECONDS

    def planning(self, items: int, headers: int) -> None:
        if self._clock() >= self._next:
            self._next += LINE_SECONDS
            self._say(_listing(items, headers))

    def begin(self, plan: Plan, tallies: Mapping[str, Tally]) -> None:
        super().begin(plan, tallies)
        self._next = self._began + LINE_SECONDS
        self._say(f"{self._items} items; starting the workers")

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self._say(_lost(unit, attempt, reason))

    def note(self, text: str) -> None:
        self._say(redact_text(text))

    def tick(self, audio_seconds: float) -> None:
        super().tick(audio_seconds)
        if self._clock() >= self._next:
            self._next += LINE_SECONDS
            self._say(self._text())

    def end(self) -> None:
        self._say(self._text())

    def _say(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


class BarProgress(_Counting):
    """A bar in a terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._bar = Bar(
            TextColumn("encoding"), BarColumn(), TextColumn("{task.description}"), console=console
        )
        self._task = self._bar.add_task("starting the workers", total=1.0)
        self._next = self._clock() + LINE_SECONDS

    def planning(self, items: int, headers: int) -> None:
        if self._clock() >= self._next:
            self._next += LINE_SECONDS
            self._bar.console.print(_listing(items, headers))

    def begin(self, plan: Plan, tallies: Mapping[str, Tally]) -> None:
        super().begin(plan, tallies)
        self._bar.start()

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self.note(_lost(unit, attempt, reason))

    def note(self, text: str) -> None:
        self._bar.console.print(printable(redact_text(text)), markup=False, highlight=False)

    def tick(self, audio_seconds: float) -> None:
        super().tick(audio_seconds)
        if audio_seconds:
            self._bar.update(self._task, completed=self._share, description=self._text())

    def end(self) -> None:
        self._bar.update(self._task, description=self._text())
        self._bar.stop()


class JsonProgress(_Counting):
    """A JSON object per line, for machines: `event`, `time` (UTC) and what belongs to the event."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream
        self._next = self._clock() + LINE_SECONDS

    def planning(self, items: int, headers: int) -> None:
        if self._clock() >= self._next:
            self._next += LINE_SECONDS
            self._say("planning", items=items, headers=headers)

    def begin(self, plan: Plan, tallies: Mapping[str, Tally]) -> None:
        super().begin(plan, tallies)
        self._next = self._began + LINE_SECONDS
        todo = len(plan.units) - len(tallies)
        self._say("begin", items=self._items, units=len(plan.units), units_todo=todo)

    def unit_done(self, result: UnitResult) -> None:
        super().unit_done(result)
        self._say("unit_done", **dataclasses.asdict(result))

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self._say("unit_lost", unit=unit.number, attempt=attempt, reason=redact_text(reason))

    def note(self, text: str) -> None:
        self._say("note", text=redact_text(text))

    def workers(self, ready: int, starting: int) -> None:
        self._say("workers", ready=ready, starting=starting)

    def tick(self, audio_seconds: float) -> None:
        super().tick(audio_seconds)
        if self._clock() >= self._next:
            self._next += LINE_SECONDS
            self._progress("progress")

    def end(self) -> None:
        self._progress("end")

    def _progress(self, event: str) -> None:
        self._say(
            event,
            items_done=self._done_items,
            items=self._items,
            failed=self._failed,
            audio_seconds=round(self._audio, 3),
            x_real_time=round(self._audio / self._elapsed, 3),
            share=round(self._share, 4),
        )

    def _say(self, event: str, **values: object) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = printable_json({"time": now, "event": event, **values})
        print(line, file=self._stream, flush=True)


def for_stream(log_format: LogFormat = "text", stream: TextIO | None = None) -> Progress:
    """JSON if asked for; else a bar if the stream (default: stderr) is a terminal, or lines."""
    stream = stream or sys.stderr
    if log_format == "json":
        return JsonProgress(stream)
    console = Console(file=stream)
    return BarProgress(console) if console.is_terminal else LineProgress(stream)


def _lost(unit: Unit, attempt: int, reason: str) -> str:
    return f"unit {unit.name} was lost on attempt {attempt}: {redact_text(reason)}"


def _listing(items: int, headers: int) -> str:
    return f"listing the source: {items} items{f', {headers} headers read' if headers else ''}"


def _minutes(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
