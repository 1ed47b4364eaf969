"""What is in a store: counts that add up, failures by reason, and the bottleneck."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from latentmill.encoding.timings import bound
from latentmill.errors import LatentmillError
from latentmill.store.commit import Tally, iter_commits
from latentmill.store.store import LatentStore

MAX_REASONS, MAX_EXAMPLES = 20, 3
_MAX_KINDS = 1000  # of reasons that are kept apart


@dataclass
class Reason:
    """Items that failed, or were skipped, for the same reason; numbers in it may differ.

    Attributes:
        text: The reason of the first one.
        count: Number of items.
        keys: The first ones.
    """

    text: str
    count: int = 0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoreCounts:
    """The counts of a store; `missing` items of the plan have no result yet.

    Attributes:
        failures: The most frequent reasons.
        skips: The same of skipped items; of a view, why records of its bases were left out.
        unlisted: Numbers of failed and of skipped items with other reasons.
        ignored: Number of files that are not audio, by extension.
        stages: Seconds by the names of `encoding.timings.COUNTERS`, summed over workers.
        workers: Number of processes that encoded.
        bottleneck: What limited the speed; None if that was not measured.
    """

    items: int
    encoded: int
    skipped: int
    failed: int
    units: int
    bytes: int
    failures: tuple[Reason, ...]
    skips: tuple[Reason, ...]
    unlisted: tuple[int, int]
    ignored: Mapping[str, int]
    stages: Mapping[str, float]
    workers: int
    bottleneck: str | None

    @property
    def missing(self) -> int:
        """Items of the plan without a result."""
        return self.items - self.encoded - self.skipped - self.failed


def contents(store: LatentStore) -> StoreCounts:
    """Read the contents of a store from dataset.json and its commits, one commit at a time."""
    failures, skips = _Reasons(), _Reasons()
    stages: Counter[str] = Counter()
    workers: set[str] = set()
    units = size = 0
    for commit in iter_commits(store.storage):
        tally = Tally.of(commit)
        failures.add(tally.failures)
        skips.add(tally.skips)
        stages.update(tally.timings)
        workers.add(commit.worker)
        units, size = units + 1, size + tally.bytes
    info = store.info
    for text, count in info.left_out.items():
        skips.count(text, count)
    return StoreCounts(
        items=info.items,
        encoded=info.encoded,
        skipped=info.skipped,
        failed=info.failed,
        units=units,
        bytes=size,
        failures=failures.most(),
        skips=skips.most(),
        unlisted=(failures.unlisted(), skips.unlisted()),
        ignored=_ignored(store),
        stages=dict(stages),
        workers=len(workers),
        bottleneck=bound(stages),
    )


class _Reasons:
    """Counts reasons; reasons that differ only in numbers are one."""

    def __init__(self) -> None:
        self._found: dict[str, Reason] = {}
        self._total = 0

    def add(self, pairs: Iterable[tuple[str, str]]) -> None:
        for key, text in pairs:
            reason = self.count(text, 1)
            if reason is not None and len(reason.keys) < MAX_EXAMPLES:
                reason.keys.append(key)

    def count(self, text: str, items: int) -> Reason | None:
        """Count items with a reason; None if it is not among those that are kept apart."""
        self._total += items
        kind = re.sub(r"\d+", "0", text)
        if kind not in self._found and len(self._found) == _MAX_KINDS:
            return None
        reason = self._found.setdefault(kind, Reason(text))
        reason.count += items
        return reason

    def most(self) -> tuple[Reason, ...]:
        return tuple(sorted(self._found.values(), key=lambda one: -one.count)[:MAX_REASONS])

    def unlisted(self) -> int:
        return self._total - sum(one.count for one in self.most())


def _ignored(store: LatentStore) -> Mapping[str, int]:
    if store.info.bases:  # `store.plan` is that of the first base
        return {}
    try:
        return store.plan.ignored
    except LatentmillError:  # a sealed store can be read without its plan
        return {}
