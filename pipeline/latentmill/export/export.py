"""Export of a store to the files of stable-audio-tools or to the other shard format."""

from __future__ import annotations

import dataclasses
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
from latentmill.errors import ConfigError, StoreError
from latentmill.ops import fit
from latentmill.plan import PLAN, Plan, copy, load
from latentmill.record import Outcome, Record, ShardFormat, time_major_bytes
from latentmill.storage.storage import SCRATCH, Storage, writing
from latentmill.store.bases import needs_copy
from latentmill.store.commit import (
    committed_revisions,
    iter_commits,
    next_revisions,
    read_commit,
    write_commit,
    write_unit,
)
from latentmill.store.field_layout import warn_of_fields
from latentmill.store.index import entries
from latentmill.store.measurement import NAMES, current_result, write_measurement
from latentmill.store.results import StoreStatistics
from latentmill.store.schema import COMMITS, SHARDS, Commit
from latentmill.store.seal import npy_bytes, read_origin, seal, write_origin
from latentmill.store.store import LatentStore
from latentmill.store.tidy import remove_unfinished, tidy, tidy_plan

# Metadata fields that may contain a caption; the first one that exists is used.
PROMPT_FIELDS = ("prompt", "caption", "text", "description", "title")
CONFIG_PATH = "dataset_config.json"
DETAILS_PATH = "details.json"
SILENCE_PATH = "silence.npy"
FILES_PATH = "filelist.txt"


class Target(StrEnum):
    """Formats that a store can be exported to."""

    STABLE_AUDIO_TOOLS = "stable-audio-tools"
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


@dataclass(frozen=True)
class ExportSummary:
    """Result of an export.

    Attributes:
        dest: Where the export is.
        to: Its format.
        records: Number of records written.
        failures: Keys of the records that the format cannot contain, with the reasons.
    """

    dest: str
    to: str
    records: int
    failures: tuple[tuple[str, str], ...] = ()


def export_store(
    store: LatentStore, dest: str, to: Target, *, frames: int | None = None
) -> ExportSummary:
    """Write a complete store's records for another tool, or as a store of another format.

    `dest` is a new folder or fsspec URL, or an earlier export of the same store, finished or
    interrupted, which is then updated. `frames` is for stable-audio-tools, whose batches need
    latents of one length: shorter latents are extended with silence to this many frames, and
    stable-audio-tools crops longer ones.
    """
    if store.bases is not None:
        raise needs_copy(store.url)
    if not store.complete:
        raise StoreError(
            f"{store.url} is not complete: finish the run that encodes it, then export it."
        )
    storage = Storage(dest)
    if f"{storage.root}/".startswith(f"{store.url}/"):
        raise ConfigError(f"{dest} is inside the store: use another destination.")
    warn_of_fields(store.storage, "the export")
    if to == Target.STABLE_AUDIO_TOOLS:
        return _stable_audio_tools(store, storage, frames)
    if frames is not None:
        raise ConfigError(f"--frames has no effect with --to {to}: leave it out.")
    return _converted(store, storage, "parquet" if to == Target.PARQUET else "webdataset")


def _converted(store: LatentStore, storage: Storage, format_name: ShardFormat) -> ExportSummary:
    """Export to a store of the other format, unit by unit, with the same plan and fingerprint.

    An earlier export of the store is updated: units whose records have not changed are kept.
    """
    plan = dataclasses.replace(store.plan, format=format_name)
    source = Storage(store.url)
    if load(storage) is None:  # checked before the lock, which writes a file
        refuse_unless_empty(storage)
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
        for name in NAMES.values():
            if (result := current_result(source, store.info, name)) is not None:
                if isinstance(result, StoreStatistics):  # the file of vectors is not copied
                    result = result.model_copy(update={"vectors": None})
                write_measurement(storage, sealed, result)
    new_failures = [
        (item.key, item.reason or "")
        for commit in iter_commits(storage)
        for item in commit.items
        if item.status == "failed" and item.key in store
    ]
    return ExportSummary(storage.root, format_name, sealed.encoded, tuple(new_failures))


