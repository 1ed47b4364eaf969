"""The contracts on disk: a record's Arrow schema, a commit, dataset.json, the paths of a store."""

from __future__ import annotations

import json
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from latentmill.record import Record, Status

FORMAT_VERSION = 1

DATASET_PATH = "dataset.json"
INDEX_PATH = "index.arrow"
ORIGIN_PATH = "origin.npy"
COMMITS = "commits"
SHARDS = "shards"
SHARD_EXTENSION = {"parquet": ".parquet", "webdataset": ".tar"}

_TEXT = pa.string()
_ELEMENT = pa.field("element", pa.int32(), nullable=False)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT, nullable=False),
        pa.field("latent", pa.large_binary(), nullable=False),
        pa.field(
            "shape", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False
        ),
        pa.field("dtype", _TEXT, nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("source_uri", _TEXT, nullable=False),
        pa.field("source_sample_rate", pa.int32(), nullable=False),
        pa.field("source_channels", pa.int32(), nullable=False),
        pa.field("duration", pa.float64(), nullable=False),
        pa.field("content_hash", _TEXT, nullable=False),
        pa.field("rms", pa.float32(), nullable=False),
        pa.field("peak", pa.float32(), nullable=False),
        pa.field("group", _TEXT),
        pa.field("role", _TEXT),
        pa.field("metadata", _TEXT, nullable=False),
    ]
)


def record_fields(record: Record) -> dict[str, Any]:
    """A record's stored fields by name, but for the latent itself; plain Python values."""
    return {
        "key": record.key,
        "shape": [int(size) for size in record.latent.shape],
        "dtype": record.latent.dtype.name,
        "frames": record.frames,
        "channels": record.channels,
        "num_samples": record.num_samples,
        "sample_rate": record.sample_rate,
        "source_uri": record.source_uri,
        "source_sample_rate": record.source_sample_rate,
        "source_channels": record.source_channels,
        "duration": record.duration,
        "content_hash": record.content_hash,
        "rms": record.rms,
        "peak": record.peak,
        "group": record.group,
        "role": record.role,
        "metadata": json.dumps(record.metadata, ensure_ascii=False),
    }


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ItemEntry(_Document):
    """How one item of a unit ended, and where its latent lies in the shard."""

    key: str
    status: Status
    reason: str | None = Field(None, description="Why it was skipped or failed.")
    offset: int | None = Field(None, description="First byte of the latent in the shard.")
    length: int | None = Field(None, description="Bytes of the latent.")
    hash: str | None = Field(None, description="xxh3-64 of the latent's bytes, hex.")
    shape: tuple[int, ...] | None = Field(None, description="[channels, frames] or with chunks.")
    num_samples: int | None = Field(None, description="Audio length at the model's rate.")
    fields_offset: int | None = Field(None, description="Tar: first byte of the JSON member.")
    fields_length: int | None = Field(None, description="Tar: bytes of the JSON member.")


class StatisticsEntry(_Document):
    """Per-channel statistics of the latents, over all frames."""

    frames: int
    mean: list[float]
    m2: list[float] = Field(description="Sum of squared deviations from the mean.")


class Commit(_Document):
    """What makes a unit's shard count: commits/UNIT.json, written last."""

    format_version: Literal[1] = 1
    unit: str
    fingerprint: str
    shard: str | None = Field(None, description="Path of the shard; none if no item was encoded.")
    bytes: int = Field(description="Size of the shard.")
    hash: str | None = Field(None, description="xxh3-128 of the shard's bytes, hex.")
    rows: int = Field(description="Records in the shard.")
    audio_seconds: float = Field(description="Audio that was encoded.")
    items: list[ItemEntry] = Field(description="Every item of the unit, in the plan's order.")
    statistics: StatisticsEntry | None = None
    timings: dict[str, float] = Field(description="Seconds by stage: wait, model, write, total.")
    worker: str = Field("", description="Host and process that encoded the unit.")
    finished: str = Field("", description="UTC time, ISO 8601.")

    def count(self, status: Status) -> int:
        """How many items ended with this status."""
        return sum(item.status == status for item in self.items)


class ShardEntry(_Document):
    """A shard of a sealed store."""

    path: str
    rows: int
    bytes: int
    hash: str


class DatasetInfo(_Document):
    """What a store is: dataset.json, written when a run is complete."""

    format_version: Literal[1] = 1
    latentmill_version: str
    format: Literal["parquet", "webdataset"]
    layout: Literal["time-major", "chunks"] = Field(
        description="Order of a latent's bytes: frame after frame, or [chunks, channels, frames]."
    )
    dtype: Literal["float16", "float32"]
    model: dict[str, Any] = Field(description="Name, options, rate, scale factor, weights.")
    chunking: dict[str, Any]
    fingerprint: str
    source: str
    items: int = Field(description="Items of the plan.")
    encoded: int
    skipped: int
    failed: int
    hours: float = Field(description="Hours of encoded audio.")
    frames: int = Field(description="Latent frames of all records.")
    mean: list[float] = Field(description="Mean of every latent channel.")
    std: list[float] = Field(description="Standard deviation of every latent channel.")
    origin: str = Field(description="File with the latent of one chunk of silence [D, Z].")
    shards: list[ShardEntry]


def commit_path(unit: str) -> str:
    """Where a unit's commit lies."""
    return f"{COMMITS}/{unit}.json"


def shard_path(unit: str, format_name: str) -> str:
    """Where a unit's shard lies."""
    return f"{SHARDS}/{unit}{SHARD_EXTENSION[format_name]}"
