"""Result of encoding an item: a record, or the reason why it failed or was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from latentmill.text.shown import Shown

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

Status = Literal["encoded", "skipped", "failed"]
ShardFormat = Literal["parquet", "webdataset"]
FloatArray = npt.NDArray[np.float32]
Latent = npt.NDArray[np.float16] | npt.NDArray[np.float32]
LatentLike: TypeAlias = "Latent | torch.Tensor"

DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
MIXES = ("mix", "mixture")  # roles of items that are the sum of the others in their group
LOUDEST, STEPS_PER_DB = 255, 2  # of stored levels: 255 is 0 dB, 0 is silence


@dataclass(frozen=True, repr=False)
class Record(Shown):
    """The latent of an item and its properties.

    Attributes:
        key: The item's key.
        latent: `[channels, frames]`, float16 or float32; with `stitch: none` the overlapping
            chunks `[chunks, channels, frames]`.
        num_samples: Number of samples of the encoded audio, at the model's sample rate.
        sample_rate: Sample rate of the model, Hz.
        source_uri: Path or URL of the audio.
        source_sample_rate: Sample rate of the source, Hz.
        source_channels: Audio channels of the source.
        content_hash: `xxh3:` and the hex digest of the source file's bytes.
        rms: Root mean square of the audio at the model's input; 1.0 is full scale.
        peak: Largest absolute sample of the audio at the model's input; 1.0 is full scale.
        group: Name of the group that the item belongs to (the song of a stem), if known.
        role: Role of the item in its group (`drums`, `vocals`), if known.
        levels: Loudness of each frame, one byte per frame, which
            `latentmill.record.decibels` reads; None with `stitch: none`.
        metadata: The item's metadata from the source, unchanged.
    """

    # Decodes the start for the player of a notebook, if it is at hand: returns audio and its rate.
    # Not a field, because it is not part of the record: copies and pickles do not have it.
    _decode_start: ClassVar[Any] = None

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
        """The fields that `repr` and a notebook show."""
        named = {"group": self.group, "role": self.role, "metadata": dict(self.metadata) or None}
        return {
            "key": repr(self.key),
            "latent": f"{self.latent.dtype} {list(self.latent.shape)}",
            "duration": f"{self.duration:.2f} s",
            **{name: value for name, value in named.items() if value is not None},
            "source_uri": repr(self.source_uri),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_decode_start"}

    def _repr_html_(self) -> str:
        from latentmill.pictures.notebook import latent_html

        start = None if self._decode_start is None else self._decode_start()
        return super()._repr_html_() + latent_html(self.latent, self._level_db(), start)

    def plot(self) -> Figure:
        """Plot the level and the latent over time, with matplotlib.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from latentmill.pictures.plots import plot_latent

        return plot_latent(self.latent, self._level_db(), self.duration, self.key)

    def _level_db(self) -> FloatArray | None:
        return decibels(self.levels) if self.levels else None

    @property
    def duration(self) -> float:
        """Length of the encoded audio in seconds."""
        return self.num_samples / self.sample_rate

    @property
    def channels(self) -> int:
        """Number of channels of the latent."""
        return int(self.latent.shape[-2])

    @property
    def frames(self) -> int:
        """Number of latent frames; with `stitch: none` that of one chunk."""
        return int(self.latent.shape[-1])


def as_array(values: Any) -> Any:
    """A tensor on any device as a numpy array, floats as float32; other values are unchanged."""
    if not hasattr(values, "detach"):  # not `isinstance`, because torch is slow to import
        return values
    tensor = values.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def decibels(levels: bytes) -> FloatArray:
    """Convert stored levels to dB of full scale, float32 `[frames]`. Silence is -inf."""
    steps = np.frombuffer(levels, np.uint8).astype(np.float32)
    result: FloatArray = np.where(steps > 0, (steps - LOUDEST) / STEPS_PER_DB, -np.inf).astype(
        np.float32
    )
    return result


@dataclass(frozen=True)
class Outcome:
    """Result of encoding one item.

    Attributes:
        key: The item's key.
        status: `encoded`, `skipped` or `failed`.
        reason: One line: the filter that skipped the item, or the error. Of an encoded item: the
            error that kept it from being encoded again, if `record` is the earlier one.
        record: The record of an encoded item.
    """

    key: str
    status: Status
    reason: str | None = None
    record: Record | None = None


def absent_reason(status: str, reason: str | None) -> str:
    """Why a field skips an item that its store has no latent of."""
    return f"{status} in the base store: {reason}"


def time_major_bytes(latent: Latent) -> memoryview:
    """The latent's bytes in the stored order: frame after frame, all channels of each frame.

    Overlapping chunks `[chunks, channels, frames]` are stored in C order, chunk after chunk. The
    latent is copied only if its memory is in another order.
    """
    flat = latent.T if latent.ndim == 2 else latent
    return np.ascontiguousarray(flat).data.cast("B")


def latent_from_bytes(data: bytes | memoryview, shape: tuple[int, ...], dtype: str) -> Latent:
    """The inverse of `time_major_bytes`: a read-only view of `data` with the given shape."""
    flat: Latent = np.frombuffer(data, dtype=DTYPES[dtype])
    if len(shape) == 2:
        return flat.reshape(shape[::-1]).T
    return flat.reshape(shape)