def _follow_plan(storage: Storage, plan: Plan, source: Storage) -> None:
    """Copy the store's plan to a new export, or to an earlier one if the plan has changed.

    Raises `ConfigError` if the destination has anything else.
    """
    existing = load(storage)
    if existing is None:
        refuse_unless_empty(storage)
        copy(plan, source, storage)
        return
    names = ("source", "fingerprint", "format", "model", "model_options")
    if any(getattr(existing, name) != getattr(plan, name) for name in names):
        raise ConfigError(f"{storage.root} is another store: use an empty destination.")
    if existing != plan:
        copy(plan, source, storage)


def _copy_units(store: LatentStore, storage: Storage, plan: Plan) -> None:
    """Copy the records of all units that have not been copied or have changed since then."""
    info = {
        "model": plan.fingerprint["model"],
        "dtype": store.info.dtype,
        "layout": store.info.layout,
        "fingerprint": store.info.fingerprint,
    }
    annotation = store.info.annotation  # whose values are copied with the records
    suffix = "" if annotation is None else f"+{annotation.hashes[-1]}"
    done, revisions = committed_revisions(storage), next_revisions(storage)
    sizes = storage.list(SHARDS)
    for commit in iter_commits(Storage(store.url)):
        unit = commit.unit
        origin = None if commit.hash is None else f"{commit.hash}{suffix}"
        if unit in done and _is_copy(read_commit(storage, unit, done[unit]), commit, origin, sizes):
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
        update = {"items_hash": commit.items_hash, "copied_from": origin}
        write_commit(storage, new.model_copy(update=update), commit.timings)


def _is_copy(
    existing: Commit, commit: Commit, origin: str | None, sizes: Mapping[str, int]
) -> bool:
    """Whether an export's commit has the same records and its shard is complete."""
    whole = existing.shard is None or sizes.get(existing.shard.rpartition("/")[2]) == existing.bytes
    same = (existing.copied_from, existing.items_hash) == (origin, commit.items_hash)
    pairs = itertools.zip_longest(existing.items, commit.items)
    return (
        whole
        and same
        and all(
            a is not None
            and b is not None
            and a.key == b.key
            # A record that the format cannot contain fails in the export only.
            and (b.status == "encoded" or (a.status, a.reason) == (b.status, b.reason))
            for a, b in pairs
        )
    )


def _outcomes(store: LatentStore, commit: Commit) -> Iterator[Outcome]:
    """The outcomes of a unit's items, with the records in its shard."""
    places = entries(commit)
    for item in commit.items:
        record = store.read(next(places)) if item.status == "encoded" else None
        yield Outcome(item.key, item.status, item.reason, record)


def _stable_audio_tools(store: LatentStore, storage: Storage, frames: int | None) -> ExportSummary:
    """Write the files that `PreEncodedDataset` of stable-audio-tools and Stable Audio 3 reads.

    These are KEY.npy `[C, T]` and KEY.json; `silence.npy` `[1, C, T]`, with which Stable Audio 3
    pads; the list of the files, without which older versions would read `silence.npy` as an item.
    The configuration for `train.py --dataset-config` is written last.
    """
    if store.chunking.stitch == "none" or store.origin.codes:
        what = "codes" if store.origin.codes else "overlapping chunks (stitch none)"
        raise ConfigError(
            f"{store.url} contains {what}, but stable-audio-tools trains on one latent per item: "
            "export another store."
        )
    if ".npy" in storage.root:  # its reader replaces .npy in the whole path by .json
        raise ConfigError(f"{storage.root} has .npy in its name: use another name.")
    earlier = _begin_files(store, storage)
    names: list[str] = []
    failures: list[tuple[str, str]] = []
    for commit in iter_commits(Storage(store.url)):
        for outcome in _outcomes(store, commit):
            name = file_name(outcome.key)
            longest = max(len(os.fsencode(part)) for part in f"{name}.json".split("/"))
            if storage.local and longest > LONGEST_NAME:
                failures.append((outcome.key, "its file name would have more than 255 bytes"))
            elif outcome.record is not None:
                _write_sample(store, storage, name, outcome.record, frames)
                names.append(f"{name}.npy")
            elif earlier:
                for end in (".json", ".npy"):
                    storage.delete(f"{name}{end}")
    _write(storage, SILENCE_PATH, npy_bytes(_silence(store, frames)[None]))
    _write(storage, FILES_PATH, "".join(f"{name}\n" for name in names).encode())
    config = {
        "dataset_type": "pre_encoded",
        "datasets": [{"id": "latentmill", "path": storage.root}],
        "random_crop": True,
    }
    cropped = {} if frames is None else {"latent_crop_length": frames}
    _write(storage, CONFIG_PATH, json.dumps(config | cropped).encode())
    return ExportSummary(storage.root, Target.STABLE_AUDIO_TOOLS, len(names), tuple(failures))


