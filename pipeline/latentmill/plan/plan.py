"""A plan in memory: what a run encodes and with what, and its units, without their items."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from latentmill.models.base import Channels
from latentmill.record import ShardFormat

PLAN = "plan"
ITEMS_PATH = f"{PLAN}/items.parquet"
UNITS_PATH = f"{PLAN}/units.parquet"
PLAN_PATH = f"{PLAN}/plan.json"


@dataclass(frozen=True)
class Unit:
    """The items whose latents make one shard: what is scheduled, retried, resumed.

    Small, and free of its items: `read_items` reads them from the store.

    Attributes:
        number: Counts from 0 over the whole plan.
        items: How many items it has.
        seconds: Their audio, as far as it is known; the rest estimated from file sizes.
        bytes: Their encoded audio.
        hash: xxh3-64 of what its items were when they were planned, hex; a commit repeats it.
        file: The file of the plan that holds its items, such as `plan/items.parquet`.
        row_group: The row group of that file which holds all of them.
        revision: The revision of its shard that a run is to write; the plan's files say nothing of
            it.
    """

    number: int
    items: int
    seconds: float
    bytes: int = 0
    hash: str = ""
    file: str = ITEMS_PATH
    row_group: int = 0
    revision: int = 0

    @property
    def name(self) -> str:
        """The unit's name, which is its shard's file name too."""
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Part:
    """The items that were planned at one time: by the first run, or by an extension.

    Attributes:
        number: Counts from 0 over the plan.
        revision: How often items that have changed were entered anew.
        units: How many units it has.
        items: How many items it has.
        seconds: Audio of all items: what is known, and estimates.
        estimated_seconds: The estimates alone.
        estimated_items: How many items' length is estimated.
        bytes: Encoded audio of all items.
        formats: Items by file name extension.
        items_bytes: Size of `items_file`.
        items_hash: xxh3-128 of its bytes.
        units_hash: The same of `units_file`.
    """

    number: int
    revision: int
    units: int
    items: int
    seconds: float
    estimated_seconds: float
    estimated_items: int
    bytes: int
    formats: dict[str, int]
    items_bytes: int = 0
    items_hash: str = ""
    units_hash: str = ""

    @property
    def items_file(self) -> str:
        """Path of the items: a row for each, in order."""
        return self._file("items")

    @property
    def units_file(self) -> str:
        """Path of the units: a row for each."""
        return self._file("units")

    def _file(self, kind: str) -> str:
        number = f"-{self.number:04d}" if self.number or self.revision else ""
        revision = f".{self.revision}" if self.revision else ""
        return f"{PLAN}/{kind}{number}{revision}.parquet"


@dataclass(frozen=True)
class Plan:
    """What a run will encode, and with what.

    Attributes:
        source: The source's URI.
        fingerprint: The fingerprint document of the run.
        model: Name of the model, as it was asked for.
        model_options: Options of the model, as they were asked for.
        format: Format of the shards.
        ignored: Files of the source that are no items, counted by extension or reason.
        channels: What the model was made to do with channels, as it was asked for.
        provenance: Where the model's weights came from; see `ModelSpec`.
        unit_seconds: How the units were cut, as it was asked for.
        shard_size: The same in estimated bytes of latents.
        extensions: File name extensions that made a file an item.
        source_settings: What else chose the items, as it was asked for, by its name in RunConfig.
        units: Every unit, in order; every item belongs to exactly one. `freeze` fills them in.
        parts: The files that hold the items.
    """

    source: str
    fingerprint: dict[str, Any]
    model: str
    model_options: dict[str, Any]
    format: ShardFormat
    ignored: dict[str, int]
    channels: Channels | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    unit_seconds: float | None = None
    shard_size: int | None = None
    extensions: tuple[str, ...] = ()
    source_settings: dict[str, Any] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return sum(part.items for part in self.parts)

    @property
    def seconds(self) -> float:
        """Audio of all items, in seconds: what is known, and estimates."""
        return sum(part.seconds for part in self.parts)

    @property
    def formats(self) -> Counter[str]:
        """Items by file name extension."""
        return sum((Counter(part.formats) for part in self.parts), Counter())
