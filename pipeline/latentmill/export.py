"""A store for other tools: stable-audio-tools' files, or a store of the other shard format."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.ops import fit
from latentmill.plan import Plan, copy, load
from latentmill.record import Outcome, Record
from latentmill.storage import Storage
from latentmill.store.commit import committed_units, iter_commits, write_commit, write_unit
from latentmill.store.index import entries
from latentmill.store.measurement import MEASURED, write_measurement
from latentmill.store.schema import COMMITS, SHARDS, Commit
from latentmill.store.seal import read_origin, seal, write_origin
from latentmill.store.store import LatentStore

# Metadata that stands for a caption, the first one that is there.
PROMPT_FIELDS = ("prompt", "caption", "text", "description", "title")
CONFIG_PATH = "dataset_config.json"
DETAILS_PATH = "details.json"

LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""


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
        dest: A folder or fsspec URL: new, or for a store one that an interrupted export began.
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
        raise ConfigError(f"Option --frames has no meaning for {to}: leave it out.")
    return _converted(store, storage, "parquet" if to == Target.PARQUET else "webdataset")


def _converted(
    store: LatentStore, storage: Storage, format_name: Literal["parquet", "webdataset"]
) -> ExportSummary:
    """A store of the other format: the same plan, unit by unit, with the same fingerprint."""
    plan = dataclasses.replace(store.plan, format=format_name)
    _begin(storage, plan, Storage(store.url))
    write_origin(storage, read_origin(Storage(store.url)))
    info = {
        "model": plan.fingerprint["model"],
        "dtype": store.info.dtype,
        "layout": store.info.layout,
        "fingerprint": store.info.fingerprint,
    }
    done = set(committed_units(storage))
    for commit in iter_commits(Storage(store.url)):
        if commit.unit in done:
            continue
        new = write_unit(
            storage,
            commit.unit,
            _outcomes(store, commit),
            format_name=format_name,
            fingerprint=commit.fingerprint,
            info=info,
        )
        new = new.model_copy(update={"items_hash": commit.items_hash})
        write_commit(storage, new, commit.timings)
    sealed = seal(storage, plan)
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


def _begin(storage: Storage, plan: Plan, source: Storage) -> None:
    """Freeze the plan in a new store, or find it there."""
    there = load(storage)
    if there is None:
        _refuse_unless_empty(storage)
        copy(plan, source, storage)
    elif there != plan:
        raise ConfigError(f"{storage.root} is another store: choose an empty place.")


def _outcomes(store: LatentStore, commit: Commit) -> Iterator[Outcome]:
    """What became of a unit's items, with the records that its shard holds."""
    places = entries(commit)
    for item in commit.items:
        record = store.read(next(places)) if item.status == "encoded" else None
        yield Outcome(item.key, item.status, item.reason, record)


def _stable_audio_tools(store: LatentStore, storage: Storage, frames: int | None) -> ExportSummary:
    """What `PreEncodedDataset` of stable-audio-tools reads: KEY.npy `[C, T]` and KEY.json.

    Its configuration for `train.py --dataset-config` is written last.
    """
    if store.chunking.stitch == "none" or store.origin.codes:
        what = "codes" if store.origin.codes else "overlapping chunks (stitch none)"
        raise ConfigError(
            f"{store.url} holds {what}, and stable-audio-tools trains on one latent for each item."
        )
    if ".npy" in storage.root:  # it replaces that in the whole path to find the JSON file
        raise ConfigError(f"{storage.root} has .npy in its name: choose another one.")
    _refuse_unless_empty(storage)
    model = store.info.model
    names = ("name", "sample_rate", "hop", "latent_channels", "scale_factor")
    details = {"store": store.url, "model": {name: model[name] for name in names}}
    _write_json(storage, DETAILS_PATH, details)
    failures = []
    for record in store:
        name = file_name(record.key)
        if storage.local and _too_long(f"{name}.json"):
            failures.append((record.key, "its file name would have more than 255 bytes"))
            continue
        latent, info = _stable_audio_sample(store, record, frames)
        buffer = io.BytesIO()
        np.save(buffer, latent, allow_pickle=False)
        _write(storage, f"{name}.npy", buffer.getvalue())
        _write_json(storage, f"{name}.json", info)
    config = {
        "dataset_type": "pre_encoded",
        "datasets": [{"id": "latentmill", "path": storage.root}],
        "random_crop": True,
    }
    cropped = {} if frames is None else {"latent_crop_length": frames}
    _write_json(storage, CONFIG_PATH, config | cropped)
    written = len(store) - len(failures)
    return ExportSummary(storage.root, Target.STABLE_AUDIO_TOOLS, written, tuple(failures))


def _too_long(path: str) -> bool:
    """Whether a part of a path is longer than file systems allow."""
    return any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/"))


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
    if f"{name}.json" in (CONFIG_PATH, DETAILS_PATH):
        return f"%{ord(name[0]):02X}{name[1:]}"
    return re.sub(r"(?<![^/])\.", "%2E", name)


def _refuse_unless_empty(storage: Storage) -> None:
    if storage.local:
        folder = Path(storage.root)
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    else:
        used = any(storage.list(folder) for folder in ("", SHARDS, COMMITS))
    if used:
        raise ConfigError(f"{storage.root} is not empty: choose another place.")


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
