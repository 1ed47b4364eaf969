"""A store for other tools: stable-audio-tools' files, or a store of the other shard format."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xxhash

from latentmill.decoding.files import LONGEST_NAME
from latentmill.encoding.stored import parse_json
from latentmill.engine.lease import LEASE_PATH
from latentmill.engine.lock import LOCK_PATH, only_run
from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.ops import fit
from latentmill.plan import PLAN, Plan, copy, load
from latentmill.record import Outcome, Record, ShardFormat, time_major_bytes
from latentmill.storage.storage import SCRATCH, Storage
from latentmill.store.commit import (
    committed_revisions,
    iter_commits,
    next_revisions,
    read_commit,
    write_commit,
    write_unit,
)
from latentmill.store.index import entries
from latentmill.store.measurement import MEASURED, write_measurement
from latentmill.store.schema import COMMITS, SHARDS, Commit
from latentmill.store.seal import read_origin, seal, write_origin
from latentmill.store.store import LatentStore
from latentmill.store.tidy import remove_unfinished, tidy, tidy_plan

# Metadata that stands for a caption, the first one that is there.
PROMPT_FIELDS = ("prompt", "caption", "text", "description", "title")
CONFIG_PATH = "dataset_config.json"
DETAILS_PATH = "details.json"
SILENCE_PATH = "silence.npy"
FILES_PATH = "filelist.txt"


class Target(StrEnum):
    """What a store can be exported to."""

    STABLE_AUDIO_TOOLS = "stable-audio-tools"
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


@dataclass(frozen=True)
class ExportSummary:
    """What was exported.

    Attributes:
        dest: Where it lies.
        to: What it is for.
        records: Records that were written.
        failures: Keys of those that the target cannot hold, with the reasons.
    """

    dest: str
    to: str
    records: int
    failures: tuple[tuple[str, str], ...] = ()


def export_store(
    store: LatentStore, dest: str, to: Target, *, frames: int | None = None
) -> ExportSummary:
    """Write a complete store's records for another tool, or as a store of another format.

    Args:
        store: The store; it is not changed.
        dest: A folder or fsspec URL: new, or that of an earlier export of the same store, which is
            then brought up to date, whether it was finished or interrupted.
        to: What to write.
        frames: For stable-audio-tools, whose batches need latents of one length: shorter latents
            are continued by silence to this many frames, longer ones are for it to crop.

    Raises:
        ConfigError: The destination is not empty, or the store does not fit the target.
        StoreError: The store is not complete.
        StorageError: Reading or writing failed.
    """
    if not store.complete:
        raise StoreError(f"{store.url} is not complete: finish its run before you export it.")
    storage = Storage(dest)
    if f"{storage.root}/".startswith(f"{store.url}/"):
        raise ConfigError(f"{dest} lies in the store itself: choose another place.")
    if to == Target.STABLE_AUDIO_TOOLS:
        return _stable_audio_tools(store, storage, frames)
    if frames is not None:
        raise ConfigError(f"--frames has no effect with --to {to}: leave it out.")
    return _converted(store, storage, "parquet" if to == Target.PARQUET else "webdataset")


def _converted(store: LatentStore, storage: Storage, format_name: ShardFormat) -> ExportSummary:
    """A store of the other format: the same plan, unit by unit, with the same fingerprint.

    An earlier export of the store is brought up to date: units whose records are still those that
    were copied stay as they are.
    """
    plan = dataclasses.replace(store.plan, format=format_name)
    source = Storage(store.url)
    if load(storage) is None:  # looked at before the lock, which leaves a file
        _refuse_unless_empty(storage)
    with only_run(storage) as hold:
        storage = hold.storage
        _follow_plan(storage, plan, source)
        tidy_plan(storage, plan)
        tidy(storage)
        storage.clear_scratch()
        write_origin(storage, read_origin(source))
        _copy_units(store, storage, plan)
        sealed = seal(storage, plan)
        remove_unfinished(storage)
        for name in MEASURED:
            if (result := getattr(store.measured_info, name)) is not None:
                write_measurement(storage, sealed, result)
    new_failures = [
        (item.key, item.reason or "")
        for commit in iter_commits(storage)
        for item in commit.items
        if item.status == "failed" and item.key in store
    ]
    return ExportSummary(storage.root, format_name, sealed.encoded, tuple(new_failures))


def _follow_plan(storage: Storage, plan: Plan, source: Storage) -> None:
    """Write the store's plan into a new place, or into an earlier export, if it has changed since.

    Raises:
        ConfigError: There is something else.
    """
    there = load(storage)
    if there is None:
        _refuse_unless_empty(storage)
        copy(plan, source, storage)
        return
    names = ("source", "fingerprint", "format", "model", "model_options")
    if any(getattr(there, name) != getattr(plan, name) for name in names):
        raise ConfigError(f"{storage.root} is another store: choose an empty place.")
    if there != plan:
        copy(plan, source, storage)


def _copy_units(store: LatentStore, storage: Storage, plan: Plan) -> None:
    """Copy the records of all units that are not copied yet, or have changed since."""
    info = {
        "model": plan.fingerprint["model"],
        "dtype": store.info.dtype,
        "layout": store.info.layout,
        "fingerprint": store.info.fingerprint,
    }
    done, revisions = committed_revisions(storage), next_revisions(storage)
    sizes = storage.list(SHARDS)
    for commit in iter_commits(Storage(store.url)):
        unit = commit.unit
        if unit in done and _is_copy(read_commit(storage, unit, done[unit]), commit, sizes):
            continue
        new = write_unit(
            storage,
            unit,
            _outcomes(store, commit),
            format_name=plan.format,
            fingerprint=commit.fingerprint,
            info=info,
            revision=revisions.get(unit, 0),
        )
        update = {"items_hash": commit.items_hash, "copied_from": commit.hash}
        write_commit(storage, new.model_copy(update=update), commit.timings)


def _is_copy(there: Commit, commit: Commit, sizes: Mapping[str, int]) -> bool:
    """Whether an export's commit is of these records, and its shard is there in full."""
    whole = there.shard is None or sizes.get(there.shard.rpartition("/")[2]) == there.bytes
    same = (there.copied_from, there.items_hash) == (commit.hash, commit.items_hash)
    pairs = itertools.zip_longest(there.items, commit.items)
    return (
        whole
        and same
        and all(
            a is not None
            and b is not None
            and a.key == b.key
            # A record that the format cannot hold is the export's own failure.
            and (b.status == "encoded" or (a.status, a.reason) == (b.status, b.reason))
            for a, b in pairs
        )
    )


