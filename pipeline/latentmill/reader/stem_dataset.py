"""`StemDataset`: the map-style dataset of stem groups, with random crops, gains and remixes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset

import latentmill.reader.collate  # noqa: F401  registers our samples with torch's default collate
from latentmill.errors import ConfigError
from latentmill.reader.corpus import as_store, choice
from latentmill.reader.crops import CropReader
from latentmill.reader.draws import Draws, Request
from latentmill.reader.field_crops import Missing, StoreFields, checked_names
from latentmill.reader.field_values import FieldValue
from latentmill.reader.fields import FieldReader
from latentmill.reader.order import Ints
from latentmill.reader.sample import checked_transforms, sample_random, whole_number
from latentmill.reader.stems import (
    By,
    Flags,
    RandomStemGains,
    StemGroup,
    Stems,
    StemTask,
    check_roles,
    stem_groups,
)
from latentmill.reader.transforms import Decibels
from latentmill.record import MIXES, FloatArray, decibels
from latentmill.store.describe import warn_incomplete
from latentmill.store.schema import levels_of
from latentmill.store.store import LatentStore
from latentmill.text.shown import Shown

T = TypeVar("T")


@dataclass(frozen=True)
class _Choice:
    """The stems that a sample is made of, and the first frame of each crop."""

    group: StemGroup
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    start: int  # first frame of the song's own crop
    epoch: int
    position: int
    random: np.random.Generator  # for gains and task


class StemDataset(Shown, Dataset[T], Generic[T]):
    """Map-style dataset of samples made from the synchronised stems of songs.

    Use it with `torch.utils.data.DataLoader` and `BatchSampler`, which distributes the songs to
    ranks and makes each sample a function of seed, epoch and position. With another sampler, call
    `set_epoch`. The dataset can be pickled and forked. The tasks are in `stems.py`.

    Args:
        store: The store: a path, a URL or an open store.
        task: Makes a sample of the stems: `ContextAndTarget()`, `MixtureTriplet()`,
            `AllStems(roles)` or your own.
        crop: Frames per sample.
        seed: Seed of everything random.
        by: How stems are grouped: `fields` or `folder`; see `stem_groups`.
        without: Roles to leave out because they are mixes of the others.
        having: Roles that a song must have; songs without them are left out.
        gains: Range of the random gain of each stem, in dB, e.g. (-6, 6). None applies no gain.
        remix: Probability, 0 to 1, that all stems of a song are replaced by stems of the same role
            from random songs, each at a random position. Tempo and key are not matched.
        active_db: Loudness from which a frame of a stem is audible, in dBFS. None does not read
            the loudness: a stem is then audible in all its frames.
        per_song: Number of samples of each song in an epoch.
        fields: Names of the store's fields to read, as in `LatentDataset`. The results of
            `ContextAndTarget` and `MixtureTriplet` have those of the target or source.
        missing_fields: What to do with songs that have a stem without a value of one of the fields:
            `error`, or `leave_out`.
        transforms: Transforms of the task's results, such as `Drop`, applied in this order.

    Raises:
        ConfigError: An option is invalid, the store has no groups or cannot be cropped, or no song
            has a role that the task needs.
    """

    def __init__(
        self,
        store: LatentStore | str | os.PathLike[str],
        task: StemTask[T],
        *,
        crop: int,
        seed: int = 0,
        by: By = "fields",
        without: Sequence[str] = MIXES,
        having: Sequence[str] = (),
        gains: Decibels | None = None,
        remix: float = 0.0,
        active_db: float | None = -60.0,
        per_song: int = 1,
        fields: Sequence[str] = (),
        missing_fields: Missing = "error",
        transforms: Sequence[Callable[[T, np.random.Generator], T]] = (),
    ) -> None:
        whole_number("crop", crop, least=1)
        whole_number("per_song", per_song, least=1)
        whole_number("seed", seed, least=0)
        if not 0 <= remix <= 1:
            raise ConfigError(f"remix must be a probability from 0 to 1, not {remix}.")
        self.store = as_store(store)
        warn_incomplete(self.store)
        groups = stem_groups(self.store, by, without=without)
        self.groups = tuple(group for group in groups if {*having} <= {*group.roles})
        if not self.groups:
            together = " that begin at the same time" if len(having) > 1 else ""
            raise ConfigError(
                f"No song of {self.store.url} has {' and '.join(having)}{together}: check the "
                "roles."
            )
        # Both with the same index: looking for fields can load a later seal.
        self._crops = CropReader(self.store)
        self._levels = FieldReader(self.store, ("levels",))
        self._fields = StoreFields(
            self._crops, [self.store.field(name) for name in checked_names(fields)]
        )
        self._field_names, self._left_out = tuple(fields), 0
        self._use_complete(missing_fields)
        check_roles(task, self.groups)
        self._draws = Draws()
        self._task, self._crop, self._seed = task, crop, seed
        self._gains = None if gains is None else RandomStemGains(gains)
        self._remix, self._active_db, self._per_song = remix, active_db, per_song
        self._transforms = checked_transforms(transforms)

    def _use_complete(self, missing: Missing) -> None:
        """Leave out songs with a stem that has no value of a field, or raise ConfigError."""
        choice("missing_fields", missing, Missing)
        rows = np.array([row for group in self.groups for row in group.rows], np.int64)
        complete, left_out = self._fields.complete(rows, missing)
        if left_out:
            whole = {*np.asarray(complete).tolist()}
            before = len(self.groups)
            self.groups = tuple(group for group in self.groups if {*group.rows} <= whole)
            self._left_out = before - len(self.groups)
            if not self.groups:
                raise ConfigError(
                    f"no song of {self.store.url} has values of all the fields for all its stems: "
                    "read fewer fields, or compute the missing values with `latentmill add`."
                )

    @property
    def epoch(self) -> int:
        """The epoch of the last `set_epoch`; 0 before it."""
        return self._draws.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of crops, gains and mixes, as `LatentDataset.set_epoch` does."""
        self._draws.set_epoch(epoch)

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show."""
        shown: dict[str, object] = {
            "samples": len(self),
            "store": repr(self.store.url),
            "songs": len(self.groups),
            "task": self._task,
            "crop": self._crop,
            "seed": self._seed,
        }
        if self._field_names:
            shown["fields"] = ", ".join(self._field_names)
        if self._left_out:
            shown["left_out"] = self._left_out  # songs with a stem without one of the fields
        return shown

    def __len__(self) -> int:
        return len(self.groups) * self._per_song

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self._seed

    @property
    def sizes(self) -> list[int]:
        """Number of samples, as a list with one entry for the one store."""
        return [len(self)]

    @property
    def records(self) -> list[int]:
        """Number of records, as a list with one entry for the one store."""
        return [len(self._crops.frames)]

    @property
    def lengths(self) -> Ints:
        """Frames of each sample, `[len(dataset)]`."""
        return np.full(len(self), self._crop, np.int64)

    @cached_property
    def digest(self) -> str:
        """A short hash of the store, its items and the groups chosen from it."""
        text = f"{self.digest_of_rows} {self._crops.items_hash}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def digest_of_rows(self) -> str:
        """The same without the items, as in states of earlier versions."""
        groups = [(group.name, group.rows) for group in self.groups]
        text = json.dumps([self.store.info.fingerprint, groups, self._per_song, self._crop])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getitem__(self, number: int | Request) -> T:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int | Request]) -> list[T]:
        """Read samples in one batch.

        Raises:
            IndexError: A number is out of range.
            ConfigError: `active_db` is set, but the store has no loudness per frame.
            StorageError: A shard cannot be read.
        """
        found = []
        for stems, random in self._read(numbers):
            result = self._task(stems, random)
            for transform in self._transforms:
                result = transform(result, random)
            found.append(result)
        return found

    def stems(self, number: int | Request) -> Stems:
        """The stems of a sample, as the task gets them."""
        return self._read([number])[0][0]

    def _read(self, numbers: Sequence[int | Request]) -> list[tuple[Stems, np.random.Generator]]:
        resolved = np.stack(self._draws.resolve(numbers, len(self)), axis=1).tolist()
        choices = [self._choose(*one) for one in resolved]
        rows = np.array([row for one in choices for row in one.rows], np.int64)
        starts = np.array([start for one in choices for start in one.starts], np.int64)
        have = np.clip(self._crops.frames[rows] - starts, 0, self._crop)
        inside = have > 0  # a stem may end before the crop starts
        values = self._fields.read(rows, starts, self._crop)
        block, _ = self._crops.read_block(rows[inside], starts[inside], self._crop, values.requests)
        found, fields = iter(block), values.samples(placed=True)
        latents = [
            next(found).T if there else self.store.origin.crop(end, end - self._crop, self._crop)
            for there, end in zip(inside, (starts + self._crop).tolist(), strict=True)
        ]
        masks = np.arange(self._crop) < have[:, None]
        active = self._active(rows, starts) or list(masks)
        samples, at = [], 0
        for one in choices:
            own = slice(at, at + len(one.rows))
            at = own.stop
            stems = self._stems(one, latents[own], masks[own], active[own], fields[own])
            samples.append((self._gains(stems, one.random) if self._gains else stems, one.random))
        return samples

    def _choose(self, epoch: int, position: int, number: int) -> _Choice:
        """Choose the stems of a sample and the first frames of their crops."""
        random = sample_random(self._seed, epoch, position)
        group = self.groups[number % len(self.groups)]
        start = self._start(max(self._frames(row) for row in group.rows), random)
        rows, starts = list(group.rows), [start] * len(group.rows)
        if random.random() < self._remix:
            for stem, role in enumerate(group.roles):
                among = self._of_role[role]
                rows[stem] = among[int(random.integers(len(among)))]
                starts[stem] = self._start(self._frames(rows[stem]), random)
        return _Choice(group, tuple(rows), tuple(starts), start, epoch, position, random)

    def _frames(self, row: int) -> int:
        return int(self._crops.frames[row])

    def _start(self, frames: int, random: np.random.Generator) -> int:
        return int(random.integers(max(0, frames - self._crop) + 1))

    @cached_property
    def _of_role(self) -> dict[str, list[int]]:
        """The rows of each role in all songs."""
        rows: dict[str, list[int]] = {}
        for group in self.groups:
            for row, role in zip(group.rows, group.roles, strict=True):
                rows.setdefault(role, []).append(row)
        return rows

    def _active(self, rows: Ints, starts: Ints) -> list[Flags] | None:
        """Flags `[T]` for each crop, True for audible frames; None if loudness is not used."""
        if self._active_db is None:
            return None
        flags = []
        for start, fields in zip(starts.tolist(), self._levels.read(rows), strict=True):
            levels = levels_of(fields)
            if levels is None:
                raise ConfigError(
                    f"{self.store.url} has no loudness per frame, because an earlier version "
                    "encoded it: set active_db=None, or encode it again."
                )
            loud = decibels(levels)[start : start + self._crop] >= self._active_db
            flags.append(np.pad(loud, (0, self._crop - len(loud))))
        return flags

    def _stems(
        self,
        chosen: _Choice,
        latents: Sequence[FloatArray],
        mask: Flags,
        active: Sequence[Flags],
        fields: Sequence[Mapping[str, FieldValue]],
    ) -> Stems:
        total = max(self._frames(row) for row in chosen.group.rows)
        place = (max(total, chosen.start + self._crop), chosen.start)
        moved = map(self._moved, latents, chosen.rows, chosen.starts, itertools.repeat(place))
        model = self.store.info.model
        samples = max(int(self._crops.num_samples[row]) for row in chosen.group.rows)
        return Stems(
            key=chosen.group.name,
            roles=chosen.group.roles,
            keys=tuple(self._crops.key(row) for row in chosen.rows),
            latents=np.stack(list(moved)),
            mask=mask,
            active=np.stack(active),
            origin=self.store.origin.at(*place),
            metadata={
                "seconds_start": chosen.start * model["hop"] / model["sample_rate"],
                "seconds_total": samples / model["sample_rate"],
            },
            epoch=chosen.epoch,
            position=chosen.position,
            fields=fields,
        )

    def _moved(
        self, latent: FloatArray, row: int, start: int, place: tuple[int, int]
    ) -> FloatArray:
        """Move a crop to a position of the song, whose origin may differ from the crop's own.

        This is needed for stems of other songs, and for stems that end before the song does.
        """
        frames = self._frames(row)
        have = max(0, min(frames - start, self._crop))
        if have == self._crop and (frames, start) == place:
            return latent
        origin = self.store.origin
        means = slice(0, len(latent) - origin.deviations)
        moved = origin.crop(*place, self._crop).copy()
        change = moved[means, :have] - origin.crop(frames, start, have)[means]
        moved[:, :have] = latent[:, :have]
        moved[means, :have] += change
        return moved
