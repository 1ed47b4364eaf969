"""Reading the fields of records: the same seconds as the latents, in the same batch of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from latentmill.errors import ConfigError
from latentmill.reader.cache import RangeCache
from latentmill.reader.crops import CropReader, CropRequest, Raw
from latentmill.reader.field_values import Cutting, FieldForm, FieldValue, Mask, Values
from latentmill.reader.order import Ints
from latentmill.store.field_layout import FIELDS
from latentmill.store.field_view import FieldOfView, warn_of_state
from latentmill.store.seal import read_origin
from latentmill.store.store import LatentStore
from latentmill.store.thread_copy import thread_copy

Missing = Literal["error", "leave_out"]


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of fields to read; ConfigError unless they are a list of different names."""
    if isinstance(names, str) or len(set(names)) < len(names):
        raise ConfigError(f"fields is {names!r}: give a list of different names.")
    return tuple(names)


def form_of(store: LatentStore) -> FieldForm:
    """What the arrays of a field are."""
    entry = store.info.field
    kind = entry.kind if entry is not None else "codes" if store.codes else "frames"
    windows = entry is not None and entry.window_seconds is not None
    return FieldForm(kind, single=kind == "vector" and not windows)


def check_forms(stores: Sequence[LatentStore]) -> None:
    """Raise ConfigError if fields of several stores do not have the same form."""
    first, *others = stores
    for store in others:
        if form_of(store) != form_of(first):
            raise ConfigError(
                f"{first.url} and {store.url} cannot be mixed, because an item has "
                f"{form_of(first)} in one and {form_of(store)} in the other: add both fields with "
                "the same command."
            )


class FieldCrops(CropReader):
    """Reads the values of one field, as part of a batch that the reader of the latents reads."""

    def __init__(self, store: LatentStore, cache: RangeCache | None = None) -> None:
        self.name = store.url.rpartition("/")[2]
        super().__init__(store, cache)
        self.form = form_of(store)
        self.dtype = torch.int64 if self.form.kind == "codes" else torch.float32

    def placed(self, path: str) -> str:
        if isinstance(self.store, FieldOfView):
            return self.store.path_in_view(path)
        return f"{FIELDS}/{self.name}/{path}"

    def check(self, store: LatentStore) -> None:
        """Raise ConfigError if the field holds overlapping chunks (`stitch: none`)."""
        if store.info.layout == "chunks":
            raise ConfigError(
                f"{store.url} holds overlapping chunks (stitch none), which cannot be cropped: add "
                "the field with --stitch trim or --stitch crossfade."
            )

    @cached_property
    def empty(self) -> Values | None:
        """The value of an empty text; None if the field has none, or is cut to crops."""
        if self.form.timed:
            return None
        value: Values = self.form.arranged(read_origin(self.store.storage).T[None])[0]
        return value

    def pad(self, target: Raw, starts: Ints, have: Ints) -> None:
        """Write silence, or zeros for a field without a rate, after the end of items."""
        if self.form.timed:
            super().pad(target, starts, have)
            return
        for row, length in zip(target, have.tolist(), strict=True):
            row[length:] = 0