def _outcomes(store: LatentStore, commit: Commit) -> Iterator[Outcome]:
    """What became of a unit's items, with the records that its shard holds."""
    places = entries(commit)
    for item in commit.items:
        record = store.read(next(places)) if item.status == "encoded" else None
        yield Outcome(item.key, item.status, item.reason, record)


def _stable_audio_tools(store: LatentStore, storage: Storage, frames: int | None) -> ExportSummary:
    """What `PreEncodedDataset` of stable-audio-tools and Stable Audio 3 reads.

    KEY.npy `[C, T]` and KEY.json; `silence.npy` `[1, C, T]`, by which Stable Audio 3 pads; the list
    of the files, as older versions would take that for an item. The configuration for
    `train.py --dataset-config` is written last.
    """
    if store.chunking.stitch == "none" or store.origin.codes:
        what = "codes" if store.origin.codes else "overlapping chunks (stitch none)"
        raise ConfigError(
            f"{store.url} holds {what}, and stable-audio-tools trains on one latent for each item."
        )
    if ".npy" in storage.root:  # it replaces that in the whole path to find the JSON file
        raise ConfigError(f"{storage.root} has .npy in its name: choose another one.")
    earlier = _begin_files(store, storage)
    names: list[str] = []
    failures: list[tuple[str, str]] = []
    for commit in iter_commits(Storage(store.url)):
        for outcome in _outcomes(store, commit):
            name = file_name(outcome.key)
            if storage.local and _too_long(f"{name}.json"):
                failures.append((outcome.key, "its file name would have more than 255 bytes"))
            elif outcome.record is not None:
                _write_sample(store, storage, name, outcome.record, frames)
                names.append(f"{name}.npy")
            elif earlier:
                for end in (".json", ".npy"):
                    storage.delete(f"{name}{end}")
    _write(storage, SILENCE_PATH, _npy(_silence(store, frames)[None]))
    _write(storage, FILES_PATH, "".join(f"{name}\n" for name in names).encode())
    config = {
        "dataset_type": "pre_encoded",
        "datasets": [{"id": "latentmill", "path": storage.root}],
        "random_crop": True,
    }
    cropped = {} if frames is None else {"latent_crop_length": frames}
    _write_json(storage, CONFIG_PATH, config | cropped)
    return ExportSummary(storage.root, Target.STABLE_AUDIO_TOOLS, len(names), tuple(failures))


def _too_long(path: str) -> bool:
    """Whether a part of a path is longer than file systems allow."""
    return any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/"))


