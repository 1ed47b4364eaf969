"""Result of encoding an item: a record, or the reason why it failed or was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from latentmill.text.shown import Shown

Status = Literal["encoded", "skipped", "failed"]
ShardFormat = Literal["parquet", "webdataset"]
FloatArray = npt.NDArray[np.float32]
Latent = npt.NDArray[np.float16] | npt.NDArray[np.float32]

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True, repr=False)
class Record(Shown):
    """One item's latent and everything that is stored beside it.

    Attributes:
        key: The item's key.
        latent: `[channels, frames]`, float16 or float32; with `stitch: none` the overlapping
            chunks `[chunks, channels, frames]`.
        num_samples: Length of the encoded audio at the model's rate.
        sample_rate: The model's rate, Hz.
        source_uri: Where the audio came from.
        source_sample_rate: Hz.
        source_channels: Audio channels in the source.
        content_hash: `xxh3:` and the hex digest over the source file's bytes.
        rms: Root mean square of the audio that the model saw.
        peak: Largest absolute sample of the audio that the model saw.
        group: What belongs together (the song of a stem), if known.
        role: What the item is in its group (`drums`, `vocals`), if known.
        levels: How loud each frame is, one byte a frame (`levels.decibels` reads them); None with
            `stitch: none`.
        metadata: The item's own metadata, as it was given.
    """

    key: str
    latent: Latent = field(repr=False)
    num_samples: int
    sample_rate: int
    source_uri: str
    source_sample_rate: int
    source_channels: int
    content_hash: str
    rms: float
    peak: float
    group: str | None = None
    role: str | None = None
    levels: bytes | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> Mapping[str, object]:
        """What `repr` and a notebook show."""
        named = {"group": self.group, "role": self.role, "metadata": dict(self.metadata) or None}
        return {
            "key": repr(self.key),
            "latent": f"{self.latent.dtype} {list(self.latent.shape)}",
            "duration": f"{self.duration:.2f} s",
            **{name: value for name, value in named.items() if value is not None},
            "source_uri": repr(self.source_uri),
        }

    @property
    def duration(self) -> float:
        """Seconds of encoded audio."""
        return self.num_samples / self.sample_rate

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return int(self.latent.shape[-2])

    @property
    def frames(self) -> int:
        """Latent frames; with `stitch: none` the frames of one chunk."""
        return int(self.latent.shape[-1])


@dataclass(frozen=True)
class Outcome:
    """How one item ended.

    Attributes:
        key: The item's key.
        status: `encoded`, `skipped` (with the filter's name) or `failed` (with the error).
        reason: Why it was skipped or failed, one line.
        record: The record of an encoded item.
    """

    key: str
    status: Status
    reason: str | None = None
    record: Record | None = None


def time_major_bytes(latent: Latent) -> memoryview:
    """The latent's bytes as they are stored: frame after frame, each frame its channels.

    Overlapping chunks `[chunks, channels, frames]` are stored in C order, chunk after chunk.
    Copies only if the latent is not already laid out that way.
    """
    flat = latent.T if latent.ndim == 2 else latent
    return np.ascontiguousarray(flat).data.cast("B")


def latent_from_bytes(data: bytes | memoryview, shape: tuple[int, ...], dtype: str) -> Latent:
    """The inverse of `time_major_bytes`: a read-only view of `data`, of the given shape."""
    flat: Latent = np.frombuffer(data, dtype=DTYPES[dtype])
    if len(shape) == 2:
        return flat.reshape(shape[::-1]).T
    return flat.reshape(shape)
