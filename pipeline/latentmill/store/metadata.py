"""metadata.parquet: the fields of every record except its latent, in the order of the index.

Sealing writes it, so that searching reads one small file instead of all shards. Row n is record n.
Its columns are the stored fields, `loudness` and `silence`, and one typed column for each name in
the records' own metadata whose values all have one scalar type: `metadata_bpm`. Annotations replace
and add values, and each annotated name has a column. Any Parquet tool can read it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.encoding.loudness import silent_frames
from latentmill.encoding.stored import parse_json
from latentmill.record import LOUDEST, STEPS_PER_DB
from latentmill.storage.storage import Storage, writing
from latentmill.storage.threads import map_in_threads
from latentmill.store.annotations import (
    JSON,
    TYPES,
    Annotations,
    is_column,
    kind_of_value,
    wider,
)
from latentmill.store.commit import hash_of, write_new
from latentmill.store.fields import damaged_shard, parse_member, read_columns
from latentmill.store.index import Index
from latentmill.store.schema import RECORD_SCHEMA, json_text

PREFIX = "metadata_"
ROW_GROUP = 1 << 14
MAX_COLUMNS = 64  # of the records' own metadata: the names that occur most often
_TRACKED = 10_000  # names whose types are followed
_READERS = 8  # shards read in parallel from a remote store
_QUIETEST = -LOUDEST / STEPS_PER_DB

_READ = [field for field in RECORD_SCHEMA if field.name != "latent"]
_FIELDS = [field.with_nullable(field.name != "key") for field in _READ if field.name != "levels"]
METADATA_SCHEMA = pa.schema(
    [*_FIELDS, pa.field("loudness", pa.float64()), pa.field("silence", pa.float64())]
)
_TYPES = {**TYPES, JSON: pa.string()}


def write_metadata(
    storage: Storage,
    index: Index,
    file: Path,
    rows: Path,
    annotations: Annotations | None = None,
) -> None:
    """Write metadata.parquet to the local path `file`, with a few shards' fields in memory.

    `rows` is the path of a temporary file: the rows in the order of the shards.

    Raises:
        StorageError: A shard is damaged, or a file cannot be read or written.
    """
    columns = _write_rows(storage, index, rows, annotations)
    with writing(str(file)), pq.ParquetWriter(file, schema_of(columns), compression="zstd") as out:
        for block in sorted_blocks(index, rows, columns):
            out.write_table(block, row_group_size=ROW_GROUP)


def publish_metadata(
    storage: Storage,
    index: Index,
    annotations: Annotations | None = None,
    shards: Storage | None = None,
) -> tuple[str, str]:
    """Write metadata.HASH.parquet into a store; return its name and its whole hash.

    The shards are read from `shards`, by default from the store.
    """
    path = "metadata.parquet"
    with storage.scratch_file(path) as file, storage.scratch_file("metadata.rows") as rows:
        write_metadata(shards or storage, index, file, rows, annotations)
        return publish(storage, file)


def publish(
    storage: Storage, file: Path, name: str = "metadata", suffix: str = "parquet"
) -> tuple[str, str]:
    """Move a local file into a store as NAME.HASH.SUFFIX; return its path and its whole hash."""
    with file.open("rb") as written:
        digest = hash_of(written)
    path = f"{name}.{digest[:16]}.{suffix}"
    # A file of this name with another hash is damaged.
    write_new(storage, path, lambda: storage.publish(file, path) or has_hash(storage, path, digest))
    return path, digest


def has_hash(storage: Storage, path: str, digest: str | None) -> bool:
    """Whether a file exists and has this xxh3-128 hash."""
    if not storage.exists(path):
        return False
    with storage.open(path) as file:
        return hash_of(file) == digest


def matches_records(
    storage: Storage,
    index: Index,
    path: str,
    digest: str | None,
    annotations: Annotations | None = None,
) -> bool:
    """Whether a metadata file has the hash in dataset.json and the rows of the records."""
    if not has_hash(storage, path, digest):
        return False
    with (
        tempfile.TemporaryDirectory(prefix="latentmill-") as folder,
        storage.open(path) as source,
    ):
        rows = Path(folder, "rows")
        columns = _write_rows(storage, index, rows, annotations)
        try:
            with pq.ParquetFile(source) as file:
                if file.metadata.num_rows != len(index):
                    return False
                groups = range(file.num_row_groups)
                found = (file.read_row_group(group, use_threads=False) for group in groups)
                pairs = itertools.zip_longest(found, sorted_blocks(index, rows, columns))
                return all(a is not None and b is not None and a.equals(b) for a, b in pairs)
        except pa.ArrowException:
            return False


def schema_of(columns: Mapping[str, str]) -> pa.Schema:
    """The schema of a file with these columns of the records' own metadata, kinds by name."""
    own = [pa.field(PREFIX + name, _TYPES[kind]) for name, kind in columns.items()]
    return pa.schema([*METADATA_SCHEMA, *own])


