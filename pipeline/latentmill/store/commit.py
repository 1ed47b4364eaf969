"""Writing the outcomes of a unit as one shard and one commit, atomically."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from latentmill.errors import StorageError, StoreError, restore_hint
from latentmill.plan.plan import plan_order
from latentmill.record import Outcome, Record, time_major_bytes
from latentmill.storage.storage import Storage, writing
from latentmill.storage.threads import map_in_threads
from latentmill.store.formats import open_writer
from latentmill.store.schema import (
    COMMITS,
    SHARDS,
    Commit,
    ItemEntry,
    StatisticsEntry,
    as_text,
    commit_path,
    parse_document,
    parse_name,
    shard_path,
    why_unstorable,
)
from latentmill.store.statistics import ChannelStatistics
from latentmill.store.writers import Location
from latentmill.text.redact import redact_text

HASH_BLOCK = 1 << 22
READERS = 16  # commits read in parallel, because storage may respond slowly


@dataclass
class _UnitEntries:
    """Entries, statistics and audio length of a unit's items while its shard is being written."""

    entries: list[ItemEntry] = field(default_factory=list)
    statistics: ChannelStatistics | None = None
    audio_seconds: float = 0.0

    def add(self, outcome: Outcome, limit: int) -> Record | None:
        """Add an outcome; return the record to write to the shard, if there is one."""
        record = outcome.record
        if record is not None and record.latent.nbytes > limit:
            size = record.latent.nbytes / 2**30
            reason = f"its latent of {size:.1f} GiB is too large for Parquet: use format webdataset"
            outcome, record = Outcome(outcome.key, "failed", reason), None
        if record is not None and (odd := why_unstorable(record)):
            outcome, record = Outcome(outcome.key, "failed", odd), None
        # An unforeseen error may quote a URL that a server redirected to.
        why = None if outcome.reason is None else redact_text(as_text(outcome.reason))
        if record is None:
            self.entries.append(ItemEntry(key=outcome.key, status=outcome.status, reason=why))
            return None
        self.entries.append(
            ItemEntry(
                key=record.key,
                status="encoded",
                reason=why,
                hash=xxhash.xxh3_64_hexdigest(time_major_bytes(record.latent)),
                shape=record.latent.shape,
                num_samples=record.num_samples,
            )
        )
        statistics = ChannelStatistics.of(record.latent)
        self.statistics = self.statistics.merge(statistics) if self.statistics else statistics
        self.audio_seconds += record.duration
        return record

    def located(self, locations: list[Location], keys: Sequence[str]) -> list[ItemEntry]:
        """The entries in the order of `keys`, those of encoded items with row and location."""
        places = enumerate(locations)
        located = {}
        for entry in self.entries:
            if entry.status == "encoded":
                row, place = next(places)
                entry = entry.model_copy(update={"row": row, **vars(place)})  # noqa: PLW2901
            located[entry.key] = entry
        return [located[key] for key in keys]


@dataclass(frozen=True)
class Tally:
    """Summary of a commit that lists only the failed, skipped and kept items.

    Attributes:
        items: Number of items.
        encoded: Number of encoded items; likewise `skipped` and `failed`.
        audio_seconds: Seconds of audio of the encoded items.
        bytes: Size of the shard.
        timings: Seconds by stage.
        failures: (key, reason) of each failed item.
        skips: (key, filter) of each skipped item.
        kept: (key, reason) of each item whose earlier record was kept.
        kept_samples: Length of these items in samples at the model's rate.
    """

    items: int
    encoded: int
    skipped: int
    failed: int
    audio_seconds: float
    bytes: int
    timings: Mapping[str, float]
    failures: tuple[tuple[str, str], ...]
    skips: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...] = ()
    kept_samples: int = 0

    @classmethod
    def of(cls, commit: Commit) -> Tally:
        failures, skips = (
            tuple((item.key, item.reason or "") for item in commit.items if item.status == status)
            for status in ("failed", "skipped")
        )
        return cls(
            items=len(commit.items),
            encoded=commit.rows,
            skipped=len(skips),
            failed=len(failures),
            audio_seconds=commit.audio_seconds,
            bytes=commit.bytes,
            timings=commit.timings,
            failures=failures,
            skips=skips,
            kept=tuple((item.key, item.reason or "") for item in commit.items if item.kept),
            kept_samples=sum(item.num_samples or 0 for item in commit.items if item.kept),
        )


