"""Computes the progress of a run: units, items, audio, speed and time left.

The driver calls it with every event. It updates the display, and publishes the progress for
`latentmill status`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from latentmill.engine.holder import RunProgress
from latentmill.engine.underway import UnitProgress
from latentmill.plan import Plan, Unit
from latentmill.store.commit import Tally
from latentmill.text.log import get_logger

if TYPE_CHECKING:
    from latentmill.engine.progress import Progress
    from latentmill.engine.worker import UnitResult

_log = get_logger("engine")

WINDOW_SECONDS = 120.0  # over which the speed is measured
FIRST_SECONDS = 5.0  # no speed is shown earlier, because it would not be meaningful


class Tracker:
    """Progress of one run.

    `tallies` has the units that are committed already, by unit name. `publish` writes the progress
    where other processes can read it.
    """

    def __init__(
        self,
        plan: Plan,
        tallies: Mapping[str, Tally],
        display: Progress,
        publish: Callable[[RunProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._display, self._publish, self._clock = display, publish, clock
        self._units, self._items = len(plan.units), plan.num_items
        self._open = {unit.number: unit for unit in plan.units if unit.name not in tallies}
        self._waiting = sum(unit.seconds for unit in self._open.values())  # by the plan
        # Seconds of audio in committed units: measured, and as planned.
        self._audio = sum(tally.audio_seconds for tally in tallies.values())
        self._planned = sum(unit.seconds for unit in plan.units) - self._waiting
        self._items_done = sum(tally.items for tally in tallies.values())
        self._failed = sum(tally.failed for tally in tallies.values())
        self._in_flight: Mapping[int, UnitProgress] = {}
        self._has_worker = self._ended = False
        self._restart()
        now = self._now()
        self._publish(now)
        self._display.begin(now)

    def unit_done(self, result: UnitResult) -> None:
        unit = self._open.pop(result.unit)
        self._in_flight = {n: p for n, p in self._in_flight.items() if n != result.unit}
        self._waiting -= unit.seconds
        self._planned += unit.seconds
        self._audio += result.audio_seconds
        self._items_done += result.encoded + result.skipped + result.failed
        self._failed += result.failed
        self._display.unit_done(result)

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self._display.unit_lost(unit, attempt, reason)

    def interrupted(self) -> None:
        """Show the committed progress before the workers and Ray are stopped (some seconds)."""
        _log.info("interrupted: stopping the workers")
        self.end()

    def workers(self, ready: int, starting: int) -> None:
        # The time for starting Ray and loading the model does not count for the speed.
        if ready and not self._has_worker:
            self._has_worker = True
            self._restart()
        self._display.workers(ready, starting)

    def tick(self, in_flight: Mapping[int, UnitProgress]) -> None:
        """Show and publish the progress. `in_flight` has the workers' units, by number."""
        self._in_flight = {n: p for n, p in in_flight.items() if n in self._open}
        now = self._now()
        self._publish(now)
        self._display.tick(now)

    def end(self) -> None:
        """Show the average speed when the run ends, once, also after an error."""
        if self._ended:
            return
        self._ended = True
        self._samples = deque([self._first])
        self._in_flight = {}
        self._display.end(self._now())

    def _restart(self) -> None:
        """Measure the speed from now on."""
        self._first = self._clock(), self._audio
        self._samples = deque([self._first])

    def _now(self) -> RunProgress:
        flights = self._in_flight.values()
        done = self._audio + sum(one.audio_seconds for one in flights)
        total = self._audio + self._in_flight_and_waiting()
        rate = self._rate(done)
        return RunProgress(
            units=self._units,
            units_done=self._units - len(self._open),
            units_in_flight=len(self._in_flight),
            items=self._items,
            items_done=self._items_done + sum(one.items for one in flights),
            failed=self._failed,
            audio_seconds=done,
            total_seconds=max(total, done),
            x_real_time=rate,
            seconds_left=max(total - done, 0.0) / rate if rate else 0.0 if not self._open else None,
        )

    def _in_flight_and_waiting(self) -> float:
        """Seconds of audio in units that are not committed.

        Planned lengths of waiting units are scaled by the error found in the other units.
        """
        begun = {n: one for n, one in self._in_flight.items() if one.audio_seconds or one.items}
        found = sum(one.total_seconds for one in begun.values())
        planned = sum(self._open[number].seconds for number in begun)
        waiting = max(self._waiting - planned, 0.0)
        audio = self._audio + found
        if audio and self._planned + planned:
            waiting *= audio / (self._planned + planned)
        return found + waiting

    def _rate(self, done: float) -> float | None:
        """Audio seconds per second in the window, or since the start if the window has none."""
        now = self._clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
        for began, audio in (self._samples[0], self._first):
            if now - began >= FIRST_SECONDS and done > audio:
                return (done - audio) / (now - began)
        return None
