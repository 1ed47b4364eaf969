"""Checking that the contents of a store match its plan and its commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from latentmill.audio import open_audio, prepare
from latentmill.audio.media import is_remote, open_media
from latentmill.encoding.fingerprint import fingerprint
from latentmill.errors import ItemError, LatentmillError, StorageError, StoreError
from latentmill.models.inference.precision import numeric_mode
from latentmill.plan import Unit, check_items, iter_keys, iter_units
from latentmill.record import FloatArray, Record
from latentmill.sources.address import item_at
from latentmill.sources.base import Segment
from latentmill.sources.reading import UnitReader
from latentmill.storage.scratch import SCRATCH, is_temporary
from latentmill.storage.storage import Storage
from latentmill.store.commit import committed_revisions, iter_commits, read_commit
from latentmill.store.metadata import matches_records
from latentmill.store.remote_sources import check_source, sources_near
from latentmill.store.schema import (
    COMMITS,
    DATASET_PATH,
    ORIGIN_PATH,
    SHARDS,
    DatasetInfo,
    parse_name,
    shard_path,
)
from latentmill.store.seal import dataset_info, read_origin
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore
from latentmill.store.verify_index import misplaced
from latentmill.store.verify_shard import shard_faults
from latentmill.store.verify_view import view_faults


@dataclass(frozen=True)
class Decoded:
    """Result of decoding one record to audio.

    Attributes:
        key: The record's key.
        seconds: Length of the audio.
        level_db: Level of the decoded audio relative to the original audio, dB.
        snr_db: Signal-to-noise ratio relative to the original audio, dB; None if the source can no
            longer be read here.
    """

    key: str
    seconds: float
    level_db: float | None
    snr_db: float | None


@dataclass
class VerifyReport:
    """Result of verification; the store is intact if there are no faults."""

    units: int = 0
    committed: int = 0
    items: int = 0
    records: int = 0
    faults: list[str] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    fields: dict[str, VerifyReport] = field(default_factory=dict)  # by name


def verify(store: LatentStore, *, decode: int = 0, remote_sources: bool = False) -> VerifyReport:
    """Check a store: plan, commits, hashes, counts and values; decode some records to audio.

    Of a view, its own files are checked, and its records in the base stores.

    Checks unit by unit, with the plan, a few commits, one record and a block of its shard in
    memory. Each fault is one line. If a shard does not match its commit, only that is reported.

    Args:
        store: The store.
        decode: Number of records to decode, spread evenly over the store; none if there are faults.
        remote_sources: Whether to compare them with source audio at other addresses than this
            machine and the bucket or server of the store.

    Raises:
        StoreError: The plan cannot be read.
    """
    try:
        with sources_near(store, remote_sources=remote_sources):
            return (
                _Verification(store).run(decode) if store.bases is None else _of_view(store, decode)
            )
    finally:
        vars(store).pop("annotations", None)


def _of_view(store: LatentStore, decode: int) -> VerifyReport:
    report = VerifyReport(items=store.info.items, records=store.info.encoded)
    report.faults += view_faults(store)
    if not report.faults:
        _decode_some(store, decode, report)
    return report


class _Verification:
    def __init__(self, store: LatentStore) -> None:
        self._store = store
        self._plan = store.plan
        self._storage = Storage(store.url)
        self._fingerprint = fingerprint(self._plan.fingerprint)
        self._committed = committed_revisions(self._storage)
        self._shards: set[str] = set()  # shards that belong to a commit

    def run(self, decode: int) -> VerifyReport:
        plan = self._plan
        report = VerifyReport(units=len(plan.units), items=plan.num_items)
        report.faults += self._annotation_faults()
        committed = self._committed
        missing = [unit.name for unit in plan.units if unit.name not in committed]
        if missing:
            report.faults.append(
                f"{len(missing)} of {len(plan.units)} units are not committed (the first is "
                f"{missing[0]}): run the same encode command again"
            )
        check_items(plan, self._storage)
        report.faults += self._duplicate_keys()
        for unit, table in iter_units(self._storage, plan, ["key"]):
            if unit.name in committed:
                report.faults += self._unit_faults(unit, table["key"].to_pylist(), report)
        report.faults += self._unexpected_files()
        if not missing:
            report.faults += self._origin_faults()
        if not report.faults:
            report.faults += self._seal_faults()
        if not report.faults:
            _decode_some(self._store, decode, report)
        return report

    def _annotation_faults(self) -> Iterator[str]:
        try:
            if (annotations := self._store.annotations) is not None:
                annotations.check()
        except (StoreError, StorageError) as error:
            yield str(error)
            self._store.annotations = None  # check the records without them

    def _duplicate_keys(self) -> Iterator[str]:
        """Find keys that are in the plan more than once, with eight bytes of memory per key."""
        hashes = np.sort(np.fromiter(map(_hash_of_key, self._keys()), np.uint64))
        if repeated := set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()):
            suspects = (key for key in self._keys() if _hash_of_key(key) in repeated)
            for key, count in Counter(suspects).items():
                if count > 1:
                    yield f"{key} is in the plan {count} times"

    def _keys(self) -> Iterator[str]:
        return iter_keys(self._storage, self._plan)

    def _unit_faults(self, unit: Unit, keys: list[str], report: VerifyReport) -> Iterator[str]:
        try:
            commit = read_commit(self._storage, unit.name, self._committed[unit.name])
        except LatentmillError as error:
            revision = self._committed[unit.name]
            self._shards.add(shard_path(unit.name, self._plan.format, revision))
            yield str(error)
            return
        report.committed += 1
        report.records += commit.rows
        if commit.fingerprint != self._fingerprint:
            yield f"commit {unit.name} has a different fingerprint than the plan"
        if keys != [item.key for item in commit.items]:
            yield f"commit {unit.name} does not list the items of its unit in the plan"
        elif commit.items_hash not in (None, unit.hash):
            yield (
                f"the items of unit {unit.name} have changed since it was encoded: run the same "
                "encode command again"
            )
        if commit.shard is None:
            return
        self._shards.add(commit.shard)
        yield from shard_faults(self._store, commit.shard, commit)

    def _unexpected_files(self) -> Iterator[str]:
        storage = self._storage
        for name in storage.list(SHARDS):
            parsed = parse_name(name)
            # An earlier revision stays until the next run.
            superseded = parsed and parsed[1] < self._committed.get(parsed[0], 0)
            if f"{SHARDS}/{name}" not in self._shards and not superseded:
                yield f"{SHARDS}/{name} does not belong to a commit and is not used: delete it"
        yield from self._temporary_files() if storage.local else ()
        units = {unit.name for unit in self._plan.units}
        for name in storage.list(COMMITS):
            parsed = parse_name(name)
            if parsed is None or parsed[0] not in units:
                yield f"{COMMITS}/{name} does not belong to a unit of the plan: delete it"

    def _temporary_files(self) -> Iterator[str]:
        folder = self._storage.scratch_folder
        if folder.is_symlink():
            yield f"{SCRATCH} is a link: remove it"
            return
        for name in self._storage.list(SCRATCH):
            if is_temporary(folder / name):
                yield (
                    f"{SCRATCH}/{name} was left by a killed run: run again to remove it, or delete "
                    "it if the file system has no locks"
                )
            else:
                yield f"{SCRATCH}/{name} was not written by latentmill: move or delete it"

    def _origin_faults(self) -> Iterator[str]:
        """Check that the origin has the shape of one chunk, `[D, Z]`."""
        model, chunking = self._plan.fingerprint["model"], self._plan.fingerprint["chunking"]
        hint = "delete it and run the same encode command again"
        try:
            origin = read_origin(self._storage)
        except StorageError:
            yield f"{ORIGIN_PATH} is missing or damaged: {hint}"
            return
        channels = model["latent_channels"]
        frames = chunking["step"] // model["hop"] + chunking["overlap"]
        field = self._plan.field
        own = field is not None and field.source != "audio"  # such as that of an empty text
        if own or chunking["stitch"] == "none":  # chunks overlap in samples, not in frames
            frames = origin.shape[-1] if origin.ndim else 1
        fits = origin.shape == (channels, frames) and origin.dtype == np.float32
        if not fits or not np.isfinite(origin).all():
            yield f"{ORIGIN_PATH} does not contain {channels} x {frames} finite numbers: {hint}"

    def _seal_faults(self) -> Iterator[str]:
        """Check that dataset.json and the index match the plan and the commits."""
        store, hint = self._store, "run the same encode command again to seal the store again"
        if not store.sealed:
            yield (
                f"all units are committed, but {DATASET_PATH} is missing: run the same encode "
                "command again to seal it"
            )
            return
        index = store.info.index
        expected = dataset_info(self._plan, iter_commits(self._storage))
        if names := _differences(expected, store.info):
            # A run compares only the hash of the commits, so it would not seal the store again.
            first = "" if "seal" in names else f"delete {DATASET_PATH} and "
            yield (
                f"{DATASET_PATH} does not match the plan and the commits ({', '.join(names)}): "
                f"{first}{hint}"
            )
        try:
            if len(store) != expected.encoded:
                yield f"{index} contains {len(store)} of {expected.encoded} records: {hint}"
                return
            key = misplaced(store.index, iter_commits(self._storage))
        except StoreError as error:
            yield str(error)
            return
        if key is not None:
            yield f"{index} and the commit differ on where {key} is: {hint}"
            return
        info = store.info
        metadata = info.metadata
        if metadata is None:  # sealed by an earlier version
            return
        try:
            whole = matches_records(
                self._storage, store.index, metadata, info.metadata_hash, store.annotations
            )
        except StorageError as error:
            yield str(error)
        else:
            if not whole:
                yield f"{metadata} is missing, damaged or not that of the records: {hint}"


# Fields of dataset.json that do not depend on the plan and the commits.
_INDEPENDENT = {
    "latentmill_version",
    "index",
    "index_hash",
    "format_version",
    "metadata",
    "metadata_hash",
    "annotation",
    "base_seal",
    "seams",
    "linearity",
}
_SUMS = ("mean", "std", "hours")  # another machine may have summed them in a different order


def _hash_of_key(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode())


def _differences(expected: DatasetInfo, found: DatasetInfo) -> list[str]:
    """Return the names of the fields that differ."""
    names = DatasetInfo.model_fields.keys() - _INDEPENDENT
    if found.format_version == 1:
        names -= {"seal"}
    differing = []
    for name in sorted(names):
        left, right = getattr(expected, name), getattr(found, name)
        same = left == right
        if name in _SUMS:
            same = np.shape(left) == np.shape(right) and np.allclose(left, right, rtol=1e-9, atol=0)
        if not same:
            differing.append(name)
    return differing


def _decode_some(store: LatentStore, count: int, report: VerifyReport) -> None:
    if count:
        for row in spread_rows(len(store), count):
            _decode(store, store.index.key(row), report)


def _decode(store: LatentStore, key: str, report: VerifyReport) -> None:
    record = store[key]
    with numeric_mode(store.precision, store.device):
        audio = store.decode(key)  # [C, T]
    if audio.shape[1] != record.num_samples or not np.isfinite(audio).all():
        report.faults.append(f"{key} does not decode to {record.num_samples} finite samples")
        return
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    level = 20 * np.log10(rms / record.rms) if rms > 0 and record.rms > 0 else None
    report.decoded.append(
        Decoded(key, record.duration, None if level is None else float(level), _snr(record, audio))
    )


def _snr(record: Record, audio: FloatArray) -> float | None:
    try:
        source = read_source(record, channels=audio.shape[0])
    except ItemError:
        return None
    if source.shape != audio.shape:
        return None
    noise = np.square(source - audio, dtype=np.float64).sum()
    signal = np.square(source, dtype=np.float64).sum()
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None


def read_source(record: Record, channels: int, samples: int | None = None) -> FloatArray:
    """Load the audio that a record was encoded from, as the model's input `[channels, samples]`.

    With `samples` only the first ones are loaded. Raises ItemError if the source is missing, has
    changed, or is refused by `sources_near`.
    """
    check_source(record)
    item = item_at(record.source_uri)
    part = item.segment or Segment(0.0)
    if item.place is not None and not is_remote(item.uri):
        open_media(item.uri).close()  # ItemError, also for a pipe, which would block
    with UnitReader([item]) as reader, reader.open(item) as media:
        if media.content_hash != record.content_hash:
            raise ItemError("the source has changed since it was encoded")
        stream = open_audio(media, start=part.start, duration=part.duration, allow_truncated=True)
        waveform = prepare(stream, sample_rate=record.sample_rate, channels=channels)
        blocks: list[FloatArray] = []
        for block in waveform.blocks():
            blocks.append(block)
            if samples is not None and sum(b.shape[1] for b in blocks) >= samples:
                break
        return np.concatenate(blocks, axis=1)[:, :samples]
