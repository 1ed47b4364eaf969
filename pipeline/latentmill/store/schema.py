"""File formats of a store: the Arrow schema of a record, commits, dataset.json, and paths."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar, get_args

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError, model_validator

from latentmill.encoding.stored import check_facts, parse_json
from latentmill.errors import StoreError
from latentmill.plan.plan import FieldEntry
from latentmill.record import DTYPES, Latent, Record, ShardFormat, Status
from latentmill.store.entries import (
    AnnotationEntry,
    BaseEntry,
    Bytes,
    Document,
    NameInStore,
    ShardEntry,
    Size,
)
from latentmill.store.formats import extension
from latentmill.store.results import LinearityEntry, SeamEntry

DATASET_PATH = "dataset.json"
CARD_PATH = "README.md"
INDEX_NAME = r"^index(\.[0-9a-f]+)?\.arrow$"
LEFT_OUT_NAME = r"^left_out\.[0-9a-f]+\.parquet$"
METADATA_NAME = r"^metadata\.[0-9a-f]+\.parquet$"
ORIGIN_PATH = "origin.npy"
COMMITS = "commits"
SHARDS = "shards"

_TEXT = pa.string()
_ELEMENT = pa.field("element", pa.int32(), nullable=False)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT, nullable=False),
        pa.field("latent", pa.large_binary(), nullable=False),
        pa.field("shape", pa.list_(_ELEMENT), nullable=False),
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
        pa.field("rms", pa.float64(), nullable=False),
        pa.field("peak", pa.float64(), nullable=False),
        pa.field("group", _TEXT),
        pa.field("role", _TEXT),
        pa.field("levels", pa.binary()),
        pa.field("metadata", _TEXT, nullable=False),
    ]
)
FIELD_NAMES = tuple(name for name in RECORD_SCHEMA.names if name != "latent")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # numpy makes them each time
FIELDS_TYPE = pa.struct([field for field in RECORD_SCHEMA if field.name != "latent"])


def record_fields(record: Record) -> dict[str, Any]:
    """Return a record's stored fields except the latent, as plain Python values by name."""
    converted = {
        "shape": [int(size) for size in record.latent.shape],
        "dtype": _DTYPE_NAMES[record.latent.dtype],
        "metadata": json_text(record.metadata),
    }
    return {
        name: converted[name] if name in converted else getattr(record, name)
        for name in FIELD_NAMES
    }


def why_unstorable(record: Record) -> str | None:
    """Return why a record's fields cannot be stored; None if they can be.

    A bad field of one item must not fail its unit: an unpaired surrogate in a name, a sample rate
    beyond 32 bits, metadata that Python cannot serialise.
    """
    try:
        pa.scalar(record_fields(record), FIELDS_TYPE)
    except (ValueError, TypeError, OverflowError, RecursionError, pa.ArrowException) as error:
        return f"its fields cannot be stored ({type(error).__name__}: {as_text(str(error))})"
    return None


def as_text(value: str) -> str:
    """Replace characters that UTF-8 cannot encode by escapes such as `\\udc80`."""
    return value.encode(errors="backslashreplace").decode()


def record_from_fields(fields: Mapping[str, Any], latent: Latent) -> Record:
    """Inverse of `record_fields`.

    Raises LookupError, ValueError or TypeError if the fields are not valid for a record.
    """
    given = {field.name for field in dataclasses.fields(Record)} - {"latent", "levels", "metadata"}
    metadata = parse_json(fields["metadata"])
    numbers = [fields[name] for name in ("num_samples", "sample_rate", "rms", "peak")]
    if not isinstance(metadata, dict) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError("fields of wrong types")
    if fields["sample_rate"] <= 0 or fields["num_samples"] < 0:
        raise ValueError("invalid length or sample rate")
    return Record(
        latent=latent,
        levels=levels_of(fields),
        metadata=metadata,
        **{name: fields[name] for name in given},
    )


def levels_of(fields: Mapping[str, Any]) -> bytes | None:
    """Return the levels in a record's stored fields: bytes in Parquet, base64 in a tar's JSON."""
    levels = fields.get("levels")  # stores of earlier versions have none
    return base64.b64decode(levels) if isinstance(levels, str) else levels


def json_fields(record: Record) -> dict[str, Any]:
    """Return a record's stored fields as JSON values."""
    levels = None if record.levels is None else base64.b64encode(record.levels).decode()
    return record_fields(record) | {"levels": levels}


