"""Inputs of fields that are not computed from audio: texts, latents, imported values.

Texts come from the metadata of the base store's records, including annotated values. So if
`annotate` or `--refresh-metadata` changes the text of an item, its value is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import xxhash

from latentmill.errors import ConfigError, StoreError
from latentmill.fields.base_rows import BaseRows
from latentmill.fields.inputs import Absent, Input, absent_items
from latentmill.plan import Unit
from latentmill.storage.storage import Storage
from latentmill.store.index import entries
from latentmill.store.prefetch import prefetched
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore

METADATA = "metadata:"
LATENTS = "latents"
FILE = "file:"


class Values(Protocol):
    """Gives the inputs of a field's items, and the values behind them."""

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        """See `Inputs`. Empty while the unit of the base store is not committed."""
        ...

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[Any]:
        """The values of items that have one, in this order: texts, or arrays `[C, T]`."""
        ...


class MetadataValues:
    """Texts from one name in the metadata of the records."""

    def __init__(self, rows: BaseRows, name: str) -> None:
        self._rows, self._name = rows, name
        self._last: tuple[tuple[str, int], dict[str, str | Absent]] | None = None

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit, known
        if base is None:
            return {}
        texts, absent = self._texts(base), absent_items(base)
        found: dict[str, Input] = {}
        for entry in base.items:
            text = absent.get(entry.key) or texts[entry.key]
            found[entry.key] = text if isinstance(text, Absent) else _hash(text.encode())
        return found

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[str]:
        texts = self._texts(base)
        for key in keys:
            text = texts[key]
            assert isinstance(text, str), "absent items are not read"
            yield text

    def _texts(self, base: Commit) -> dict[str, str | Absent]:
        which = (base.unit, base.revision)
        if self._last is None or self._last[0] != which:
            rows = self._rows.metadata(base).items()
            own = ((key, metadata.get(self._name)) for key, metadata in rows)
            self._last = (which, {key: text_of(value, self._name) for key, value in own})
        return self._last[1]


def text_of(value: Any, name: str) -> str | Absent:
    """A value of metadata as one text: a text, number or list of texts."""
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
        places = {entry.key: entry for entry in entries(base)}
        wanted = prefetched(self._store, [places[key] for key in keys])
        return (self._store.read(place).latent.astype("float32") for place in wanted)


class KnownImports:
    """The inputs of an imported field whose file is not available: those in its commits."""

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


def values_of(base: Storage, source: str, *, from_shards: bool = False) -> Values:
    """The values of a field `metadata:NAME` or `latents` of a store; see `BaseRows`.

    Raises:
        ConfigError: The source is not valid.
        StoreError: The store is damaged.
    """
    store = LatentStore(base.root)
    if source == LATENTS:
        if store.plan.fingerprint["chunking"]["stitch"] == "none":
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
    return MetadataValues(BaseRows(store, from_shards=from_shards), name)


def _hash(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)