def write_unit(
    storage: Storage,
    unit: str,
    outcomes: Iterable[Outcome],
    *,
    format_name: str,
    fingerprint: str,
    info: Mapping[str, Any],
    revision: int = 0,
    keys: Sequence[str] | None = None,
    on_bytes: Callable[[], object] = lambda: None,
) -> Commit:
    """Write a unit's records to a new shard as they arrive; return the commit for `write_commit`.

    The shard is not part of the store until the commit is written. `outcomes` are those of all
    items; the shard has the records in this order. `keys` are those of the items in the plan's
    order, if it is another one. `info` is what a reader of this shard alone needs to know. If the
    name of `revision` is taken by an attempt that was not committed, the next free revision is
    used. If writing fails with a StorageError, the shard is removed. `on_bytes`: see `publish`.
    """
    entries = _UnitEntries()
    scratch = storage.scratch_file(shard_path(unit, format_name))
    with scratch as temporary, contextlib.ExitStack() as on_failure:
        shard = storage.named(shard_path(unit, format_name, revision))
        where = shard if storage.local else str(temporary)
        with writing(where):
            writer = open_writer(format_name, temporary, info)
        on_failure.callback(writer.abort)
        for outcome in outcomes:
            record = entries.add(outcome, writer.max_latent_bytes)
            if record is not None:
                with writing(where):
                    writer.add(record)
        with writing(where):
            locations = writer.close()
            with temporary.open("rb") as file:
                size, digest = temporary.stat().st_size, hash_of(file)
        on_failure.pop_all()
        rows = len(locations)
        while not (
            storage.publish(temporary, shard_path(unit, format_name, revision), on_bytes)
            if rows
            else not storage.exists(shard_path(unit, format_name, revision))
        ):
            revision += 1
    found = entries.statistics
    return Commit(
        unit=unit,
        revision=revision,
        fingerprint=fingerprint,
        shard=shard_path(unit, format_name, revision) if rows else None,
        bytes=size if rows else 0,
        hash=digest if rows else None,
        rows=rows,
        audio_seconds=entries.audio_seconds,
        items=entries.located(locations, keys or [entry.key for entry in entries.entries]),
        statistics=found
        and StatisticsEntry(frames=found.frames, mean=found.mean.tolist(), m2=found.m2.tolist()),
        timings={},
    )


def write_commit(storage: Storage, commit: Commit, timings: Mapping[str, float]) -> Commit:
    """Write the commit, which makes the unit's shard part of the store.

    Returns the commit that was written, or an equal one that another attempt had written before.
    Raises StoreError if this revision has a commit of other items.
    """
    complete = commit.model_copy(
        update={
            "timings": {name: round(value, 4) for name, value in timings.items()},
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    path = commit_path(commit.unit, commit.revision)
    if storage.create(path, _content(complete)):
        return complete
    existing = read_commit(storage, commit.unit, commit.revision)
    if (existing.fingerprint, existing.items_hash) != (commit.fingerprint, commit.items_hash):
        raise StoreError(
            f"Another run has committed {storage.root}/{path}: wait until that run has ended, then "
            "run again."
        )
    return existing


def read_commits(storage: Storage) -> dict[str, Commit]:
    """Read the latest commit of every unit, by unit name; StoreError if one is damaged."""
    return {commit.unit: commit for commit in iter_commits(storage)}


def iter_commits(storage: Storage) -> Iterator[Commit]:
    """Read the latest commit of every unit, in unit order, with only a few in memory.

    Raises StoreError if a commit is damaged.
    """
    yield from map_in_threads(
        lambda unit: read_commit(storage, *unit),
        committed_revisions(storage).items(),
        threads=READERS,
        prefetch=READERS,
    )


def committed_revisions(storage: Storage) -> dict[str, int]:
    """The highest committed revision of each committed unit, in unit order."""
    return _highest(name for name in storage.list(COMMITS) if name.endswith(".json"))


def next_revisions(storage: Storage) -> dict[str, int]:
    """The lowest revision that no file has used, by unit; 0 for units that are not listed."""
    names = [*storage.list(COMMITS), *storage.list(SHARDS)]
    return {unit: revision + 1 for unit, revision in _highest(names).items()}


def _highest(names: Iterable[str]) -> dict[str, int]:
    highest: dict[str, int] = {}
    for unit, revision in filter(None, map(parse_name, names)):
        highest[unit] = max(revision, highest.get(unit, 0))
    return {unit: highest[unit] for unit in sorted(highest, key=plan_order)}


def read_commit(storage: Storage, unit: str, revision: int = 0) -> Commit:
    """Read the commit of a unit's revision.

    Raises StoreError if it is damaged or of another unit, StorageError if it cannot be read.
    """
    path = commit_path(unit, revision)
    where, hint = f"{storage.root}/{path}", restore_hint("it")
    commit = parse_document(Commit, storage.read(path), where, hint)
    if (commit.unit, commit.revision) != (unit, revision):
        raise StoreError(
            f"{where} is the commit of unit {commit.unit}, revision {commit.revision}: {hint}."
        )
    return commit


class SealHash:
    """Hash over the commits of a sealed store, in the order of `iter_commits`."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, commit: Commit) -> None:
        content = xxhash.xxh3_128_hexdigest(_content(commit))
        self._digest.update(f"{commit_path(commit.unit, commit.revision)} {content}\n".encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _content(commit: Commit) -> bytes:
    return commit.model_dump_json(exclude_none=True).encode()


def write_new(storage: Storage, path: str, attempt: Callable[[], bool]) -> None:
    """Write a file by `create` or `publish`; one that a killed process has left is deleted.

    Raises StorageError if another process writes it at the same time.
    """
    if not attempt():
        storage.delete(path)
        if not attempt():
            raise StorageError(
                f"Another process is writing to {storage.root}/{path}: wait until it has ended."
            )


def hash_of(file: BinaryIO) -> str:
    """The xxh3-128 hash of an open file's bytes, hex."""
    digest = xxhash.xxh3_128()
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()
