"""One unit, one shard, one commit: writing a unit's outcomes so that they count or do not exist."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash
from pydantic import ValidationError

from latentmill.errors import StorageError, StoreError
from latentmill.record import Outcome, Record, time_major_bytes
from latentmill.storage import Storage
from latentmill.store.schema import (
    COMMITS,
    Commit,
    ItemEntry,
    StatisticsEntry,
    commit_path,
    shard_path,
)
from latentmill.store.statistics import ChannelStatistics
from latentmill.store.writers import Location, ShardWriter, open_writer

HASH_BLOCK = 1 << 22


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
        if record is None:
            self.entries.append(
                ItemEntry(key=outcome.key, status=outcome.status, reason=outcome.reason)
            )
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
    ledger = _Ledger()
    with storage.scratch_file(path) as temporary:
        writer = open_writer(format_name, temporary, info)
        with _abort_on_failure(writer, f"{storage.root}/{path}"):
            for outcome in outcomes:
                record = ledger.add(outcome, writer.max_latent_bytes)
                if record is not None:
                    writer.add(record)
            locations = writer.close()
        rows = len(locations)
        with temporary.open("rb") as file:
            size, digest = temporary.stat().st_size, hash_of(file)
        if rows:
            storage.publish(temporary, path)
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
    commits = {}
    for name in sorted(storage.list(COMMITS)):
        if name.endswith(".json"):
            try:
                commit = Commit.model_validate_json(storage.read(f"{COMMITS}/{name}"))
            except ValidationError as error:
                raise StoreError(
                    f"Commit {storage.root}/{COMMITS}/{name} is damaged; delete it and run again "
                    "to encode its unit anew."
                ) from error
            commits[commit.unit] = commit
    return commits


def hash_of(file: BinaryIO) -> str:
    """xxh3-128 of an open file's bytes, hex."""
    digest = xxhash.xxh3_128()
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _abort_on_failure(writer: ShardWriter, path: str) -> Iterator[None]:
    """Release the writer when writing is left half-way, by an error or by a closed generator."""
    complete = False
    try:
        yield
        complete = True
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if not complete:
            writer.abort()


def _statistics_entry(statistics: ChannelStatistics | None) -> StatisticsEntry | None:
    if statistics is None:
        return None
    return StatisticsEntry(
        frames=statistics.frames, mean=statistics.mean.tolist(), m2=statistics.m2.tolist()
    )
