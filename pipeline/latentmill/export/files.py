"""Writing the files of a layout, for a store that may have been exported before."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from latentmill.decoding.files import LONGEST_NAME
from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, ItemError
from latentmill.export.conversion import outcomes, refuse_unless_empty
from latentmill.export.layout import Layout
from latentmill.plan import iter_keys
from latentmill.record import FloatArray, Outcome, Record
from latentmill.storage.storage import Storage, writing
from latentmill.store.commit import iter_commits
from latentmill.store.left_out import read_left_out
from latentmill.store.store import LatentStore

DETAILS_PATH = "details.json"


@dataclass
class Written:
    """What was written.

    Attributes:
        names: The names of the samples.
        escaped: Number of names that differ from the keys of their items.
        failures: Keys of the records that the tool cannot read, with the reasons.
    """

    names: list[str] = field(default_factory=list)
    escaped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def write_files(layout: Layout, storage: Storage) -> Written:
    """Write the files of all records, and remove those of items that have no record any more."""
    earlier, written = _begin(layout, storage), Written()
    for outcome in _outcomes(layout.store):
        name = layout.name(outcome.key)
        paths = layout.paths(name)
        longest = max(len(os.fsencode(part)) for path in paths for part in path.split("/"))
        if storage.local and longest > LONGEST_NAME:
            if outcome.record is not None:
                reason = "its file name would have more than 255 bytes"
                written.failures.append((outcome.key, reason))
            continue
        if outcome.record is not None:
            try:
                _write_sample(layout, storage, paths, outcome.record)
                written.names.append(name)
                written.escaped += name != outcome.key
                continue
            except ItemError as error:
                written.failures.append((outcome.key, str(error)))
        if earlier:
            for path in reversed(paths):
                storage.delete(path)
    for path, data in layout.last(written.names).items():
        _write(storage, path, data)
    return written


def _outcomes(store: LatentStore) -> Iterator[Outcome]:
    """The outcomes of all items of a store, or of all records of a view's bases."""
    if store.bases is None:
        for commit in iter_commits(Storage(store.url)):
            yield from outcomes(store, commit)
        return
    for record in store:
        yield Outcome(record.key, "encoded", record=record)
    for key in read_left_out(store)["key"].to_pylist():
        yield Outcome(key, "skipped", "left out of the view")


def _begin(layout: Layout, storage: Storage) -> bool:
    """Write details.json; return whether it updates an earlier export of the same store.

    Raises `ConfigError` if the destination has anything else.
    """
    info = layout.store.info
    identity = _identity(layout.store)
    names = ("name", "sample_rate", "hop", "latent_channels", "scale_factor")
    details = {
        "store": layout.store.url,
        "identity": identity,
        "fingerprint": info.fingerprint,
        "model": {name: info.model[name] for name in names},
        "layout": layout.tool,
        "fields": {role: store.url for role, store in layout.fields.items()},
    }
    text = storage.read_if_exists(DETAILS_PATH)
    if text is None:
        refuse_unless_empty(storage)
    else:
        _check_earlier(layout, storage.root, text, identity)
    storage.write(DETAILS_PATH, json.dumps(details).encode())
    return text is not None


def _identity(store: LatentStore) -> list[str]:
    """Hashes that tell a store from others, also after it was moved or extended.

    A view has two, for its address and its records: it is the same one if it was moved or if it was
    written again with other records, but not if both.
    """
    if store.bases is not None:
        bases = [f"{base.prefix}\n{base.url}" for base in store.bases.entries]
        return [_hash([last, *bases]) for last in (store.url, store.info.seal or "")]
    first = store.plan.units[: store.plan.parts[0].units]
    keys = iter_keys(store.storage, replace(store.plan, units=first))
    settings = json.dumps(store.plan.source_settings, sort_keys=True)  # of a copy: its records
    return [_hash(itertools.chain([store.plan.source, settings], keys))]


def _hash(texts: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(f"{text}\0".encode())
    return digest.hexdigest()


def _check_earlier(layout: Layout, dest: str, details: bytes, identity: Sequence[str]) -> None:
    """Raise ConfigError unless details.json is that of an export of the store and its fields."""
    try:
        earlier = parse_json(details)
        fingerprint, tool = earlier["fingerprint"], earlier.get("layout", layout.tool)
        roles = set(earlier.get("fields", ()))
        same = earlier["store"] == layout.store.url  # earlier versions wrote no identity
        if "identity" in earlier:
            same = not set(earlier["identity"]).isdisjoint(identity)
    except (ValueError, TypeError, LookupError, AttributeError):
        fingerprint, tool, roles, same = None, None, set(), False
    if not same or (fingerprint, tool) != (layout.store.info.fingerprint, layout.tool):
        raise ConfigError(f"{dest} is an export of another store: use another destination.")
    if roles != set(layout.fields):
        names = ", ".join(sorted(roles)) or "no fields"
        raise ConfigError(
            f"{dest} is an export with {names}: use the same --fields, or another destination."
        )


def _write_sample(layout: Layout, storage: Storage, paths: Sequence[str], record: Record) -> None:
    """Write those of a record's files that are not complete or have changed, the last one last."""
    values = {role: _value(store, record.key) for role, store in layout.fields.items()}
    contents = dict(zip(paths, layout.contents(record, values), strict=True))
    last = paths[-1]
    # The hash in the last file tells whether the others have changed, if that one has not.
    hashed = layout.hashed and _same(storage, last, contents[last])
    for path, data in contents.items():
        if not _same(storage, path, data, size_only=hashed):
            _write(storage, path, data)


def _value(store: LatentStore, key: str) -> FloatArray:
    """The value of a field, float32 `[D, n]`. ItemError if it has none."""
    if key not in store:
        raise ItemError(f"field {store.url.rpartition('/')[2]!r} has no value for it")
    return store[key].latent.astype(np.float32)


def _same(storage: Storage, path: str, data: bytes, *, size_only: bool = False) -> bool:
    """Whether a file has this content; with `size_only`, whether it can have it."""
    if not size_only:
        return storage.read_if_exists(path) == data
    file = Path(storage.full(path))
    return not storage.local or (file.exists() and file.stat().st_size == len(data))


def _write(storage: Storage, path: str, data: bytes) -> None:
    """Write a file, without a temporary file first: there are many, and all are rechecked later."""
    if not storage.local:
        storage.write(path, data)
        return
    file = Path(storage.full(path))
    with writing(str(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
