"""The plan: the frozen, ordered list of items and the unit that each belongs to."""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from latentmill.errors import StoreError
from latentmill.models.base import Channels
from latentmill.sources.base import Item
from latentmill.storage import Storage

FORMAT_VERSION = 1
ITEMS_PATH = "plan/items.parquet"
PLAN_PATH = "plan/plan.json"

# Bytes of a second of audio, to guess a file's length from its size: what decides is the order of
# units and the progress bar, never the latents.
BYTES_PER_SECOND = {"wav": 176_400, "aif": 176_400, "aiff": 176_400, "flac": 100_000}
COMPRESSED_BYTES_PER_SECOND = 20_000

MAX_UNIT_ITEMS = 10_000
SMALLEST_UNIT_SECONDS = 60.0
LARGEST_UNIT_SECONDS = 4 * 3600.0
TARGET_UNITS = 256

_ITEMS_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("sidecars", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Unit:
    """The items whose latents make one shard: what is scheduled, retried, resumed."""

    number: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """The unit's name, which is its shard's file name too."""
        return f"{self.number:06d}"

    @property
    def seconds(self) -> float:
        """Estimated seconds of audio."""
        return sum(estimated_seconds(item) for item in self.items)


@dataclass(frozen=True)
class Plan:
    """What a run will encode, and with what.

    Attributes:
        source: The source's URI.
        units: Every unit, in order; every item belongs to exactly one.
        fingerprint: The fingerprint document of the run.
        model: Name of the model, as it was asked for.
        model_options: Options of the model, as they were asked for.
        format: Format of the shards.
        channels: What the model was made to do with channels, as it was asked for.
        ignored: Files of the source that are no items, counted by extension.
        provenance: Where the model's weights came from; see `ModelSpec`.
        unit_seconds: How the units were cut, as it was asked for.
        extensions: File name extensions that made a file an item.
    """

    source: str
    units: tuple[Unit, ...]
    fingerprint: dict[str, Any]
    model: str
    model_options: dict[str, Any]
    format: Literal["parquet", "webdataset"]
    ignored: dict[str, int]
    channels: Channels | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    unit_seconds: float | None = None
    extensions: tuple[str, ...] = ()

    @property
    def items(self) -> Iterator[Item]:
        """Every item, in order."""
        return (item for unit in self.units for item in unit.items)

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return sum(len(unit.items) for unit in self.units)


def estimated_seconds(item: Item) -> float:
    """A guess of an item's length from its size and extension."""
    extension = posixpath.splitext(item.uri)[1].lstrip(".").lower()
    return item.size / BYTES_PER_SECOND.get(extension, COMPRESSED_BYTES_PER_SECOND)


def cut_units(items: Sequence[Item], unit_seconds: float | None = None) -> tuple[Unit, ...]:
    """Cut items, in order, into units of about `unit_seconds` of audio.

    Depends on the items alone. Without `unit_seconds` a corpus gives about 256 units of one minute
    to four hours each.
    """
    seconds = [estimated_seconds(item) for item in items]
    if unit_seconds is None:
        unit_seconds = sum(seconds) / TARGET_UNITS
        unit_seconds = min(max(unit_seconds, SMALLEST_UNIT_SECONDS), LARGEST_UNIT_SECONDS)
    units: list[Unit] = []
    begin, filled = 0, 0.0
    for index, duration in enumerate(seconds):
        full = filled > 0 and filled + duration > unit_seconds
        if full or index - begin >= MAX_UNIT_ITEMS:
            units.append(Unit(len(units), tuple(items[begin:index])))
            begin, filled = index, 0.0
        filled += duration
    units.append(Unit(len(units), tuple(items[begin:])))
    return tuple(units)


def freeze(plan: Plan, storage: Storage) -> None:
    """Write the plan to a store that has none: the items first, plan.json last.

    Raises:
        StorageError: The store cannot be written.
    """
    columns: dict[str, list[Any]] = {
        "unit": [unit.number for unit in plan.units for _ in unit.items],
        **{
            field.name: [getattr(item, field.name) for item in plan.items] for field in fields(Item)
        },
    }
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pydict(columns, _ITEMS_SCHEMA), buffer, compression="zstd")
    items = buffer.getvalue()
    document = {
        "format_version": FORMAT_VERSION,
        "source": plan.source,
        "model": plan.model,
        "model_options": plan.model_options,
        "channels": plan.channels,
        "provenance": plan.provenance,
        "unit_seconds": plan.unit_seconds,
        "extensions": plan.extensions,
        "format": plan.format,
        "items": plan.num_items,
        "units": len(plan.units),
        "items_hash": _hash(items),
        "ignored": plan.ignored,
        "fingerprint": plan.fingerprint,
    }
    storage.write(ITEMS_PATH, items)
    storage.write(PLAN_PATH, json.dumps(document, indent=2).encode())


def load(storage: Storage) -> Plan | None:
    """Read the store's plan; None if it has none.

    Raises:
        StoreError: The plan is of a newer format, damaged, or its parts do not belong together.
    """
    text = storage.read_if_exists(PLAN_PATH)
    if text is None:
        return None
    try:
        document = json.loads(text)
        return _read_plan(document, storage)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"Store {storage.root}: {PLAN_PATH} is damaged; restore it from a copy or encode into "
            "a new store."
        ) from error


def _read_plan(document: dict[str, Any], storage: Storage) -> Plan:
    if document.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"Store {storage.root} has plan format {document.get('format_version')}, this "
            f"latentmill reads {FORMAT_VERSION}: use the version that wrote it."
        )
    items = storage.read_if_exists(ITEMS_PATH)
    if items is None or _hash(items) != document["items_hash"]:
        raise StoreError(
            f"Store {storage.root}: {ITEMS_PATH} is not the one that {PLAN_PATH} names; restore "
            "both from one backup or encode into a new store."
        )
    # Without threads: Arrow's may abort the process when they are young at its end.
    table = pq.read_table(pa.BufferReader(items), use_threads=False, pre_buffer=False)
    rows = table.to_pylist()
    return Plan(
        source=document["source"],
        units=tuple(_units(rows)),
        fingerprint=document["fingerprint"],
        model=document["model"],
        model_options=document["model_options"],
        channels=document.get("channels"),
        format=document["format"],
        ignored=document["ignored"],
        provenance=document["provenance"],
        unit_seconds=document["unit_seconds"],
        extensions=tuple(document["extensions"]),
    )


def _units(rows: Iterable[dict[str, Any]]) -> Iterator[Unit]:
    members: dict[int, list[Item]] = {}
    for row in rows:
        number = row.pop("unit")
        members.setdefault(number, []).append(Item(**{**row, "sidecars": tuple(row["sidecars"])}))
    for number, items in members.items():
        yield Unit(number, tuple(items))


def _hash(data: bytes) -> str:
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)