def _begin_files(store: LatentStore, storage: Storage) -> bool:
    """Write what the files are of; whether an earlier export of the same latents is there.

    Raises:
        ConfigError: There is something else.
    """
    model = store.info.model
    names = ("name", "sample_rate", "hop", "latent_channels", "scale_factor")
    details = {
        "store": store.url,
        "fingerprint": store.info.fingerprint,
        "model": {name: model[name] for name in names},
    }
    text = storage.read_if_exists(DETAILS_PATH)
    if text is None:
        _refuse_unless_empty(storage)
    else:
        try:
            fingerprint = parse_json(text)["fingerprint"]
        except (ValueError, TypeError, LookupError):
            fingerprint = None
        if fingerprint != store.info.fingerprint:
            raise ConfigError(
                f"{storage.root} is an export of another store: choose another place."
            )
    storage.write(DETAILS_PATH, json.dumps(details).encode())
    return text is not None


def _write_sample(
    store: LatentStore, storage: Storage, name: str, record: Record, frames: int | None
) -> None:
    """Write a record's two files, the JSON last, unless both are there as they should be."""
    latent, info = _stable_audio_sample(store, record, frames)
    data, digest = _npy(latent), xxhash.xxh3_64_hexdigest(time_major_bytes(record.latent))
    text = json.dumps({**info, "latent_hash": digest}).encode()
    whole = not storage.local or _size(storage, f"{name}.npy") == len(data)
    if whole and storage.read_if_exists(f"{name}.json") == text:
        return
    _write(storage, f"{name}.npy", data)
    _write(storage, f"{name}.json", text)


def _silence(store: LatentStore, frames: int | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The latent of silence, as long as anything that may be padded; of a posterior the means."""
    longest = int(store.index.column("frames").max()) if len(store) else 1
    origin = store.origin
    silence = origin.of_length(max(longest, frames or 1))
    return silence[: len(silence) - origin.deviations].astype(np.float32)


def _stable_audio_sample(
    store: LatentStore, record: Record, frames: int | None
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], dict[str, Any]]:
    """A latent, float32 `[C, T]` (of a posterior the means), and what is said of it."""
    origin = store.origin
    length = max(record.frames, frames or 0)
    latent = fit(record.latent, length, origin=origin)
    means = len(latent) - origin.deviations
    padding = length - record.frames
    # Names with __ would be orders to its reader.
    own = {name: value for name, value in record.metadata.items() if not name.startswith("__")}
    captions = (own[name] for name in PROMPT_FIELDS if isinstance(own.get(name), str))
    return latent[:means], {
        **own,
        "prompt": next(captions, ""),
        "seconds_start": 0.0,
        "seconds_total": record.duration,
        "padding_mask": [1] * record.frames + [0] * padding,
        "sample_rate": record.sample_rate,
        "path": record.source_uri,
        "relpath": record.key,
    }


def file_name(key: str) -> str:
    """A key as a file's path without extension; `urllib.parse.unquote` gives the key back.

    Escaped is what a reader would stumble over: hidden names, a way out of the folder, `.npy`, and
    the names of the export's own files.
    """
    name = key.replace("%", "%25").replace("\0", "%00").replace(".npy", "%2Enpy")
    name = re.sub(r"(?<=/)/|^/|/$", "%2F", name)
    # The list of files has one on each line, without spaces around it.
    name = re.sub(r"[\x00-\x1f\x7f]|^\s", lambda match: quote(match[0]), name)
    folder, slash, last = name.rpartition("/")
    # Stable Audio 3 takes silence.npy in any folder for what it pads with.
    if last == "silence" or f"{name}.json" in (CONFIG_PATH, DETAILS_PATH):
        name = f"{folder}{slash}%{ord(last[0]):02X}{last[1:]}"
    return re.sub(r"(?<![^/])\.", "%2E", name)


def _refuse_unless_empty(storage: Storage) -> None:
    """Refuse a place that holds anything but what an export leaves that ended before its plan."""
    if storage.local:
        folder = Path(storage.root)
        left = {SCRATCH, PLAN, LOCK_PATH}
        used = folder.exists() and (
            not folder.is_dir() or any(entry.name not in left for entry in folder.iterdir())
        )
    else:
        files = set(storage.list("")) - {LEASE_PATH}
        used = bool(files) or any(storage.list(folder) for folder in (SHARDS, COMMITS))
    if used:
        raise ConfigError(f"{storage.root} is not empty: choose another place.")


def _npy(array: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _size(storage: Storage, path: str) -> int | None:
    try:
        return Path(storage.full(path)).stat().st_size
    except OSError:
        return None


def _write_json(storage: Storage, path: str, value: object) -> None:
    _write(storage, path, json.dumps(value).encode())


def _write(storage: Storage, path: str, data: bytes) -> None:
    """Write a file: many small ones, which need no place of their own while they are written."""
    if not storage.local:
        storage.write(path, data)
        return
    file = Path(storage.full(path))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise StorageError(f"Cannot write {file}: {error.strerror}.") from error
