"""The fields of samples: how a field is cut to a sample, and what it looks like in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from latentmill.errors import ConfigError
from latentmill.ops import Origin
from latentmill.reader.order import Ints

Values = npt.NDArray[Any]  # float32, or int64 for codes
Mask = npt.NDArray[np.bool_]


class FieldBatch(NamedTuple):
    """A field of a batch.

    Attributes:
        values: frames and codes `[B, D, n]`, tokens `[B, n, D]`, vectors `[B, D]` (`[B, n, D]` if
            each window of an item has one). float32; codes are int64.
        mask: `[B, n]`, True for values of the item and False for padding; `[B]` for vectors.
    """

    values: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class FieldForm:
    """What a field's arrays are.

    Attributes:
        kind: `frames`, `codes`, `tokens` or `vector`.
        single: Whether an item has one vector only.
    """

    kind: str
    single: bool = False

    def __str__(self) -> str:
        if self.kind == "vector":
            return "one vector" if self.single else "a vector for each window"
        return self.kind

    @property
    def timed(self) -> bool:
        """Whether the field has a rate, so that crops are cut from it."""
        return self.kind in ("frames", "codes")

    def arranged(self, block: Any) -> Any:
        """A block `[B, n, D]` in the shape that a batch has; see `FieldBatch`."""
        if self.timed:
            return block.swapaxes(1, 2)
        return block[:, 0] if self.single else block

    def block(self, arranged: torch.Tensor) -> torch.Tensor:
        """The block that `arranged` has made a tensor of."""
        if self.timed:
            return arranged.transpose(1, 2)
        return arranged[:, None] if self.single else arranged

    def masked(self, mask: Any) -> Any:
        """A mask `[B, n]` in the shape that a batch has."""
        return mask[:, 0] if self.single else mask


@dataclass(frozen=True)
class FieldValue:
    """A field of one sample.

    Attributes:
        values: frames and codes `[D, n]`, tokens `[n, D]`, a vector `[D]` (`[n, D]` if each window
            of the item has one). float32; codes are int64.
        mask: `[n]`, True for values of the item and False for padding; `[]` for a vector.
        form: What the values are.
        rate: Frames of the field per frame of the latents; 0 for fields without a rate.
        shift: Position of the start of the sample's latents, in frames of the field from `values`'
            first one.
        empty: What `Drop` puts in the place of the values, of the same form; None if the field has
            none.
        origin: The latent of silence, which pads the values; None for zeros.
    """

    values: Values = field(repr=False)
    mask: Mask = field(repr=False)
    form: FieldForm
    rate: float = 0.0
    shift: float = 0.0
    empty: Values | None = field(default=None, repr=False)
    origin: Origin | None = field(default=None, repr=False)

    @property
    def time_major(self) -> Values:
        """The values as `[n, D]`."""
        if self.form.single:
            return self.values[None]
        return self.values.T if self.form.timed else self.values

    def padded(self, length: int) -> FieldValue:
        """The field with padding after its end, `length` frames or tokens in all."""
        rows = self.time_major
        have, dimensions = rows.shape
        if have >= length:
            return self
        padding = np.zeros((length - have, dimensions), rows.dtype)
        if self.origin is not None:
            padding[:] = self.origin.crop(length, have, length - have).T
        mask = np.pad(self.mask, (0, length - have))
        joined = np.concatenate([rows, padding])
        return replace(self, values=joined.T if self.form.timed else joined, mask=mask)


def collate_field(values: Sequence[FieldValue]) -> FieldBatch:
    """Make a batch of one field; shorter values are padded.

    Raises:
        ConfigError: The values are of different kinds or dimensions.
    """
    form = values[0].form
    shapes = {(value.form, value.time_major.shape[1]) for value in values}
    if len(shapes) > 1:
        raise ConfigError(
            "fields with different kinds or dimensions cannot be in one batch: use stores whose "
            "fields were made with one model."
        )
    length = max(len(value.time_major) for value in values)
    padded = [value.padded(length) for value in values]
    block = torch.from_numpy(np.stack([value.time_major for value in padded]))
    masks = torch.from_numpy(np.stack([value.mask for value in padded]))
    return FieldBatch(form.arranged(block), masks)


@dataclass(frozen=True)
class Cutting:
    """How a field with a rate is cut to the crops of the latents.

    The crop of a field has the frames whose middle is nearest to the middle of the latents' crop:
    `ceil(crop * rate)` of them, so that consecutive crops have no gap between them.

    Attributes:
        rate: Frames of the field per frame of the latents, as numerator and denominator.
    """

    rate: tuple[int, int]

    @classmethod
    def of(cls, latents: Any, values: Any) -> Cutting:
        """From the models of the latents and of the field."""
        above = int(latents["hop"]) * int(values["sample_rate"])
        below = int(latents["sample_rate"]) * int(values["hop"])
        common = math.gcd(above, below)
        return cls((above // common, below // common))

    def frames(self, crop: int) -> int:
        """Number of frames of the field in each crop of `crop` latent frames."""
        above, below = self.rate
        return -(-crop * above // below)

    def starts(self, starts: Ints, crop: int) -> Ints:
        """First frames of the field's crops, from those of the latents' crops."""
        above, below = self.rate
        # The middle, less half of the field's frames, rounded half up: all times 2 * below.
        twice = (2 * starts + crop) * above - self.frames(crop) * below
        found: Ints = (twice + below) // (2 * below)
        return found

    def shifts(self, starts: Ints, field_starts: Ints) -> npt.NDArray[np.float64]:
        """Positions of the latents' first frames inside the field's crops, in its frames."""
        above, below = self.rate
        return (starts * above - field_starts * below) / below
