"""The properties of all records that histograms show, from one pass over the stored fields."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.encoding.loudness import silent_frames
from latentmill.encoding.stored import parse_json
from latentmill.errors import StorageError
from latentmill.evaluation.rows import ShardRows
from latentmill.record import MIXES
from latentmill.store.schema import levels_of
from latentmill.store.store import LatentStore

Values = npt.NDArray[np.float64]

MAX_FIELDS = 12  # of metadata by which the map can be coloured
_NAMES = (
    "rms",
    "levels",
    "group",
    "role",
    "source_uri",
    "source_sample_rate",
    "source_channels",
    "metadata",
)
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
class Columns:
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


def read_columns(store: LatentStore, most: int) -> Columns:
    """Read the stored fields of all records, and of up to `most` evenly spread ones the metadata.

    Raises:
        StorageError: A shard is damaged.
    """
    rows, index = ShardRows(store), store.index
    count = len(index)
    sample = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    place = {position: number for number, position in enumerate(sample.tolist())}
    power, silence = np.zeros(count), np.full(count, np.nan)
    chosen: list[dict[str, Any]] = [{} for _ in sample]
    group: tuple[str, list[str]] | None = None
    for shard in range(len(rows.paths)):
        positions = rows.positions(shard)
        fields = rows.fields(shard, _NAMES)
        try:
            power[positions] = np.square(np.array(fields["rms"], np.float64))
            silence[positions] = [_silence(levels) for levels in fields["levels"]]
            for row, position in enumerate(positions.tolist()):
                if position in place:
                    one = {name: fields[name][row] for name in _NAMES}
                    chosen[place[position]] = _properties(one)
            group = group or _group(store, positions, fields)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise StorageError(
                f"{store.url}/{rows.paths[shard]} is damaged: run `latentmill verify`."
            ) from error
    with np.errstate(divide="ignore"):
        rms_db = 10.0 * np.log10(power)
    seconds = index.column("num_samples") / float(store.info.model["sample_rate"])
    measured = {
        "duration in s": np.round(seconds[sample], 2).tolist(),
        "level in dBFS": [
            round(level, 1) if math.isfinite(level) else None for level in rms_db[sample].tolist()
        ],
    }
    fields_of_sample = [Field(name, values) for name, values in measured.items()]
    fields_of_sample += _useful(chosen)
    return Columns(seconds, rms_db, silence, sample, tuple(fields_of_sample), group)


def _silence(levels: Any) -> float:
    data = levels_of({"levels": levels})
    return float(silent_frames(data).mean()) if data else math.nan


def _properties(one: Mapping[str, Any]) -> dict[str, Any]:
    metadata = parse_json(one["metadata"])
    uri = str(one["source_uri"]).partition("#")[0]
    found = {
        "group": one["group"],
        "role": one["role"],
        "format": PurePosixPath(uri).suffix.lower().lstrip(".") or "none",
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


def _group(
    store: LatentStore, positions: npt.NDArray[np.int64], fields: Mapping[str, list[Any]]
) -> tuple[str, list[str]] | None:
    found: dict[str, list[int]] = {}
    for position, group, role in zip(
        positions.tolist(), fields["group"], fields["role"], strict=True
    ):
        if group is not None and role not in MIXES:
            found.setdefault(group, []).append(position)
    for group, members in found.items():
        if len(members) > 1:
            return group, sorted(store.index.key(position) for position in members)
    return None
