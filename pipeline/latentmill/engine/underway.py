"""Progress of a unit in a worker, measured by the audio that the model has taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from latentmill.encoding.chunks import Chunk
from latentmill.encoding.loading import Facts, ItemEvent, Opened
from latentmill.models.base import ModelSpec
from latentmill.plan import Unit
from latentmill.sources.base import Item


@dataclass(frozen=True)
class UnitProgress:
    """How far a unit is.

    Attributes:
        audio_seconds: Audio that went to the model.
        total_seconds: Audio of the whole unit: measured lengths of items that were read, lengths
            from the headers of items that were opened, planned lengths of the others.
        items: Number of items that were read to their end, failed or were skipped.
    """

    audio_seconds: float
    total_seconds: float
    items: int


class Underway:
    """Counts a unit's audio on its way to the model. One thread writes, any thread reads."""

    def __init__(self, unit: Unit, items: Sequence[Item], spec: ModelSpec) -> None:
        self._spec = spec
        known = [item.seconds for item in items]
        unknown = sum(seconds is None for seconds in known)
        rest = max(unit.seconds - sum(filter(None, known)), 0.0)
        # The plan has an estimate for the unit, not for single items.
        self._expected = [rest / unknown if seconds is None else seconds for seconds in known]
        self._total = sum(self._expected)
        self._done = 0.0
        self._reached: dict[int, float] = {}  # seconds of the items that are being read
        self._current = 0.0  # their sum
        self._items = 0

    @property
    def progress(self) -> UnitProgress:
        done = self._done + self._current
        return UnitProgress(done, max(self._total, done), self._items)

    def follow(self, audio: Iterable[ItemEvent]) -> Iterator[ItemEvent]:
        """Yield the unit's events unchanged, and count them."""
        for item_event in audio:
            index, _, event = item_event
            if isinstance(event, Opened):
                if event.frames:
                    self._expect(index, event.frames * self._second_per_frame)
            elif isinstance(event, Chunk):
                reached = event.frame * self._second_per_frame
                self._current += reached - self._reached.get(index, 0.0)
                self._reached[index] = reached
                self._expect(index, max(self._expected[index], reached))
            else:  # a skipped or failed item has no latents
                true = event.num_samples / self._spec.sample_rate if isinstance(event, Facts) else 0
                self._current -= self._reached.pop(index, 0.0)
                self._done += true
                self._expect(index, true)
                self._items += 1
            yield item_event

    @property
    def _second_per_frame(self) -> float:
        return self._spec.hop / self._spec.sample_rate

    def _expect(self, index: int, seconds: float) -> None:
        self._total += seconds - self._expected[index]
        self._expected[index] = seconds
