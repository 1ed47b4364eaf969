"""Inputs of fields that are not computed from audio: texts, latents, imported values.

The records of the base store give them: a text is the metadata of the record with its annotated
values, so `annotate` and `--refresh-metadata` put the items behind whose text they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import xxhash

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, StoreError
from latentmill.fields.inputs import Absent, Input, absent_items
from latentmill.plan import Unit
from latentmill.storage.storage import Storage
from latentmill.store.metadata import shard_rows
from latentmill.store.metadata_file import damaged_metadata, metadata_of
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore

METADATA = "metadata:"
LATENTS = "latents"
FILE = "file:"


class Values(Protocol):
    """Gives the inputs of a field's items, and the values behind them."""

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        """See `Inputs`. Empty while the unit of the base store is not committed and sealed."""
        ...

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[Any]:
        """The values of items that have one, in this order: texts, or arrays `[C, T]`."""
        ...


class BaseRows:
    """The records of a sealed store, unit by unit: their metadata, and their stored fields."""

    def __init__(self, store: LatentStore) -> None:
        self._store = store
        self._shards: dict[str, int] = {}
        if store.sealed and len(store.index):
            self._order, self._first = store.index.by_shard()
            self._shards = {path: number for number, path in enumerate(store.index.shards)}

    def metadata(self, commit: Commit) -> dict[str, dict[str, Any]] | None:
        """The metadata of a unit's records by key, with annotated values.

        None if the seal has another commit of the unit.
        """
        positions = self._positions(commit)
        if positions is None or not len(positions):
            return None if positions is None else {}
        texts = self._metadata.take(pa.array(positions)).to_pylist()
        keys = self._store.index.keys(positions)
        return {key: parse_json(text) for key, text in zip(keys, texts, strict=True)}

    def fields(self, commit: Commit) -> dict[str, dict[str, Any]] | None:
        """The stored fields of a unit's records by key; None as in `metadata`."""
        positions = self._positions(commit)
        if positions is None or not len(positions):
            return None if positions is None else {}
        assert commit.shard is not None
        store, shard = self._store, self._shards[commit.shard]
        rows = shard_rows(store.storage, store.index, shard, positions).to_pylist()
        return {row["key"]: row for row in rows}

    def _positions(self, commit: Commit) -> Any:
        if commit.shard is None:
            return ()
        number = self._shards.get(commit.shard)
        return (
            None if number is None else self._order[self._first[number] : self._first[number + 1]]
        )

    @cached_property
    def _metadata(self) -> pa.ChunkedArray:
        with metadata_of(self._store) as file:
            try:
                return file.read(["metadata"], use_threads=False)["metadata"]
            except (OSError, ValueError, pa.ArrowException) as error:
                raise damaged_metadata(self._store) from error


class MetadataValues:
    """Texts from one name in the metadata of the records."""

    def __init__(self, rows: BaseRows, name: str) -> None:
        self._rows, self._name = rows, name
        self._last: tuple[tuple[str, int], dict[str, str | Absent]] | None = None

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit, known
        texts = None if base is None else self._texts(base)
        if base is None or texts is None:
            return {}
        absent = absent_items(base)
        found: dict[str, Input] = {}
        for entry in base.items:
            text = absent.get(entry.key) or texts[entry.key]
            found[entry.key] = text if isinstance(text, Absent) else _hash(text.encode())
        return found

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[str]:
        texts = self._texts(base)
        assert texts is not None, "the unit is sealed"
        for key in keys:
            text = texts[key]
            assert isinstance(text, str), "absent items are not read"
            yield text

    def _texts(self, base: Commit) -> dict[str, str | Absent] | None:
        which = (base.unit, base.revision)
        if self._last is None or self._last[0] != which:
            rows = self._rows.metadata(base)
            if rows is None:
                return None
            own = ((key, metadata.get(self._name)) for key, metadata in rows.items())
            self._last = (which, {key: text_of(value, self._name) for key, value in own})
        return self._last[1]


def text_of(value: Any, name: str) -> str | Absent:
    """A value of metadata as the text that is embedded: a text, number or list of texts."""
    if value is None:
        return Absent(f"it has no metadata named {name}")
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        text = str(value)
        return text.encode(errors="backslashreplace").decode()
    return Absent(f"its metadata {name} is not a text, a number or a list of texts")


class LatentValues:
    """The latents of the base store."""

    def __init__(self, store: LatentStore) -> None:
        self._store = store

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit, known
        if base is None:
            return {}
        absent = absent_items(base)
        return {one.key: absent.get(one.key) or one.hash or "" for one in base.items}

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[Any]:
        del base
        return (self._store[key].latent.astype("float32") for key in keys)


class KnownImports:
    """The inputs of an imported field when its file is not at hand: those that it has."""

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit
        entries = {entry.key: entry for entry in (() if known is None else known.items)}
        absent = absent_items(base)
        found: dict[str, Input] = {}
        for one in () if base is None else base.items:
            entry = entries.get(one.key)
            skipped = entry is not None and entry.status == "skipped" and entry.input is None
            now = Absent("") if skipped else (entry.input or "") if entry is not None else ""
            found[one.key] = absent.get(one.key) or now
        return found


def values_of(base: Storage, source: str) -> Values:
    """The values of a field `metadata:NAME` or `latents` of a store.

    Raises:
        ConfigError: The source is not valid.
        StoreError: The store is damaged.
    """
    store = LatentStore(base.root)
    if source == LATENTS:
        if store.info.layout != "time-major":
            raise StoreError(
                f"{base.root} has overlapping chunks (stitch none), from which no field can be "
                "computed: use another stitch."
            )
        return LatentValues(store)
    name = source.removeprefix(METADATA)
    if name == source or not name:
        raise ConfigError(
            f"invalid --from {source!r}: use metadata:NAME, latents, or a .parquet or .jsonl file "
            "or a folder of .npy files."
        )
    return MetadataValues(BaseRows(store), name)


def _hash(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)
