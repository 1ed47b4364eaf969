"""What the values of a field are computed from, and which of them are out of date.

The commit of a field's unit has a hash of each item's input. An item is out of date if its input
has changed since, or if the base store has lost or got a latent of it. If a file cannot be loaded,
the store or the field keeps what it has, so neither must count as computed from the planned file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from latentmill.errors import StoreError
from latentmill.plan import Plan, Unit, read_items
from latentmill.plan.plan import plan_order
from latentmill.record import absent_reason
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.schema import Commit, ItemEntry


@dataclass(frozen=True)
class Absent:
    """Input of an item that the base store has no latent of; the field skips it."""

    reason: str


Input = str | Absent  # the hash of what a value is computed from, hex


class Inputs(Protocol):
    """The inputs of a field's items; one implementation for each kind of source."""

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        """The current inputs of a unit's items, by key, in the order of the plan.

        Args:
            unit: A unit of the base store's plan.
            base: Its commit in the base store; None if it is not committed yet.
            known: Its commit in the field, which may be out of date.
        """
        ...


def audio_inputs(
    items: Iterable[Item], base: Commit | None, known: Iterable[ItemEntry] = ()
) -> dict[str, Input]:
    """The inputs of values that are computed from audio: the planned files.

    If the base store kept an item's earlier latent because the planned file could not be loaded, a
    value in the field counts as up to date: its recorded input is returned. `known` has the entries
    of the field's commit.
    """
    found: dict[str, Input] = {item.key: _hash_of(item) for item in items}
    kept = {entry.key for entry in (() if base is None else base.items) if entry.kept}
    current = (one for one in known if one.key in kept and one.status == "encoded" and not one.kept)
    return found | {one.key: one.input or "" for one in current} | absent_items(base)


def absent_items(base: Commit | None) -> dict[str, Absent]:
    """The items of a unit that the base store has no latent of. Empty before it is committed."""
    return {
        entry.key: Absent(absent_reason(entry.status, entry.reason))
        for entry in (() if base is None else base.items)
        if entry.status != "encoded"
    }


def _hash_of(item: Item) -> str:
    segment = None if item.segment is None else (item.segment.start, item.segment.duration)
    return xxhash.xxh3_64_hexdigest(repr((item.uri, item.size, item.version, segment)).encode())


class AudioInputs:
    """The inputs of a field that is computed from the audio of a store."""

    def __init__(self, planned: Storage) -> None:
        self._planned = planned

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        if known is None or known.items_hash != unit.hash:
            entries = () if known is None else known.items
            return audio_inputs(read_items(self._planned, unit), base, entries)
        # The planned files are those of the commit, so they need not be read. An entry without an
        # input was absent; if it no longer is, no hash is equal to "".
        absent = absent_items(base)
        return {e.key: absent.get(e.key) or e.input or "" for e in known.items}


def is_stale(entry: ItemEntry | None, now: Input) -> bool:
    """Whether an entry of a field's commit must be replaced; None: there is none."""
    if entry is None:
        return True
    if isinstance(now, Absent):
        return entry.status != "skipped" or entry.input is not None
    return entry.input != now


def stale_items(inputs: Mapping[str, Input], known: Commit | None) -> list[str]:
    """Keys of the items whose value in a field's commit is out of date or missing."""
    entries = {entry.key: entry for entry in (() if known is None else known.items)}
    return [key for key, now in inputs.items() if is_stale(entries.get(key), now)]


def with_inputs(commit: Commit, inputs: Mapping[str, Input]) -> Commit:
    """Add the inputs to the entries of a field's commit."""
    found = {key: None if isinstance(now, Absent) else now for key, now in inputs.items()}
    items = [entry.model_copy(update={"input": found[entry.key]}) for entry in commit.items]
    return commit.model_copy(update={"items": items})


def with_audio_inputs(
    commit: Commit,
    inputs: Mapping[str, Input],
    earlier: Mapping[str, ItemEntry],
    items: Iterable[Item],
) -> Commit:
    """Add the inputs to the entries of a commit of a field from audio.

    A value that was kept has the input that it had, so the item stays out of date. If not all
    values are computed from the planned files, the commit has no hash of these.

    Args:
        commit: The commit.
        inputs: The current inputs.
        earlier: The entries of the field's last commit, by key.
        items: The planned items of the unit.
    """
    kept = {entry.key: earlier[entry.key].input or "" for entry in commit.items if entry.kept}
    commit = with_inputs(commit, {**inputs, **kept})
    planned = audio_inputs(items, None)
    if all(entry.input in (None, planned[entry.key]) for entry in commit.items):
        return commit
    return commit.model_copy(update={"items_hash": None})


def inputs_of(base: Storage, planned: Storage, source: str) -> Inputs:
    """The inputs of a field.

    Args:
        base: The base store.
        planned: Where the planned items are read: the base store, or the field.
        source: What the field is computed from, such as `audio`.
    """
    if source == "audio":
        return AudioInputs(planned)
    if source == "latents" or source.startswith(("metadata:", "file:")):
        from latentmill.fields.values import KnownImports, values_of  # imports this module

        return KnownImports() if source.startswith("file:") else values_of(base, source)
    raise StoreError(
        f"{base.root} has a field from {source!r}, which this version of latentmill does not know: "
        "update latentmill."
    )


@dataclass(frozen=True)
class UnitState:
    """A unit of a field, compared with the base store.

    Attributes:
        unit: The unit.
        known: Its commit in the field; None if there is none.
        stale: Keys of the items whose value is out of date or missing and can be computed.
        waiting: Whether the base store must commit the unit before its values can be computed.
    """

    unit: Unit
    known: Commit | None
    stale: Sequence[str]
    waiting: bool


def unit_states(
    base: Storage,
    plan: Plan,
    planned: Storage,
    source: str,
    commits: Iterable[Commit],
    inputs: Inputs | None = None,
) -> Iterator[UnitState]:
    """The state of every unit of a plan in a field.

    Args:
        base: The base store.
        plan: Its plan now, or the plan of the field, which was copied from it.
        planned: The store that has this plan.
        source: What the field is computed from.
        commits: The commits of the field, in unit order.
        inputs: The current inputs, if they are known already.
    """
    inputs = inputs or inputs_of(base, planned, source)
    of_base, of_field = InOrder(iter_commits(base)), InOrder(commits)
    for unit in plan.units:
        known, now = of_field.of(unit.name), of_base.of(unit.name)
        stale = stale_items(inputs.of(unit, now, known), known)
        yield UnitState(unit, known, stale, waiting=now is None and source != "audio")


class InOrder:
    """Finds the commits of units that are asked for in order, with one commit in memory."""

    def __init__(self, commits: Iterable[Commit]) -> None:
        self._rest = iter(commits)
        self._next = next(self._rest, None)

    def of(self, unit: str) -> Commit | None:
        while self._next is not None and plan_order(self._next.unit) < plan_order(unit):
            self._next = next(self._rest, None)
        return self._next if self._next is not None and self._next.unit == unit else None
