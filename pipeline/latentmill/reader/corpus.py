"""One or several stores as one numbered list of samples, and reading those samples."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError, StoreError
from latentmill.reader.cache import RangeCache
from latentmill.reader.crops import CropReader
from latentmill.reader.field_crops import Missing, StoreFields, check_forms
from latentmill.reader.fields import FieldReader, Where, select
from latentmill.reader.order import Ints, random_below
from latentmill.reader.sample import Sample, StoredMetadata, Transform, sample_random, whole_number
from latentmill.record import FloatArray
from latentmill.store.describe import warn_incomplete
from latentmill.store.store import LatentStore
from latentmill.store.thread_copy import thread_copy

Mode = Literal["random", "start", "windows"]
Stores = str | os.PathLike[str] | LatentStore | Sequence[str | os.PathLike[str] | LatentStore]
_Option = TypeVar("_Option", bound=str)

# Fields of `model` in dataset.json about how it was requested and where it came from.
_NOT_IDENTITY = {"asked", "options", "asked_channels", "provenance"}


@dataclass(frozen=True)
class Reading:
    """Settings for reading samples; `LatentDataset` describes them."""

    crop: int | None = None
    mode: Mode = "random"
    seed: int = 0
    metadata: bool = True
    transforms: tuple[Transform, ...] = ()
    fields: tuple[str, ...] = ()
    missing_fields: Missing = "error"

    def __post_init__(self) -> None:
        choice("mode", self.mode, Mode)
        whole_number("seed", self.seed, least=0)
        if self.crop is not None:
            whole_number("crop", self.crop, least=1)
        if self.crop is None and self.mode == "windows":
            raise ConfigError("mode is 'windows': set crop to the number of frames per window.")
        choice("missing_fields", self.missing_fields, Missing)


def choice(name: str, value: object, options: Any) -> None:
    """Raise ConfigError if `value` is not one of the values of the Literal `options`."""
    if value not in get_args(options):
        raise ConfigError(f"{name} is {value!r}: use one of {', '.join(get_args(options))}.")


class StoreSamples:
    """The samples of one store, in the order of its shards."""

    def __init__(
        self,
        store: LatentStore,
        reading: Reading,
        *,
        fields: Sequence[LatentStore] = (),
        rows: Ints | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        if not len(store):
            raise StoreError(
                f"{store.url} holds no records: run `latentmill status {store.url}` to see why."
            )
        self.store, self._reading = store, reading
        # Both with the same index: looking for fields can load a later seal.
        self.crops = CropReader(store, cache)
        self._metadata = FieldReader(store, ["metadata"]) if reading.metadata else None
        self.fields = StoreFields(self.crops, fields, cache)
        rows, self.left_out = self.fields.complete(rows, reading.missing_fields)
        self._chosen: npt.NDArray[np.uint8] | None = None  # a bit per record: small to send
        if rows is not None:
            chosen = np.zeros(len(self.crops.frames), np.bool_)
            chosen[rows] = True
            self._chosen = np.packbits(chosen)
        model = store.info.model
        self._rate, self._hop = int(model["sample_rate"]), int(model["hop"])

    def __getstate__(self) -> dict[str, Any]:
        computed = ("rows", "_windows")
        return {name: value for name, value in vars(self).items() if name not in computed}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreSamples:
        return thread_copy(self, memo, ["rows", "_windows", "_chosen"])

    @cached_property
    def rows(self) -> Ints:
        """The rows of the chosen records, in their order in the shards."""
        order = self.crops.physical_order()
        if self._chosen is not None:
            chosen = np.unpackbits(self._chosen, count=len(order)).astype(np.bool_)
            order = order[chosen[order]]
        return order

    @cached_property
    def _windows(self) -> Ints:
        """Number of each item's first window, followed by the number of all windows."""
        assert self._reading.crop is not None
        counts = -(-self.crops.frames[self.rows] // self._reading.crop)
        return np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        if self._reading.mode == "windows":
            return int(self._windows[-1])
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """Frames of each sample before padding."""
        if self._reading.mode == "windows":
            rows, starts = self.locate(np.arange(len(self)), 0, np.arange(len(self)))
            left = self.crops.frames[rows] - starts
        else:
            left = self.crops.frames[self.rows]
        crop = self._reading.crop
        lengths: Ints = left.astype(np.int64) if crop is None else np.minimum(left, crop)
        return lengths

    def locate(self, samples: Ints, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Rows and first frames of samples, from their numbers and positions in an epoch."""
        crop = self._reading.crop
        if self._reading.mode == "windows":
            assert crop is not None
            items = np.searchsorted(self._windows, samples, "right") - 1
            return self.rows[items], (samples - self._windows[items]) * crop
        rows = self.rows[samples]
        if crop is None or self._reading.mode == "start":
            return rows, np.zeros(len(rows), np.int64)
        limits = np.maximum(self.crops.frames[rows].astype(np.int64) - crop, 0) + 1
        return rows, random_below(limits, self._reading.seed, epoch, positions)

    def read(self, samples: Ints, epoch: int, positions: Ints) -> Iterator[Sample]:
        """Read samples in one batch; an iterator reads long local samples when it reaches them."""
        rows, starts = self.locate(samples, epoch, positions)
        crop = self._reading.crop
        frames = self.crops.frames[rows].astype(np.int64)
        latents: Iterable[FloatArray]
        masks: Iterable[npt.NDArray[np.bool_]]
        values = self.fields.read(rows, starts, crop)
        if crop is None:
            latents = self.crops.read_whole(rows, values.requests)
            masks = (np.ones(length, np.bool_) for length in frames)
        else:
            block, have = self.crops.read_block(rows, starts, crop, values.requests)
            latents, masks = block.transpose(0, 2, 1), np.arange(crop) < have[:, None]
        origins = [self.store.origin] * len(rows)
        if self._reading.transforms:  # latent arithmetic needs the crop's position
            windows = zip(origins, frames.tolist(), starts.tolist(), strict=True)
            origins = [origin.at(length, start) for origin, length, start in windows]
        described = self.describe(rows, starts)
        fields = values.samples(placed=bool(self._reading.transforms))
        each = zip(latents, masks, described, positions.tolist(), origins, fields, strict=True)
        for latent, mask, (key, metadata), position, origin, own in each:
            yield Sample.unparsed(
                metadata,
                key=key,
                latents=latent,
                mask=mask,
                epoch=epoch,
                position=position,
                origin=origin,
                fields=own,
            )

    def describe(self, rows: Ints, starts: Ints) -> Iterable[tuple[str, StoredMetadata]]:
        """Key and metadata of samples."""
        own = ["{}"] * len(rows)
        if self._metadata is not None:
            own = [fields["metadata"] for fields in self._metadata.read(rows)]
        begins = (starts * (self._hop / self._rate)).tolist()
        totals = (self.crops.num_samples[rows] / self._rate).tolist()
        return zip(self.crops.keys(rows), map(StoredMetadata, own, begins, totals), strict=True)


class Corpus:
    """The samples of several stores of one model, numbered one store after another.

    `LatentDataset` describes the arguments.
    """

    def __init__(
        self,
        stores: Stores,
        reading: Reading,
        *,
        where: Where | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        given = [stores] if isinstance(stores, str | os.PathLike | LatentStore) else list(stores)
        if not given:
            raise ConfigError("No store is given: pass at least one path, URL or open store.")
        opened = [as_store(store) for store in given]
        check_mix(opened)
        fields = [[store.field(name) for name in reading.fields] for store in opened]
        for same in zip(*fields, strict=True):
            check_mix(same)
            check_forms(same)
        ranges = None if cache is None else RangeCache(os.fspath(cache), cache_gib)
        if ranges is not None:
            read = [*opened, *itertools.chain.from_iterable(fields)]
            sizes = (size for store in read for size, _ in store.shard_sizes().values())
            ranges.whole = where is None and ranges.holds(sum(sizes))
        self.reading = reading
        for store in opened:
            warn_incomplete(store)
        rows: Sequence[Ints | None] = [None] * len(opened)
        if where is not None:
            rows = select(opened, where)
        self.stores = [
            StoreSamples(store, reading, fields=own, rows=chosen, cache=ranges)
            for store, own, chosen in zip(opened, fields, rows, strict=True)
        ]

    @cached_property
    def first(self) -> Ints:
        """Number of each store's first sample, followed by the number of all samples."""
        return np.cumsum([0, *(len(samples) for samples in self.stores)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show for a dataset."""
        shown: dict[str, object] = {
            "stores": ", ".join(repr(samples.store.url) for samples in self.stores),
            "crop": self.reading.crop,
            "mode": self.reading.mode if self.reading.crop else "whole items",
        }
        if self.reading.fields:
            shown["fields"] = ", ".join(self.reading.fields)
        if left_out := sum(samples.left_out for samples in self.stores):
            shown["left_out"] = left_out  # records without one of the fields
        return shown

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each store."""
        return [len(samples) for samples in self.stores]

    @property
    def records(self) -> list[int]:
        """Number of records of each store, including those that `where` excludes."""
        return [len(samples.crops.frames) for samples in self.stores]

    @property
    def lengths(self) -> Ints:
        """Frames of each sample before padding."""
        return np.concatenate([samples.lengths for samples in self.stores])

    @cached_property
    def digest(self) -> str:
        """A short hash of the stores, their items, the filter and the crops."""
        items = [samples.crops.items_hash for samples in self.stores]
        return hashlib.sha256(f"{self.digest_of_rows} {items}".encode()).hexdigest()[:16]

    @property
    def digest_of_rows(self) -> str:
        """The same without the items, as in states of earlier versions."""
        stores = [
            (
                samples.store.info.fingerprint,
                len(samples.crops.frames),
                hashlib.sha256(samples.rows.data).hexdigest(),
            )
            for samples in self.stores
        ]
        text = json.dumps([stores, self.reading.crop, self.reading.mode])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def direct(self) -> bool:
        """Whether the samples are crops without transforms, so a batch needs no samples."""
        return self.reading.crop is not None and not self.reading.transforms

    def stores_of(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Store of each sample of the corpus, and its number in that store."""
        of_store: Ints = np.searchsorted(self.first, numbers, "right") - 1
        return of_store, numbers - self.first[of_store]

    def read(self, of_store: Ints, samples: Ints, epoch: int, positions: Ints) -> Iterator[Sample]:
        """Read samples of one epoch, in the given order, with one batch per store.

        All arrays are `[n]`: `of_store` is the number of each sample's store, `samples` its number
        in that store, and `positions` its position in the epoch.
        """
        read = {}
        for number in np.unique(of_store).tolist():
            here = of_store == number
            read[number] = self.stores[number].read(samples[here], epoch, positions[here])
        return (self._transformed(next(read[number])) for number in of_store.tolist())

    def _transformed(self, sample: Sample) -> Sample:
        if not self.reading.transforms:
            return sample
        epoch, position, origin = sample.epoch, sample.position, sample.origin
        random = sample_random(self.reading.seed, epoch, position)
        for transform in self.reading.transforms:
            sample = transform(sample, random)
            origin = sample.origin or origin
        # A transform that creates a new sample may leave these out.
        return replace(sample, epoch=epoch, position=position, origin=origin)


def as_store(store: object) -> LatentStore:
    """An open store itself, or the store at a path or URL."""
    if isinstance(store, LatentStore):
        return store
    if not isinstance(store, str | os.PathLike):
        raise ConfigError(f"{store!r} is not a store: give a path, a URL or an open store.")
    return LatentStore(os.fspath(store))


def check_mix(stores: Sequence[LatentStore]) -> None:
    """Raise ConfigError if stores differ in model, latent channels, rate or scale factor."""
    first = stores[0]
    for store in stores[1:]:
        names = {*first.info.model, *store.info.model} - _NOT_IDENTITY
        differ = sorted(n for n in names if first.info.model.get(n) != store.info.model.get(n))
        if differ:
            raise ConfigError(
                f"{first.url} and {store.url} cannot be mixed, because their models differ in "
                f"{', '.join(differ)}: encode both with the same model."
            )
