"""Checking that a store holds what its plan and its commits promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from latentmill.audio import open_audio, open_media, prepare
from latentmill.config import fingerprint
from latentmill.decode import Audio
from latentmill.errors import ItemError, StorageError
from latentmill.plan import Unit
from latentmill.record import Record
from latentmill.storage import SCRATCH, Storage
from latentmill.store.commit import hash_of
from latentmill.store.schema import COMMITS, SHARDS, Commit
from latentmill.store.store import LatentStore


@dataclass(frozen=True)
class Decoded:
    """One record that was decoded back to audio.

    Attributes:
        key: The record's key.
        seconds: Length of the audio.
        level_db: Level of the decoded audio against the encoded one, dB.
        snr_db: Signal-to-noise ratio against the source's audio, dB; None if the source cannot
            be read here any more.
    """

    key: str
    seconds: float
    level_db: float | None
    snr_db: float | None


@dataclass
class Report:
    """What verification found: no faults means that the store is whole."""

    units: int = 0
    committed: int = 0
    items: int = 0
    records: int = 0
    faults: list[str] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)


def verify(store: LatentStore, *, decode: int = 0) -> Report:
    """Check a store: plan, commits, hashes, counts, numbers; decode some records back to audio.

    Args:
        store: The store.
        decode: How many records to decode, spread evenly over the store.
    """
    storage = Storage(store.url)
    plan, commits = store.plan, store.commits
    report = Report(units=len(plan.units), committed=len(commits), items=plan.num_items)
    wanted = fingerprint(plan.fingerprint)
    missing = [unit.name for unit in plan.units if unit.name not in commits]
    if missing:
        report.faults.append(
            f"{len(missing)} of {len(plan.units)} units are not committed (the first is "
            f"{missing[0]}): run the same encode command again"
        )
    keys = Counter(item.key for item in plan.items)
    report.faults += [
        f"{key} is in the plan {count} times" for key, count in keys.items() if count > 1
    ]
    for unit in plan.units:
        if commit := commits.get(unit.name):
            if commit.fingerprint != wanted:
                report.faults.append(f"commit {unit.name} has another fingerprint than the plan")
            report.faults += _unit_faults(storage, unit, commit)
            report.records += commit.rows
    report.faults += _strays(storage, commits)
    report.faults += _record_faults(store)
    if decode and not report.faults:
        keys_to_decode = list(store.keys())
        step = max(1, len(keys_to_decode) // decode)
        for key in keys_to_decode[::step][:decode]:
            _decode(store, key, report)
    return report


def _unit_faults(storage: Storage, unit: Unit, commit: Commit) -> Iterator[str]:
    planned = [item.key for item in unit.items]
    if planned != [item.key for item in commit.items]:
        yield f"commit {unit.name} does not list the items that the plan gives its unit"
    if commit.rows != commit.count("encoded"):
        yield f"commit {unit.name} counts {commit.rows} rows, {commit.count('encoded')} encoded"
    if commit.shard is None:
        return
    try:
        with storage.open(commit.shard) as file:
            if hash_of(file) != commit.hash:
                yield f"{commit.shard} does not match the hash in its commit"
    except StorageError as error:
        yield str(error)


def _strays(storage: Storage, commits: dict[str, Commit]) -> Iterator[str]:
    known = {commit.shard for commit in commits.values()}
    for name in storage.list(SHARDS):
        if f"{SHARDS}/{name}" not in known:
            yield f"{SHARDS}/{name} has no commit: it does not count, and running again replaces it"
    for name in storage.list(SCRATCH) if storage.local else {}:
        yield f"{SCRATCH}/{name} was left behind by a killed run: running again removes it"
    for name in storage.list(COMMITS):
        if name.removesuffix(".json") not in commits:
            yield f"{COMMITS}/{name} is no commit"


def _record_faults(store: LatentStore) -> Iterator[str]:
    for key in store.keys():  # noqa: SIM118  iterating the store gives records
        try:
            record = store[key]
        except StorageError as error:
            yield str(error)
            continue
        if not np.isfinite(record.latent).all():
            yield f"the latent of {key} holds NaN or Inf"
        if record.key != key:
            yield f"the record of {key} says that it is {record.key}"


def _decode(store: LatentStore, key: str, report: Report) -> None:
    record = store[key]
    audio = store.decode(key)  # [C, T]
    if audio.shape[1] != record.num_samples or not np.isfinite(audio).all():
        report.faults.append(f"{key} does not decode to {record.num_samples} finite samples")
        return
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    level = 20 * np.log10(rms / record.rms) if rms > 0 and record.rms > 0 else None
    report.decoded.append(
        Decoded(key, record.duration, None if level is None else float(level), _snr(record, audio))
    )


def _snr(record: Record, audio: Audio) -> float | None:
    try:
        source = read_source(record, channels=audio.shape[0])
    except ItemError:
        return None
    if source.shape != audio.shape:
        return None
    noise = np.square(source - audio, dtype=np.float64).sum()
    signal = np.square(source, dtype=np.float64).sum()
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None


def read_source(record: Record, channels: int) -> Audio:
    """The audio that a record was encoded from, as the model saw it, `[channels, samples]`.

    Raises:
        ItemError: The source is gone or has changed.
    """
    with open_media(record.source_uri) as media:
        if media.content_hash != record.content_hash:
            raise ItemError("the source has changed since it was encoded")
        stream = open_audio(media, allow_truncated=True)
        waveform = prepare(stream, sample_rate=record.sample_rate, channels=channels)
        audio: Audio = np.concatenate(list(waveform.blocks()), axis=1)
        return audio
