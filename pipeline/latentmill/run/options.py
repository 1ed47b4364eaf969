"""Keyword settings of `encode` and `add`, for editors and type checkers.

Generated from `RunConfig` by `make schemas`. What each setting means: `latentmill encode --help`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class EncodeOptions(TypedDict, total=False):
    """Settings of `encode`; None is the same as omitting the setting."""

    source_type: Literal["folder", "manifest", "webdataset", "parquet"] | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    extensions: Sequence[str] | None
    path_column: str | None
    start_column: str | None
    duration_column: str | None
    key_column: str | None
    audio_column: str | None
    group_by: str | None
    format: Literal["parquet", "webdataset"] | None
    log_format: Literal["text", "json"] | None
    model: str | None
    model_options: Mapping[str, str | int | float | bool | None] | None
    channels: Literal["mono", "split"] | None
    precision: Literal["float32", "tf32", "bf16", "fp16"] | None
    dtype: Literal["float16", "float32"] | None
    compile: bool | None
    stitch: Literal["trim", "crossfade", "none", "state"] | None
    chunk_seconds: float | None
    chunk_samples: int | None
    overlap: float | None
    allow_truncated: bool | None
    min_seconds: float | None
    max_seconds: float | None
    min_rms: float | None
    min_sample_rate: int | None
    max_sample_rate: int | None
    min_channels: int | None
    max_channels: int | None
    where: str | None
    unit_seconds: float | None
    shard_size: int | str | None
    probe: bool | None
    retry_failed: bool | None
    extend: bool | None
    retry_changed: bool | None
    refresh_metadata: bool | None
    with_fields: Mapping[str, str | Mapping[str, Any]] | None
    device: str | None
    workers: int | None
    threads: int | None
    batch_size: int | None
    load_threads: int | None
    load_tasks: int | None
    load_timeout: float | None
    address: str | None
    stall_minutes: float | None


class AddOptions(TypedDict, total=False):
    """Settings of `add`; None is the same as omitting the setting."""

    log_format: Literal["text", "json"] | None
    model_options: Mapping[str, str | int | float | bool | None] | None
    channels: Literal["mono", "split"] | None
    precision: Literal["float32", "tf32", "bf16", "fp16"] | None
    dtype: Literal["float16", "float32"] | None
    compile: bool | None
    stitch: Literal["trim", "crossfade", "none", "state"] | None
    chunk_seconds: float | None
    chunk_samples: int | None
    overlap: float | None
    retry_failed: bool | None
    device: str | None
    workers: int | None
    threads: int | None
    batch_size: int | None
    load_threads: int | None
    load_tasks: int | None
    load_timeout: float | None
    address: str | None
    stall_minutes: float | None
