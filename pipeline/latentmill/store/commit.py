"""One unit, one shard, one commit: writing a unit's outcomes so that they count or do not exist."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from latentmill.errors import StoreError
from latentmill.record import Outcome, Record, time_major_bytes
from latentmill.storage import Storage, writing
from latentmill.store.schema import (
    COMMITS,
    Commit,
    ItemEntry,
    StatisticsEntry,
    as_text,
    commit_path,
    parse_document,
    shard_path,
    why_unstorable,
)
from latentmill.store.statistics import ChannelStatistics
from latentmill.store.writers import Location, open_writer

HASH_BLOCK = 1 << 22
READERS = 16  # commits read at once, for storage that answers slowly


@dataclass
class _Ledger:
    """What is known of a unit's items while its shard is being written."""

    entries: list[ItemEntry] = field(default_factory=list)
    statistics: ChannelStatistics | None = None
    audio_seconds: float = 0.0

    def add(self, outcome: Outcome, limit: int) -> Record | None:
        """Enter an outcome; give the record that the shard must take, if there is one."""
        record = outcome.record
        if record is not None and record.latent.nbytes > limit:
            size = record.latent.nbytes / 2**30
            reason = f"its latent of {size:.1f} GiB is too large for Parquet: use format webdataset"
            outcome, record = Outcome(outcome.key, "failed", reason), None
        if record is not None and (odd := why_unstorable(record)):
            outcome, record = Outcome(outcome.key, "failed", odd), None
        if record is None:
            why = None if outcome.reason is None else as_text(outcome.reason)
            self.entries.append(ItemEntry(key=outcome.key, status=outcome.status, reason=why))
            return None
        self.entries.append(
            ItemEntry(
                key=record.key,
                status="encoded",
                hash=xxhash.xxh3_64_hexdigest(time_major_bytes(record.latent)),
                shape=record.latent.shape,
                num_samples=record.num_samples,
            )
        )
        statistics = ChannelStatistics.of(record.latent)
        self.statistics = self.statistics.merge(statistics) if self.statistics else statistics
        self.audio_seconds += record.duration
        return record

    def located(self, locations: list[Location]) -> list[ItemEntry]:
        """The entries with the places of the encoded ones."""
        places = iter(locations)
        return [
            entry.model_copy(update=vars(next(places))) if entry.status == "encoded" else entry
            for entry in self.entries
        ]


@dataclass(frozen=True)
class Tally:
    """What a commit comes to, without its items: small, whatever the unit.

    Attributes:
        items: How many items it has.
        encoded: How many of them were encoded; the same of `skipped` and `failed`.
        audio_seconds: Audio that was encoded.
        bytes: Size of the shard.
        timings: Seconds by stage.
        failures: (key, reason) of the failed items.
        skips: (key, filter) of the skipped ones.
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

    @classmethod
    def of(cls, commit: Commit) -> Tally:
        """The tally of a commit."""
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
        )


def write_unit(
    storage: Storage,
    unit: str,
    outcomes: Iterable[Outcome],
    *,
    format_name: str,
    fingerprint: str,
    info: Mapping[str, Any],
) -> Commit:
    """Write a unit's records to its shard as they come. The shard does not count yet.

    Args:
        storage: The store.
        unit: The unit's name.
        outcomes: Every item's outcome, in the plan's order.
        format_name: `parquet` or `webdataset`.
        fingerprint: The run's fingerprint.
        info: What a reader of this shard alone needs to know.

    Returns:
        The commit, to be written by `write_commit`.

    Raises:
        StorageError: The shard cannot be written; nothing of it stays.
    """
    path = shard_path(unit, format_name)
    where = f"{storage.root}/{path}"
    ledger = _Ledger()
    with storage.scratch_file(path) as temporary, contextlib.ExitStack() as on_failure:
        with writing(where):
            writer = open_writer(format_name, temporary, info)
        on_failure.callback(writer.abort)
        for outcome in outcomes:
            record = ledger.add(outcome, writer.max_latent_bytes)
            if record is not None:
                with writing(where):
                    writer.add(record)
        with writing(where):
            locations = writer.close()
            with temporary.open("rb") as file:
                size, digest = temporary.stat().st_size, hash_of(file)
        on_failure.pop_all()
        rows = len(locations)
        if rows:
            storage.publish(temporary, path)
        else:
            storage.delete(path)  # of an earlier time, when the unit had records
    return Commit(
        unit=unit,
        fingerprint=fingerprint,
        shard=path if rows else None,
        bytes=size if rows else 0,
        hash=digest if rows else None,
        rows=rows,
        audio_seconds=ledger.audio_seconds,
        items=ledger.located(locations),
        statistics=_statistics_entry(ledger.statistics),
        timings={},
    )


def write_commit(storage: Storage, commit: Commit, timings: Mapping[str, float]) -> Commit:
    """Write the commit, after which the unit's shard counts."""
    complete = commit.model_copy(
        update={
            "timings": {name: round(value, 4) for name, value in timings.items()},
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    storage.write(commit_path(commit.unit), complete.model_dump_json(exclude_none=True).encode())
    return complete


def read_commits(storage: Storage) -> dict[str, Commit]:
    """Every commit of a store, by unit name.

    Raises:
        StoreError: A commit is not valid JSON of this format.
    """
    return {commit.unit: commit for commit in iter_commits(storage)}


def iter_commits(storage: Storage) -> Iterator[Commit]:
    """Every commit of a store, in the order of the units; holds a few at a time.

    Raises:
        StoreError: A commit is not valid JSON of this format.
    """
    units = committed_units(storage)
    with ThreadPoolExecutor(READERS, thread_name_prefix="commits") as pool:
        for start in range(0, len(units), READERS):
            some = units[start : start + READERS]
            yield from pool.map(lambda unit: read_commit(storage, unit), some)


def committed_units(storage: Storage) -> list[str]:
    """The names of the units that have a commit, sorted."""
    names = storage.list(COMMITS)
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_commit(storage: Storage, unit: str) -> Commit:
    """The commit of a unit.

    Raises:
        StoreError: It is not valid JSON of this format, or another unit's.
        StorageError: It cannot be read.
    """
    path = commit_path(unit)
    where, cure = f"{storage.root}/{path}", "delete it and run again to encode its unit anew"
    commit = parse_document(Commit, storage.read(path), where, cure)
    if commit.unit != unit:
        raise StoreError(f"{where} is the commit of unit {commit.unit}: {cure}.")
    return commit


def hash_of(file: BinaryIO) -> str:
    """xxh3-128 of an open file's bytes, hex."""
    digest = xxhash.xxh3_128()
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _statistics_entry(statistics: ChannelStatistics | None) -> StatisticsEntry | None:
    if statistics is None:
        return None
    return StatisticsEntry(
        frames=statistics.frames, mean=statistics.mean.tolist(), m2=statistics.m2.tolist()
    )
