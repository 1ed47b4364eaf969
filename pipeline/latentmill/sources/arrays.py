"""Columns of audio in tables: bytes of audio files, or samples.

Samples are lists of numbers with a second column for their rate, or structs of both (`array`,
`sampling_rate`), which `datasets` writes for audio that it has loaded. They are converted to a WAV
file of 32-bit floats.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentmill.errors import ItemError, SourceError
from latentmill.record import FloatArray
from latentmill.sources.columns import is_audio, is_binary, struct_fields

LISTS = ("audio", "waveform", "samples")
"""Names of list columns that are used as audio by default."""

RATES = ("sampling_rate", "sample_rate", "samplerate", "sr", "rate")
_MOST_CHANNELS = 64


@dataclass(frozen=True)
class AudioColumn:
    """A column of audio.

    Attributes:
        name: Name of the column.
        kind: `bytes`; `file`, a struct of bytes and path; `struct`, of array and sampling_rate; or
            `list`, of samples.
        rate: For a list, the column that holds the sample rate.
    """

    name: str
    kind: Literal["bytes", "file", "struct", "list"]
    rate: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns of the table that are read for a cell."""
        return {
            "bytes": [self.name],
            "file": [f"{self.name}.bytes"],
            "struct": [f"{self.name}.array", f"{self.name}.sampling_rate"],
            "list": [self.name, self.rate],
        }[self.kind]

    def read(self, batch: pa.RecordBatch, row: int) -> bytes | None:
        """The cell as the bytes of an audio file; None if it is empty.

        Raises ItemError if its samples have an invalid shape or rate.
        """
        column = batch.column(self.name)
        if self.kind in ("bytes", "file"):
            data: bytes | None = (column.field("bytes") if self.kind == "file" else column)[
                row
            ].as_py()
            return data
        rate = column.field("sampling_rate") if self.kind == "struct" else batch.column(self.rate)
        samples = (column.field("array") if self.kind == "struct" else column)[row]
        if not samples.is_valid:
            return None
        return _wav(_matrix(samples.values), rate[row].as_py())


def audio_column(schema: pa.Schema, name: str, uri: str) -> AudioColumn:
    """The column `name` of a table, with the way in which it holds audio.

    Raises SourceError if it holds no audio, or if the sample rate is missing.
    """
    index = schema.get_field_index(name)
    kind = schema.field(index).type if index >= 0 else None
    if kind is None:
        raise SourceError(f"{uri} has no column {name}: choose one of {', '.join(schema.names)}.")
    if is_audio(kind):
        return AudioColumn(name, "file")
    if is_binary(kind):
        return AudioColumn(name, "bytes")
    samples = kind.field("array").type if is_array(kind) else kind
    if not _is_list(samples):
        raise SourceError(
            f"{uri}: column {name} contains no audio bytes or samples: choose another column."
        )
    number = _number(samples)
    if not (pa.types.is_floating(number) or number in (pa.int16(), pa.int32())):
        raise SourceError(
            f"{uri}: column {name} holds lists of {number}, which are not samples: cast them to "
            "floats or to integers of 16 or 32 bits."
        )
    if is_array(kind):
        return AudioColumn(name, "struct")
    rate = next((rate for rate in RATES if rate in schema.names), None)
    if rate is None:
        raise SourceError(
            f"{uri}: column {name} holds lists of numbers ({kind}) and no column "
            "gives their sample rate: add a column sampling_rate."
        )
    return AudioColumn(name, "list", rate)


def is_array(kind: pa.DataType) -> bool:
    """Whether a column is a struct of `array` and `sampling_rate`."""
    fields = struct_fields(kind)
    return "sampling_rate" in fields and "array" in fields and _is_list(fields["array"])


def is_samples(field: pa.Field) -> bool:
    """Whether a column is a list of numbers whose name is in `LISTS`."""
    number = _number(field.type)
    numeric = pa.types.is_floating(number) or pa.types.is_integer(number)
    return bool(field.name.lower() in LISTS and _is_list(field.type) and numeric)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _number(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _matrix(values: pa.Array) -> FloatArray:
    """Samples `[n, C]` from a list of samples or a list of channels."""
    if not _is_list(values.type):
        return _floats(values).reshape(-1, 1)
    if _is_list(values.type.value_type):
        raise ItemError("its samples are nested in three levels of lists: use one or two")
    channels = [_floats(one.values) for one in values if one.is_valid]
    if not channels or len({len(one) for one in channels}) > 1 or len(channels) != len(values):
        raise ItemError("its channels have different lengths")
    matrix: FloatArray = np.stack(channels, axis=1)
    if matrix.shape[1] > _MOST_CHANNELS >= matrix.shape[0]:  # a list of frames
        matrix = matrix.T
    if matrix.shape[1] > _MOST_CHANNELS:
        raise ItemError(f"its samples have {matrix.shape[1]} channels: at most 64 are supported")
    return matrix


def _floats(values: pa.Array) -> FloatArray:
    if values.null_count:
        raise ItemError("some of its samples are missing")
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind == "i":
        numbers = numbers / 2.0 ** (8 * numbers.dtype.itemsize - 1)
    return np.asarray(numbers, np.float32)


def _wav(samples: FloatArray, rate: Any) -> bytes:
    """A WAV file of 32-bit floats."""
    if not isinstance(rate, int | float) or not 0 < rate < 2**32 or rate != int(rate):
        raise ItemError(f"its sample rate is not valid: {rate!r}")
    if not len(samples):
        raise ItemError("it holds no samples")
    data = np.ascontiguousarray(samples, "<f4").tobytes()
    if len(data) >= 2**32 - 64:
        raise ItemError("its samples exceed 4 GiB, the limit of a WAV file")
    channels = samples.shape[1]
    width = 4 * channels
    fmt = struct.pack("<HHIIHH", 3, channels, int(rate), int(rate) * width, width, 32)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body
