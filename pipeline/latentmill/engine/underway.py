"""How far a worker is with a unit, by the audio that it has taken so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from latentmill.encoding.chunks import Chunk
from latentmill.encoding.unit_audio import Facts, Heard, Opened
from latentmill.models.base import ModelSpec
from latentmill.plan import Unit
from latentmill.sources.base import Item


@dataclass(frozen=True)
class UnitProgress:
    """How far a unit is.

    Attributes:
        audio_seconds: Audio that went to the model.
        total_seconds: Audio of the whole unit: true lengths of items that were read, lengths from
            headers of items that were opened, what the plan says of the rest.
        items: Items that were read to their end, failed or were skipped.
    """

    audio_seconds: float
    total_seconds: float
    items: int


class Underway:
    """Follows a unit's audio on its way to the model. Written by one thread, read by any."""

    def __init__(self, unit: Unit, items: Sequence[Item], spec: ModelSpec) -> None:
        self._spec = spec
        known = [item.seconds for item in items]
        unknown = sum(seconds is None for seconds in known)
        rest = max(unit.seconds - sum(filter(None, known)), 0.0)
        # Estimates of single items are not in the plan; the unit's is.
        self._expected = [rest / unknown if seconds is None else seconds for seconds in known]
        self._total = sum(self._expected)
        self._done = 0.0
        self._current = 0.0
        self._items = 0

    @property
    def progress(self) -> UnitProgress:
        """How far it is now."""
        done = self._done + self._current
        return UnitProgress(done, max(self._total, done), self._items)

    def follow(self, audio: Iterable[Heard]) -> Iterator[Heard]:
        """Pass the unit's events on."""
        for heard in audio:
            index, _, event = heard
            if isinstance(event, Opened):
                if event.frames:
                    self._expect(index, event.frames * self._second_per_frame)
            elif isinstance(event, Chunk):
                self._current = event.frame * self._second_per_frame
                self._expect(index, max(self._expected[index], self._current))
            else:  # a skipped or failed item has no latents
                true = event.num_samples / self._spec.sample_rate if isinstance(event, Facts) else 0
                self._current, self._done = 0.0, self._done + true
                self._expect(index, true)
                self._items += 1
            yield heard

    @property
    def _second_per_frame(self) -> float:
        return self._spec.hop / self._spec.sample_rate

    def _expect(self, index: int, seconds: float) -> None:
        self._total += seconds - self._expected[index]
        self._expected[index] = seconds