def sorted_blocks(index: Index, rows: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    """Row groups in the order of the index, from a file that has the rows shard by shard."""
    if not len(index):
        return
    shard_of, order, first = index.column("shard"), *index.by_shard()
    place = np.empty(len(index), np.int64)  # of each record among the rows of its shard
    place[order] = np.arange(len(index)) - first[shard_of[order]]
    with pa.memory_map(str(rows)) as file:
        reader = pa.ipc.open_file(file)
        tables: dict[int, list[pa.RecordBatch]] = {}
        for number in range(reader.num_record_batches):
            batch, custom = reader.get_batch_with_custom_metadata(number)
            tables.setdefault(int(custom["shard"]), []).append(batch)
        for start in range(0, len(index), ROW_GROUP):
            shards = shard_of[start : start + ROW_GROUP]
            places = place[start : start + ROW_GROUP]
            parts, found = [], []
            for shard in np.unique(shards).tolist():
                here = np.flatnonzero(shards == shard)
                table = pa.Table.from_batches(tables[shard])
                parts.append(table.take(pa.array(places[here])))
                found.append(here)
            block = pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(found))))
            yield with_columns(block.combine_chunks(), columns)


def with_columns(block: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """Add the typed columns of the records' own metadata."""
    if columns:
        parsed = [parse_json(text) for text in block["metadata"].to_pylist()]
        for name, kind in columns.items():
            values = [own.get(name) for own in parsed]
            if kind == "float":
                values = [None if value is None else float(value) for value in values]
            elif kind == JSON:
                values = [_as_text(value) for value in values]
            block = block.append_column(PREFIX + name, pa.array(values, _TYPES[kind]))
    return block.cast(schema_of(columns))


def _write_rows(
    storage: Storage, index: Index, rows: Path, annotations: Annotations | None
) -> dict[str, str]:
    """Write the rows of each shard as record batches; return the kinds of the metadata's names."""
    names = ColumnKinds({} if annotations is None else annotations.kinds)
    with (
        writing(str(rows)),
        pa.OSFile(str(rows), "wb") as sink,
        pa.ipc.new_file(sink, METADATA_SCHEMA) as file,
    ):
        for shard, stored in _shards(storage, index):
            try:
                table = stored if annotations is None else _annotated(stored, annotations)
                for text in table["metadata"].to_pylist():
                    names.add(parse_json(text))
            except (ValueError, TypeError, AttributeError) as error:
                raise damaged_shard(storage, index.shards[shard]) from error
            for batch in table.to_batches(max_chunksize=ROW_GROUP):
                file.write_batch(batch, custom_metadata={"shard": str(shard)})
    return names.columns()


def _annotated(table: pa.Table, annotations: Annotations) -> pa.Table:
    merged = annotations.column(table["key"].to_pylist(), table["metadata"])
    place = table.schema.get_field_index("metadata")
    return table.set_column(place, METADATA_SCHEMA.field("metadata"), merged)


def _as_text(value: Any) -> str | None:
    """A value of a column of text: text as it is, other values as JSON."""
    return value if kind_of_value(value) in ("null", "str") else json_text(value)


def _shards(storage: Storage, index: Index) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each shard; of a remote store, a few shards are read in parallel."""
    if not len(index):
        return
    order, first = index.by_shard()

    def read(shard: int) -> pa.Table:
        return shard_rows(storage, index, shard, order[first[shard] : first[shard + 1]])

    shards = range(len(index.shards))
    if storage.local:
        yield from ((shard, read(shard)) for shard in shards)
        return
    tables = map_in_threads(read, shards, threads=_READERS, prefetch=_READERS)
    with contextlib.closing(tables):
        yield from zip(shards, tables, strict=True)


def shard_rows(
    storage: Storage, index: Index, shard: int, positions: npt.NDArray[np.int64]
) -> pa.Table:
    """The rows of METADATA_SCHEMA for the records at some positions, which are in one shard."""
    path = index.shards[shard]
    try:
        table = _fields(storage, index, path, positions)
        if table["key"].to_pylist() != index.keys(positions):
            raise ValueError("the rows belong to other records")
        rms = table["rms"].to_numpy().astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            loudness = np.maximum(20 * np.log10(rms), _QUIETEST)
        silence = [_silence(levels) for levels in table["levels"].to_pylist()]
        columns = [table[field.name] for field in _FIELDS]
        columns += [pa.array(loudness), pa.array(silence, pa.float64())]
        return pa.Table.from_arrays(columns, METADATA_SCHEMA.names).cast(METADATA_SCHEMA)
    except (ValueError, TypeError, LookupError, pa.ArrowException) as error:
        raise damaged_shard(storage, path) from error


def _fields(
    storage: Storage, index: Index, path: str, positions: npt.NDArray[np.int64]
) -> pa.Table:
    """The stored fields, from the columns of a Parquet shard or the JSON members of a tar."""
    names = [field.name for field in _READ]
    begins = index.column("fields_offset")[positions]
    if begins[0] < 0:
        table = read_columns(storage, path, names)
        return table.take(pa.array(index.column("row")[positions]))
    sizes = index.column("fields_length")[positions]
    pieces = [(path, int(b), int(n)) for b, n in zip(begins, sizes, strict=True)]
    members = []
    for data in storage.read_ranges(pieces):
        member = parse_member(storage, path, data)
        levels = member.get("levels")  # stores of earlier versions have none
        members.append({**member, "levels": None if levels is None else base64.b64decode(levels)})
    return pa.Table.from_pylist(members, pa.schema([f.with_nullable(True) for f in _READ]))


def _silence(levels: bytes | None) -> float | None:
    """Share of the frames below SILENT_DB; None if the levels were not measured."""
    if not levels:
        return None
    return float(np.mean(silent_frames(levels)))


class ColumnKinds:
    """Names in the records' own metadata, with the kind of their values so far.

    `annotated` has the kinds of annotated names, each of which becomes a column.
    """

    def __init__(self, annotated: Mapping[str, str]) -> None:
        self._annotated = sorted(annotated)
        self._counts = Counter(dict.fromkeys(annotated, 0))
        # None: values of several types, or not scalar
        self._kinds = {name: None if kind == JSON else kind for name, kind in annotated.items()}

    def add(self, own: Mapping[str, Any]) -> None:
        for name, value in own.items():
            if name not in self._counts and len(self._counts) >= _TRACKED:
                continue
            self._counts[name] += 1
            kind = kind_of_value(value)
            if kind != "null":
                self._kinds[name] = wider(self._kinds.get(name, kind), kind)

    def columns(self) -> dict[str, str]:
        """The kinds of the columns by name, sorted by name."""
        others = self._kinds.keys() - set(self._annotated)
        usable = [name for name in others if self._kinds[name] and is_column(name)]
        often = sorted(usable, key=lambda name: (-self._counts[name], name))[:MAX_COLUMNS]
        kinds = {name: self._kinds[name] or JSON for name in sorted([*often, *self._annotated])}
        return {name: kind.removesuffix(" large") for name, kind in kinds.items()}
