"""A plan in memory: its source, settings and units, without the items."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from latentmill.models.base import Channels
from latentmill.record import ShardFormat

PLAN = "plan"
ITEMS_PATH = f"{PLAN}/items.parquet"
UNITS_PATH = f"{PLAN}/units.parquet"
PLAN_PATH = f"{PLAN}/plan.json"
BATCH_PATH = f"{PLAN}/batch.json"  # the batch size that a run on GPUs has found


@dataclass(frozen=True)
class Unit:
    """The items whose latents make one shard. Units are scheduled, retried and resumed as a whole.

    A unit does not contain its items: `read_items` reads them from the store.

    Attributes:
        number: Number in the plan, from 0.
        items: Number of items.
        seconds: Length of their audio. Unknown lengths are estimated from file sizes.
        bytes: Size of their audio files.
        hash: xxh3-64 of the planned items, in hex. The unit's commit repeats it.
        file: The file of the plan that has its items, such as `plan/items.parquet`.
        row_group: The row group of that file that has its items.
        revision: The revision of its shard that a run writes. It is not in the plan's files.
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
        """The unit's name, which is also the stem of its shard's file name."""
        return f"{self.number:06d}"


def plan_order(unit: str) -> tuple[int, str]:
    """The sort key of a unit's name: `999999` is before `1000000`."""
    return len(unit), unit


@dataclass(frozen=True)
class PlanPart:
    """The items that were planned at one time: by the first run, or by an extension.

    Attributes:
        number: Number in the plan, from 0.
        revision: How often the files of this part were replaced because items had changed.
        units: Number of units.
        items: Number of items.
        seconds: Length of all audio, known and estimated.
        estimated_seconds: Length of the audio whose length is estimated.
        estimated_items: Number of items whose length is estimated.
        bytes: Size of all audio files.
        formats: Number of items by file name extension.
        items_bytes: Size of `items_file`.
        items_hash: xxh3-128 of `items_file`.
        units_hash: xxh3-128 of `units_file`.
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
        """Path of the file with a row for each item, in order."""
        return self._file("items")

    @property
    def units_file(self) -> str:
        """Path of the file with a row for each unit."""
        return self._file("units")

    def _file(self, kind: str) -> str:
        number = f"-{self.number:04d}" if self.number or self.revision else ""
        revision = f".{self.revision}" if self.revision else ""
        return f"{PLAN}/{kind}{number}{revision}.parquet"


@dataclass(frozen=True)
class FieldEntry:
    """What a field is: a store in fields/NAME/ of another store, its base.

    Attributes:
        name: Its name, the last part of its folder.
        kind: What its arrays `[D, n]` are. `frames`: n frames at the rate of the model. `vector`:
            one for the item, or one for each `window_seconds`. `tokens`: n tokens, without a rate.
            `codes`: whole numbers at the rate of the model.
        source: What the values are computed from: `audio`, or for example `metadata:prompt`.
        window_seconds: Length of a window, if each window of an item has a vector.
    """

    name: str
    kind: Literal["frames", "vector", "tokens", "codes"]
    source: str
    window_seconds: float | None = None

    @property
    def is_pooled(self) -> bool:
        """Whether the frames that a model of audio computes for an item become one vector."""
        return self.kind == "vector" and self.source == "audio" and self.window_seconds is None

    @property
    def follows_audio(self) -> bool:
        """Whether its values are the frames that a model of audio computes."""
        return self.kind in ("frames", "codes") and self.source == "audio"

    @property
    def vectors(self) -> str:
        """`vectors` or `tokens` if the values are these; empty if they are frames at a rate."""
        return {"vector": "vectors", "tokens": "tokens"}.get(self.kind, "")


@dataclass(frozen=True)
class Plan:
    """What a run encodes, and with which settings.

    Attributes:
        source: URI of the source.
        fingerprint: The fingerprint document of the run.
        model: The setting `model`.
        model_options: The setting `model_options`.
        format: Format of the shards.
        ignored: Number of files in the source that are not items, by extension or reason.
        channels: The setting `channels`.
        provenance: Origin of the model's weights; see `ModelSpec`.
        unit_seconds: The setting `unit_seconds`.
        shard_size: The setting `shard_size`.
        extensions: The setting `extensions`.
        source_settings: Other settings that select items, by their name in `RunConfig`.
        packing: The order in which chunks are packed into batches; see `encoding/lanes.py`. Plans
            of earlier versions do not contain it.
        field: What the store is, if it is a field of another store.
        units: All units, in order. Each item is in exactly one. `freeze` sets this.
        parts: The files with the items.
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
    packing: int = 1
    field: FieldEntry | None = None
    units: tuple[Unit, ...] = ()
    parts: tuple[PlanPart, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether the items are records of other stores, which `source` only describes."""
        return not self.source_settings.keys().isdisjoint(("copy_of", "view"))

    @property
    def num_items(self) -> int:
        return sum(part.items for part in self.parts)

    @property
    def seconds(self) -> float:
        """Length of all audio, known and estimated."""
        return sum(part.seconds for part in self.parts)

    @property
    def formats(self) -> Counter[str]:
        """Number of items by file name extension."""
        return sum((Counter(part.formats) for part in self.parts), Counter())