def _begin_files(store: LatentStore, storage: Storage) -> bool:
    """Write details.json; return whether it updates an earlier export of the same latents.

    Raises `ConfigError` if the destination has anything else.
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
        refuse_unless_empty(storage)
    else:
        try:
            fingerprint = parse_json(text)["fingerprint"]
        except (ValueError, TypeError, LookupError):
            fingerprint = None
        if fingerprint != store.info.fingerprint:
            raise ConfigError(
                f"{storage.root} is an export of another store: use another destination."
            )
    storage.write(DETAILS_PATH, json.dumps(details).encode())
    return text is not None


def _write_sample(
    store: LatentStore, storage: Storage, name: str, record: Record, frames: int | None
) -> None:
    """Write a record's two files, the JSON file last, unless both are complete and unchanged."""
    latent, info = _stable_audio_sample(store, record, frames)
    data, digest = npy_bytes(latent), xxhash.xxh3_64_hexdigest(time_major_bytes(record.latent))
    text = json.dumps({**info, "latent_hash": digest}).encode()
    file = Path(storage.full(f"{name}.npy"))
    whole = not storage.local or (file.exists() and file.stat().st_size == len(data))
    if whole and storage.read_if_exists(f"{name}.json") == text:
        return
    _write(storage, f"{name}.npy", data)
    _write(storage, f"{name}.json", text)


def _silence(store: LatentStore, frames: int | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The latent of silence, as long as the longest sample; for a posterior only its means."""
    longest = int(store.index.column("frames").max()) if len(store) else 1
    origin = store.origin
    silence = origin.of_length(max(longest, frames or 1))
    return silence[: len(silence) - origin.deviations].astype(np.float32)


def _stable_audio_sample(
    store: LatentStore, record: Record, frames: int | None
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], dict[str, Any]]:
    """A record's latent, float32 `[C, T]` (for a posterior only its means), and its JSON."""
    origin = store.origin
    length = max(record.frames, frames or 0)
    latent = fit(record.latent, length, origin=origin)
    means = len(latent) - origin.deviations
    padding = length - record.frames
    # The reader of stable-audio-tools interprets names with __ as commands.
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
    """Convert a key to a file path without extension; `urllib.parse.unquote` restores the key.

    Names that would confuse a reader are escaped: hidden names, `..`, `.npy`, and the names of the
    export's own files.
    """
    name = key.replace("%", "%25").replace("\0", "%00").replace(".npy", "%2Enpy")
    name = re.sub(r"(?<=/)/|^/|/$", "%2F", name)
    # The list of files has one file per line; its reader strips whitespace.
    name = re.sub(r"[\x00-\x1f\x7f]|^\s", lambda match: quote(match[0]), name)
    folder, slash, last = name.rpartition("/")
    # Stable Audio 3 reads silence.npy in any folder as the latent to pad with.
    if last == "silence" or f"{name}.json" in (CONFIG_PATH, DETAILS_PATH):
        name = f"{folder}{slash}%{ord(last[0]):02X}{last[1:]}"
    return re.sub(r"(?<![^/])\.", "%2E", name)


def refuse_unless_empty(storage: Storage) -> None:
    """Raise `ConfigError` unless a destination is empty.

    It may contain the files of an export that was interrupted before it wrote its plan.
    """
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
        raise ConfigError(f"{storage.root} is not empty: use another destination.")


def _write(storage: Storage, path: str, data: bytes) -> None:
    """Write a file, without a temporary file first: there are many, and all are rechecked later."""
    if not storage.local:
        storage.write(path, data)
        return
    file = Path(storage.full(path))
    with writing(str(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
