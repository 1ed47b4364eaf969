"""Writing the files of a layout, for a store that may have been exported before."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from latentmill.decoding.files import LONGEST_NAME
from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, ItemError, StorageError, is_damaged_shard
from latentmill.export.conversion import refuse_unless_empty
from latentmill.export.layout import Layout
from latentmill.plan import iter_keys
from latentmill.record import FloatArray, Record
from latentmill.storage.storage import Storage, writing
from latentmill.store.commit import iter_commits
from latentmill.store.describe import is_there
from latentmill.store.index import IndexEntry, entries
from latentmill.store.left_out import read_left_out
from latentmill.store.prefetch import prefetched
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore

DETAILS_PATH = "details.json"
_BATCH = 4096  # records of a view whose places are in memory


@dataclass
class Written:
    """Result of writing the files of an export.

    Attributes:
        names: The names of the samples.
        escaped: Number of names that differ from the keys of their items.
        failures: Keys of the records that the tool cannot read, with the reasons.
    """

    names: list[str] = field(default_factory=list)
    escaped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def write_files(layout: Layout, storage: Storage) -> Written:
    """Write the files of all records, and remove those of items that have no record any more.

    The files of a record whose shard is damaged or missing stay as they are; it is a failure.
    """
    earlier, written = _begin(layout, storage), Written()
    for key, entry, values in _samples(layout):
        name = layout.name(key)
        paths = layout.paths(name)
        longest = max(len(os.fsencode(part)) for path in paths for part in path.split("/"))
        if storage.local and longest > LONGEST_NAME:
            if entry is not None:
                written.failures.append((key, "its file name would have more than 255 bytes"))
            continue
        if entry is not None:
            try:
                record, by_role = _read_sample(layout, entry, values)
            except StorageError as error:
                if not is_damaged_shard(error) or not is_there(layout.store):
                    raise
                written.failures.append((key, str(error)))
                continue
            try:
                _write_sample(layout, storage, paths, record, by_role)
                written.names.append(name)
                written.escaped += name != key
                continue
            except ItemError as error:
                written.failures.append((key, str(error)))
        if earlier:
            for path in reversed(paths):
                storage.delete(path)
    for path, data in layout.last(written.names).items():
        _write(storage, path, data)
    return written


def _samples(layout: Layout) -> Iterator[tuple[str, IndexEntry | None, list[IndexEntry | None]]]:
    """The keys of all items, and where the records are in the store and in its fields."""
    for keys, part in _parts(layout.store):
        columns = [_entries(field, keys) for field in layout.fields.values()]
        for key, entry in part:
            yield key, entry, [] if entry is None else [next(column) for column in columns]


def _parts(
    store: LatentStore,
) -> Iterator[tuple[list[str], Iterator[tuple[str, IndexEntry | None]]]]:
    """The items of each unit of a store, or of a view's bases, and the keys of the records."""
    if store.bases is None:
        for commit in iter_commits(Storage(store.url)):
            found = prefetched(store, entries(commit))
            keys = [item.key for item in commit.items if item.status == "encoded"]
            yield keys, _items(commit, found)
        return
    for start in range(0, len(store), _BATCH):
        chosen = [store.index.entry(n) for n in range(start, min(start + _BATCH, len(store)))]
        keys = [entry.key for entry in chosen]
        yield keys, zip(keys, prefetched(store, chosen), strict=True)
    left_out = read_left_out(store)["key"].to_pylist()
    yield [], ((key, None) for key in left_out)


def _items(commit: Commit, found: Iterator[IndexEntry]) -> Iterator[tuple[str, IndexEntry | None]]:
    for item in commit.items:
        yield item.key, next(found) if item.status == "encoded" else None


def _entries(field: LatentStore, keys: Sequence[str]) -> Iterator[IndexEntry | None]:
    """Where a field has the values of items; None for an item that has none."""
    positions = [field.index.find(key) for key in keys]
    found = [field.index.entry(position) for position in positions if position is not None]
    ready = prefetched(field, found)
    for position in positions:
        yield None if position is None else next(ready)


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
        fields = _names_by_role(earlier.get("fields", {}))
        same = earlier["store"] == layout.store.url  # earlier versions wrote no identity
        if "identity" in earlier:
            same = not set(earlier["identity"]).isdisjoint(identity)
    except (ValueError, TypeError, LookupError, AttributeError):
        fingerprint, tool, fields, same = None, None, {}, False
    if not same or (fingerprint, tool) != (layout.store.info.fingerprint, layout.tool):
        raise ConfigError(f"{dest} is an export of another store: use another destination.")
    if fields != _names_by_role({role: store.url for role, store in layout.fields.items()}):
        names = ", ".join(f"{role}={name}" for role, name in sorted(fields.items())) or "no fields"
        raise ConfigError(
            f"{dest} is an export with {names}: use the same --fields, or another destination."
        )


def _names_by_role(urls: Mapping[str, str]) -> dict[str, str]:
    """The names of fields, by role, from their URLs."""
    return {role: url.rpartition("/")[2] for role, url in urls.items()}


def _read_sample(
    layout: Layout, entry: IndexEntry, values: Sequence[IndexEntry | None]
) -> tuple[Record, dict[str, FloatArray]]:
    """A record and its values of the fields, `[D, n]`, as far as it has any."""
    stores = layout.fields.items()
    return layout.store.read(entry), {
        role: store.read(value).latent.astype(np.float32)
        for (role, store), value in zip(stores, values, strict=True)
        if value is not None
    }


def _write_sample(
    layout: Layout,
    storage: Storage,
    paths: Sequence[str],
    record: Record,
    by_role: Mapping[str, FloatArray],
) -> None:
    """Write those of a record's files that are not complete or have changed, the last one last.

    ItemError if a field has no value for it.
    """
    for role, store in layout.fields.items():
        if role not in by_role:
            raise ItemError(f"field {store.url.rpartition('/')[2]!r} has no value for it")
    contents = dict(zip(paths, layout.contents(record, by_role), strict=True))
    last = paths[-1]
    # The hash in the last file tells whether the others have changed, if that one has not.
    hashed = layout.hashed and _same(storage, last, contents[last])
    for path, data in contents.items():
        if not _same(storage, path, data, size_only=hashed):
            _write(storage, path, data)


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