def json_text(value: Any) -> str:
    """Format a value as JSON that UTF-8 can encode."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, which must be escaped
        return json.dumps(value)
    return text


class ItemEntry(Document):
    """Result of one item of a unit, and the position of its latent in the shard."""

    key: str
    status: Status
    reason: str | None = Field(
        None,
        description="Why the item was skipped or failed. Of an encoded item: why it could not be "
        "encoded again, so that the record of an earlier revision was kept.",
    )
    row: Bytes | None = Field(
        None,
        description="Number of the record in the shard. Commits of earlier versions do not contain "
        "it: their records are in the plan's order.",
    )
    offset: Bytes | None = Field(None, description="First byte of the latent in the shard.")
    length: Bytes | None = Field(None, description="Length of the latent in bytes.")
    hash: str | None = Field(
        None, pattern="^[0-9a-f]{1,16}$", description="xxh3-64 of the latent's bytes, hex."
    )
    shape: tuple[Size, ...] | None = Field(
        None,
        min_length=2,
        max_length=3,
        description="[channels, frames] or [chunks, channels, frames].",
    )
    num_samples: Bytes | None = Field(
        None, description="Length of the audio in samples at the model's rate."
    )
    input: str | None = Field(
        None,
        description="In a field: hash of the input of the value, also if computing it failed; "
        "null if the base store has no latent of the item.",
    )
    fields_offset: Bytes | None = Field(None, description="Tar: first byte of the JSON member.")
    fields_length: Bytes | None = Field(None, description="Tar: length of the JSON member.")

    @property
    def kept(self) -> bool:
        """Whether the record is that of an earlier revision: encoding it again failed."""
        return self.status == "encoded" and self.reason is not None


class StatisticsEntry(Document):
    """Statistics of each latent channel over all frames."""

    frames: Bytes
    mean: list[float]
    m2: list[float] = Field(description="Sum of squared deviations from the mean.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != len(self.m2):
            raise ValueError("mean and m2 have different numbers of channels")
        return self


class Commit(Document):
    """Makes a unit's shard part of the store: commits/UNIT.json or commits/UNIT.rN.json.

    It is written after the shard. Of a unit's commits, the one with the highest revision counts.
    """

    format_version: Literal[1, 2] = 2
    unit: NameInStore
    revision: int = Field(
        0,
        ge=0,
        description="Starts at 0, or for a dropped field at the number in fields/NAME.dropped; "
        "increases each time the unit is encoded.",
    )
    fingerprint: str
    shard: NameInStore | None = Field(
        None,
        description="Path of the shard of this revision; null if no item was encoded.",
    )
    bytes: int = Field(description="Size of the shard in bytes.")
    hash: str | None = Field(None, description="xxh3-128 of the shard's bytes, hex.")
    rows: int = Field(description="Number of records in the shard.")
    audio_seconds: float = Field(description="Seconds of audio that were encoded.")
    items: list[ItemEntry] = Field(description="Every item of the unit, in the plan's order.")
    items_hash: str | None = Field(
        None,
        description="Hash of the unit's items in the plan at the time of encoding. In a field: "
        "null if values of earlier files were kept.",
    )
    copied_from: str | None = Field(
        None,
        description="In an exported store: `hash` of the commit whose records were copied, and "
        "after a + the hash of the annotations that were copied with them.",
    )
    statistics: StatisticsEntry | None = None
    timings: dict[str, float] = Field(description="Seconds by stage, and audio_seconds encoded.")
    worker: str = Field("", description="HOST:PID of the process that encoded the unit.")
    finished: str = Field("", description="UTC time of the commit, ISO 8601.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        encoded = [item for item in self.items if item.status == "encoded"]
        located = all(
            None not in (item.offset, item.length, item.hash, item.shape) for item in encoded
        )
        if not located or len(encoded) != self.rows or (self.shard is None) != (self.rows == 0):
            raise ValueError("the items do not match the shard")
        rows = [item.row for item in encoded if item.row is not None]
        if rows and sorted(rows) != list(range(self.rows)):
            raise ValueError("the rows are not those of the shard")
        return self

    def count(self, status: Status) -> int:
        """Return the number of items with this status."""
        return sum(item.status == status for item in self.items)


class DatasetInfo(Document):
    """Description of a store: dataset.json (the seal), written when a run is complete."""

    format_version: Literal[1, 2, 3] = Field(
        2, description="3 for a view and for a store with annotations, 2 for other stores."
    )
    latentmill_version: str
    format: ShardFormat
    layout: Literal["time-major", "chunks"] = Field(
        description="Order of a latent's bytes: frame by frame, or [chunks, channels, frames]."
    )
    dtype: Literal["float16", "float32"]
    model: dict[str, Any] = Field(
        description="Name, rate, scale factor and weights; `asked`, `options` and `asked_channels` "
        "are the user's settings."
    )
    chunking: dict[str, Any]
    fingerprint: str
    source: str
    items: int = Field(description="Number of items in the plan.")
    encoded: int
    skipped: int
    failed: int
    hours: float = Field(description="Hours of encoded audio.")
    frames: int = Field(description="Number of latent frames in all records.")
    mean: list[float] = Field(description="Mean of every latent channel.")
    std: list[float] = Field(description="Standard deviation of every latent channel.")
    origin: NameInStore = Field(description="File with the latent of one chunk of silence [D, Z].")
    shards: list[ShardEntry]
    seal: str | None = Field(
        None, description="xxh3-128 over the names and hashes of the commits that were sealed."
    )
    revisions: dict[str, int] = Field({}, description="Revision of each unit; other units have 0.")
    index: str = Field(
        "index.arrow", pattern=INDEX_NAME, description="File with the location of every record."
    )
    index_hash: str | None = Field(None, description="xxh3-128 of the index file's bytes, hex.")
    metadata: str | None = Field(
        None,
        pattern=METADATA_NAME,
        description="Parquet file with the fields of every record except its latent. Stores of "
        "earlier versions do not have it.",
    )
    metadata_hash: str | None = Field(
        None, description="xxh3-128 of the metadata file's bytes, hex."
    )
    annotation: AnnotationEntry | None = Field(
        None, description="Metadata added after encoding; stores without it have no such field."
    )
    field: FieldEntry | None = Field(
        None, description="Field: what it is; other stores have no such field."
    )
    base_seal: str | None = Field(
        None,
        description="Field: state of the base store that the values were compared with; empty if "
        "it was not sealed, or if the field kept values of earlier files.",
    )
    bases: list[BaseEntry] = Field([], description="View: the stores that have its records.")
    left_out: dict[str, int] = Field(
        {}, description="View: number of records of the bases that are not in it, by reason."
    )
    left_out_file: str | None = Field(
        None,
        pattern=LEFT_OUT_NAME,
        description="View: Parquet file with the keys and reasons of the records in `left_out`.",
    )
    seams: SeamEntry | None = Field(
        None, description="Format version 1 only; later versions have evaluation/seams.json."
    )
    linearity: LinearityEntry | None = Field(
        None, description="Format version 1 only; later versions have evaluation/linearity.json."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_facts({"model": self.model, "chunking": self.chunking}, "model", "chunking")
        channels = self.model["latent_channels"]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError("mean and std do not match the model's number of channels")
        if self.format_version == 3:
            if not self.bases and self.annotation is None:
                raise ValueError("a store of format version 3 has bases or annotations")
        elif self.bases:
            raise ValueError("a view has format version 3")
        return self

    @property
    def frame_rate(self) -> float | None:
        """Latent frames per second; None for fields of vectors or tokens."""
        rate: float = self.model["sample_rate"] / self.model["hop"]
        return None if self.field and self.field.vectors else rate


_Kind = TypeVar("_Kind", bound=BaseModel)


def parse_document(kind: type[_Kind], data: bytes, path: str, hint: str) -> _Kind:
    """Parse a JSON document such as a commit or dataset.json.

    Raises StoreError if it is damaged or has an unsupported format version. The error contains
    `path`, and for a damaged document `hint`: what to do.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        for fault in error.errors():
            if fault["loc"] == ("format_version",):
                raise StoreError(
                    f"{path} has format version {fault['input']}, but this version of latentmill "
                    f"reads 1 to {_newest(kind)}: use the version that wrote it."
                ) from error
            if fault["type"] == "value_error" and "not the name of a file" in fault["msg"]:
                raise StoreError(
                    f"{path} refers to a file outside of the store, {fault['input']!r}: do not use "
                    "this store, or restore the file from a copy."
                ) from error
        raise StoreError(f"{path} is damaged: {hint}.") from error


def _newest(kind: type[BaseModel]) -> int:
    return int(max(get_args(kind.model_fields["format_version"].annotation)))


def commit_path(unit: str, revision: int = 0) -> str:
    return f"{COMMITS}/{_stem(unit, revision)}.json"


def shard_path(unit: str, format_name: str, revision: int = 0) -> str:
    return f"{SHARDS}/{_stem(unit, revision)}{extension(format_name)}"


def _stem(unit: str, revision: int) -> str:
    return f"{unit}.r{revision}" if revision else unit


_NAME = re.compile(r"(\d+)(?:\.r([1-9]\d*))?\.(?:json|parquet|tar)")


def parse_name(name: str) -> tuple[str, int] | None:
    """Parse the file name of a commit or shard into unit and revision; None for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1], int(match[2] or 0))
