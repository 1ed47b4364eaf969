"""The properties of all records that histograms show, from the metadata file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.encoding.stored import parse_json
from latentmill.record import MIXES
from latentmill.sources.address import format_at, starts_at
from latentmill.sources.group import groups_together
from latentmill.store.metadata_file import damaged_metadata, metadata_of
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore

Values = npt.NDArray[np.float64]

MAX_FIELDS = 12  # of metadata by which the map can be coloured
_NAMES = ("group", "role", "source_uri", "source_sample_rate", "source_channels", "metadata")
_LONGEST = 60  # characters of a value


@dataclass(frozen=True)
class Field:
    """A property of the records of a sample, numbers or short texts; None where it is missing."""

    name: str
    values: list[Any]

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers, and not only a few whole ones, which are like names."""
        present = {value for value in self.values if value is not None}
        numbers = all(type(value) in (int, float) for value in present)
        return numbers and (len(present) > 8 or any(value % 1 for value in present))


@dataclass(frozen=True)
class RecordColumns:
    """Properties of all records in the order of the index, and more of a sample.

    Attributes:
        seconds: Durations.
        rms_db: Level in dBFS; -inf for digital silence.
        silence: Share of the frames below -60 dBFS; NaN where it was not measured.
        sample: Positions of the records of the sample.
        fields: Their properties by which they can be told apart.
        group: Name and keys of the first group of at least two stems; None if there is none.
    """

    seconds: Values
    rms_db: Values
    silence: Values
    sample: npt.NDArray[np.int64]
    fields: tuple[Field, ...]
    group: tuple[str, list[str]] | None

    @property
    def first_field(self) -> int:
        """Number of the field by which the map is coloured first: the role, or another name."""
        several = [n for n, field in enumerate(self.fields) if len(set(field.values) - {None}) > 1]
        names = [n for n in several if not self.fields[n].numeric]
        roles = [n for n in names if self.fields[n].name == "role"]
        return (roles or names or several or [0])[0]


def read_columns(store: LatentStore, most: int) -> RecordColumns:
    """Read the fields of all records, and of up to `most` evenly spread ones the metadata.

    Raises:
        StoreError: The metadata file is missing or damaged.
        StorageError: A shard of a store without a metadata file is damaged.
    """
    file, index = metadata_of(store), store.index
    sample = np.array(spread_rows(len(index), most), np.int64)
    try:
        levels = file.read(columns=["rms", "silence"], use_threads=False)
        rms, silence = (levels[name].to_numpy().astype(np.float64) for name in ("rms", "silence"))
        chosen = [_properties(one) for one in _rows_at(file, sample)]
        names = ["group", "role", "source_uri"]
        group = _first_group(store, file.read(columns=names, use_threads=False))
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:
        raise damaged_metadata(store) from error
    with np.errstate(divide="ignore"):
        rms_db = 20.0 * np.log10(rms)
    seconds = index.column("num_samples") / float(store.info.model["sample_rate"])
    measured = {
        "duration in s": np.round(seconds[sample], 2).tolist(),
        "level in dBFS": [
            round(level, 1) if math.isfinite(level) else None for level in rms_db[sample].tolist()
        ],
    }
    fields_of_sample = [Field(name, values) for name, values in measured.items()]
    fields_of_sample += _useful(chosen)
    return RecordColumns(seconds, rms_db, silence, sample, tuple(fields_of_sample), group)


def _rows_at(file: pq.ParquetFile, positions: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The fields of the records at some positions, with one row group in memory."""
    start = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(_NAMES), use_threads=False)
        here = positions[(positions >= start) & (positions < start + len(table))] - start
        yield from table.take(pa.array(here)).to_pylist()
        start += len(table)


def _properties(one: Mapping[str, Any]) -> dict[str, Any]:
    metadata = parse_json(one["metadata"])
    found = {
        "group": one["group"],
        "role": one["role"],
        "format": format_at(str(one["source_uri"])),
        "source rate in Hz": one["source_sample_rate"],
        "source channels": one["source_channels"],
    }
    return found | {f"metadata {name}": value for name, value in metadata.items()}


def _useful(records: Sequence[Mapping[str, Any]]) -> list[Field]:
    """The fields with at least two values; those that name single records come last."""
    counts = Counter(name for record in records for name in record)
    fields: list[tuple[bool, int, Field]] = []
    for name, _ in counts.most_common(200):
        values = [_short(record.get(name)) for record in records]
        field = Field(str(name)[:_LONGEST], values)
        distinct = len({value for value in values if value is not None})
        if distinct > 1:
            single = distinct == len(values) and not field.numeric
            fields.append((single, len(fields), field))
    return [field for *_, field in sorted(fields, key=lambda one: one[:2])[:MAX_FIELDS]]


def _short(value: Any) -> Any:
    """A value of metadata as a number or a short text; None for lists and objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if type(value) in (int, float):
        return value if abs(value) < 1e15 else str(value)[:_LONGEST]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value[:_LONGEST] if isinstance(value, str) else None


def _first_group(store: LatentStore, table: pa.Table) -> tuple[str, list[str]] | None:
    """Name and keys of the first group of at least two stems that begin together."""
    stems = pc.and_not(
        pc.is_valid(table["group"]), pc.is_in(table["role"], value_set=pa.array(MIXES))
    ).to_numpy()
    positions = np.flatnonzero(stems)
    found = table.select(["source_uri", "group"]).filter(pa.array(stems))  # `take` ends at 2 GiB
    begins, songs = starts_at(found["source_uri"]), found["group"].to_pylist()
    groups, names = groups_together(songs, [begin or 0.0 for begin in begins])
    larger = np.flatnonzero(np.bincount(groups) > 1)
    if not len(larger):
        return None
    members = positions[groups == larger[0]].tolist()
    return names[larger[0]], [store.index.key(one) for one in members]