@dataclass(frozen=True)
class Located:
    """Where one field of some samples is.

    Attributes:
        reader: Reader of the field.
        rows: The samples' rows in the field's index.
        starts: First value of each sample.
        have: Number of values of each sample that the item has.
        length: Number of values of each sample after padding.
        shifts: See `FieldValue.shift`.
        rate: See `FieldValue.rate`.
    """

    reader: FieldCrops
    rows: Ints
    starts: Ints
    have: Ints
    length: int
    shifts: Any
    rate: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the block that the values are read into."""
        return len(self.rows), self.length, self.reader.channels

    def request(self, block: torch.Tensor) -> CropRequest:
        """The values, to be read into a block."""
        return self.reader.request_of(self.rows, self.starts, self.have, block)

    def mask(self) -> Mask:
        """`[samples, values]`, True for values of the item."""
        mask: Mask = np.arange(self.length) < self.have[:, None]
        return mask

    def values(self, block: Raw, *, cropped: bool, placed: bool) -> list[FieldValue]:
        """The values of each sample, from the block that they were read into.

        Args:
            block: The block.
            cropped: Whether to keep the padding of a field with a rate.
            placed: Whether the origins are used for arithmetic.
        """
        form, reader = self.reader.form, self.reader
        arranged, masks = form.arranged(block), form.masked(self.mask())
        found = []
        for number, (start, have) in enumerate(
            zip(self.starts.tolist(), self.have.tolist(), strict=True)
        ):
            values, mask = arranged[number], masks[number]
            if not form.single and not (cropped and form.timed):
                values, mask = (values[:, :have] if form.timed else values[:have]), mask[:have]
            origin = reader.store.origin if form.timed else None
            if origin is not None and placed:
                origin = origin.at(int(reader.frames[self.rows[number]]), start)
            found.append(
                FieldValue(
                    values,
                    mask,
                    form,
                    rate=self.rate,
                    shift=float(self.shifts[number]),
                    empty=reader.empty if placed else None,
                    origin=origin,
                )
            )
        return found


class StoreFields:
    """The fields of one store that are read with its latents.

    Args:
        crops: Reader of the latents.
        fields: The stores of the fields.
        cache: As for `CropReader`.

    Raises:
        ConfigError: A field cannot be cropped.
    """

    def __init__(
        self, crops: CropReader, fields: Sequence[LatentStore], cache: RangeCache | None = None
    ) -> None:
        self._crops = crops
        for store in fields:
            warn_of_state(crops.store, store)
        self.readers = [FieldCrops(store, cache) for store in fields]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreFields:
        return thread_copy(self, memo, ["_rows"])

    @cached_property
    def _rows(self) -> list[Ints | None]:
        """For each field its row of each record, -1 if it has none; None if all are the same."""
        return [reader.rows_of(self._crops) for reader in self.readers]

    def complete(self, rows: Ints | None, missing: Missing) -> tuple[Ints | None, int]:
        """The rows whose records have a value of every field, and the number of the others.

        None stands for all rows. Raises ConfigError if a field has no value of some records and
        `missing` is `error`, or if no record is left.
        """
        store, left = self._crops.store, rows
        for reader, own in zip(self.readers, self._rows, strict=True):
            if own is None:
                continue
            before = np.arange(len(own)) if left is None else left
            has = own[before] >= 0
            if missing == "error" and not has.all():
                example = self._crops.key(int(before[~has][0]))
                raise ConfigError(
                    f"field {reader.name!r} of {store.url} has no value for "
                    f"{np.count_nonzero(~has)} of {len(before)} records, such as {example!r}: run "
                    "the same `latentmill add` again to compute missing values "
                    f"(`latentmill status {reader.store.url}` shows why others were skipped), or "
                    "leave these records out with missing_fields='leave_out'."
                )
            left = before[has]
            if not len(left):
                raise ConfigError(
                    f"no record of {store.url} has a value of all the fields: run `latentmill "
                    f"status {store.url}` to see what they lack."
                )
        if left is None or left is rows:
            return rows, 0
        return left, (len(self._crops.frames) if rows is None else len(rows)) - len(left)

    def locate(self, rows: Ints, starts: Ints, crop: int | None) -> list[Located]:
        """Where the fields of samples are, whose latents begin at `starts`.

        Without a crop, fields are whole.
        """
        return [
            self._located(reader, rows if own is None else own[rows], rows, starts, crop)
            for reader, own in zip(self.readers, self._rows, strict=True)
        ]

    def read(self, rows: Ints, starts: Ints, crop: int | None) -> ReadFields:
        """Prepare reading the fields of samples; arguments as for `locate`."""
        return ReadFields(self.locate(rows, starts, crop), len(rows), cropped=crop is not None)

    def _located(
        self, reader: FieldCrops, mine: Ints, rows: Ints, starts: Ints, crop: int | None
    ) -> Located:
        frames = reader.frames[mine].astype(np.int64)
        length = int(frames.max(initial=0))
        first, shifts, rate = np.zeros(len(rows), np.int64), np.zeros(len(rows)), 0.0
        if reader.form.timed:
            cutting = Cutting.of(self._crops.store.info.model, reader.store.info.model)
            rate = cutting.rate[0] / cutting.rate[1]
            if crop is not None:
                first, length = cutting.starts(starts, crop), cutting.frames(crop)
                # A crop that begins inside its item has at least one frame of the field.
                inside = starts < self._crops.frames[rows]
                first = np.where(inside, np.minimum(first, frames - 1), first)
                shifts = cutting.shifts(starts, first)
        have = np.clip(frames - first, 0, length)
        return Located(reader, mine, first, have, length, shifts, rate)


class ReadFields:
    """The fields of some samples, and the requests that read them.

    Attributes:
        requests: To be read by the reader of the latents.
    """

    def __init__(self, located: Sequence[Located], count: int, *, cropped: bool) -> None:
        self._located, self._count, self._cropped = located, count, cropped
        self._blocks = [
            torch.empty(one.shape, dtype=one.reader.dtype, device="cpu") for one in located
        ]
        self.requests = [
            one.request(block) for one, block in zip(located, self._blocks, strict=True)
        ]

    def samples(self, *, placed: bool) -> list[dict[str, FieldValue]]:
        """The fields of each sample, by name, once the requests were read; see `Located.values`."""
        found: list[dict[str, FieldValue]] = [{} for _ in range(self._count)]
        for one, block in zip(self._located, self._blocks, strict=True):
            values = one.values(block.numpy(), cropped=self._cropped, placed=placed)
            for fields, value in zip(found, values, strict=True):
                fields[one.reader.name] = value
        return found
