"""The settings that `encode` takes as keywords, by name and type, for editors and type checkers.

What each means: `RunConfig` in config.py, and docs. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from latentmill.models.base import Channels, Stitch
from latentmill.models.inference.precision import Precision
from latentmill.sources.base import SourceType


class EncodeOptions(TypedDict, total=False):
    """Settings of `encode`; None is the same as leaving one out."""

    source_type: SourceType | None
    model: str | None
    model_options: Mapping[str, str | int | float | bool | None] | None
    channels: Channels | None
    format: Literal["parquet", "webdataset"] | None
    dtype: Literal["float16", "float32"] | None
    precision: Precision | None
    compile: bool | None
    stitch: Stitch | None
    chunk_seconds: float | None
    chunk_samples: int | None
    overlap: float | None
    allow_truncated: bool | None
    min_seconds: float | None
    max_seconds: float | None
    extensions: Sequence[str] | None
    min_rms: float | None
    min_sample_rate: int | None
    max_sample_rate: int | None
    min_channels: int | None
    max_channels: int | None
    where: str | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    path_column: str | None
    start_column: str | None
    duration_column: str | None
    key_column: str | None
    audio_column: str | None
    group_by: str | None
    retry_failed: bool | None
    unit_seconds: float | None
    shard_size: int | str | None
    extend: bool | None
    retry_changed: bool | None
    probe: bool | None
    device: str | None
    workers: int | None
    threads: int | None
    decode_threads: int | None
    decode_tasks: int | None
    decode_timeout: float | None
    batch_size: int | None
    address: str | None
    stall_minutes: float | None
    log_format: Literal["text", "json"] | None
