"""Stems of songs: groups of records, their synchronised crops, and tasks that mix them.

The stems of a song share one time line and one chunk grid, so their latents can be added (`ops`).
Training mixes are therefore made in latent space while reading, and no mix has to be stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops import Origin, gain, mix
from latentmill.reader.field_values import FieldValue
from latentmill.reader.fields import gather
from latentmill.reader.transforms import Decibels, check_decibels, random_factor
from latentmill.record import MIXES, FloatArray
from latentmill.sources.address import starts_at
from latentmill.sources.group import groups_together
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger

By = Literal["fields", "folder"]
Flags = npt.NDArray[np.bool_]
_SEGMENT_OF_KEY = re.compile(r"#[0-9.]+-[0-9.]*$")
_MOST_ROLES = 20  # in a message

_log = get_logger("reader")


@dataclass(frozen=True)
class StemGroup:
    """The records of one song, or those of its segments that begin together.

    Attributes:
        name: Name of the song; if its segments begin at several times, with their start in
            seconds: `song#12.5`.
        rows: Positions of the records in the store's sorted keys.
        roles: Role of each record in the song, e.g. `drums`.
    """

    name: str
    rows: tuple[int, ...]
    roles: tuple[str, ...]


def stem_groups(
    store: LatentStore, by: By = "fields", *, without: Sequence[str] = MIXES
) -> tuple[StemGroup, ...]:
    """The stem groups of a store, sorted by song and start; reads no latents.

    Segments of a song's stems are in one group if they begin within a millisecond.

    Args:
        store: The store.
        by: `fields` groups by the records' `group` and `role`; `folder` by their keys: in
            `song/drums`, `song` is the group and `drums` the role.
        without: Roles to leave out because they are mixes of the others.

    Raises:
        ConfigError: There are no groups, or `by` is invalid.
    """
    if by not in get_args(By):
        raise ConfigError(f"invalid by={by!r}: use 'fields' or 'folder'.")
    found = [
        (song, start, row, role)
        for row, (song, start, role) in enumerate(_places(store, by))
        if song is not None and role not in without
    ]
    if not found:
        hint = "use by='folder', or encode with --group-by" if by == "fields" else "check the keys"
        raise ConfigError(f"{store.url} has no stem groups by {by}: {hint}.")
    numbers, names = groups_together([song for song, *_ in found], [one[1] for one in found])
    members: list[list[tuple[int, str]]] = [[] for _ in names]
    for number, (*_, row, role) in zip(numbers.tolist(), found, strict=True):
        members[number].append((row, role))
    return tuple(
        StemGroup(name, tuple(row for row, _ in of), tuple(role for _, role in of))
        for name, of in zip(names, members, strict=True)
    )


def check_roles(task: object, groups: Sequence[StemGroup]) -> None:
    """Raise ConfigError if no song has a role that a task needs; warn of roles that are silence."""
    wanted: Sequence[str] = ()
    if isinstance(task, AllStems):
        wanted = task.roles
    elif isinstance(task, ContextAndTarget) and task.target is not None:
        wanted = (task.target,)
    there = {role for group in groups for role in group.roles}
    missing = [role for role in wanted if role not in there]
    if not missing:
        return
    shown = sorted(there)[:_MOST_ROLES] + ["..."] * (len(there) > _MOST_ROLES)
    problem = f"no song that is used has a stem {' or '.join(missing)}, only {', '.join(shown)}"
    if len(missing) == len(wanted):
        raise ConfigError(f"{problem}: check the roles of the task, and `without` and `having`.")
    _log.warning("%s: such stems are silence", problem)


def _places(store: LatentStore, by: By) -> Iterator[tuple[str | None, float, str]]:
    """The song of each record, its start in the song in seconds, and its role."""
    table = gather(store, ("key", "group", "role", "source_uri"))
    columns = [table[name].to_pylist() for name in ("key", "group", "role")]
    for key, group, role, start in zip(*columns, starts_at(table["source_uri"]), strict=True):
        folder, _, name = key.rpartition("/")
        if start is not None:
            name = _SEGMENT_OF_KEY.sub("", name)
        song, own = (folder or None, name) if by == "folder" else (group, role or name)
        yield song, start or 0.0, own


@dataclass(frozen=True)
class Stems:
    """Crops of the same frames of all stems of one song.

    Attributes:
        key: Name of the song's group.
        roles: Role of each stem.
        keys: Key of each stem's record; in a remix they come from several songs.
        latents: `[S, C, T]`, float32; silence after the end of a stem.
        mask: `[S, T]`, True for frames of the stem.
        active: `[S, T]`, True for frames in which the stem is audible.
        origin: The latent of silence for the crop's position in the song.
        metadata: `seconds_start` (start of the crop in the song, or in the group's segments) and
            `seconds_total`.
        epoch: The epoch that the sample was drawn in.
        position: Its position in that epoch.
        fields: The fields of each stem, by name; gains do not change them.
    """

    key: str
    roles: tuple[str, ...]
    keys: tuple[str, ...]
    latents: FloatArray = field(repr=False)
    mask: Flags = field(repr=False)
    active: Flags = field(repr=False)
    origin: Origin = field(repr=False)
    metadata: Mapping[str, float]
    epoch: int = 0
    position: int = 0
    fields: Sequence[Mapping[str, FieldValue]] = ()

    def __len__(self) -> int:
        return len(self.roles)

    def mix(self, chosen: Sequence[int]) -> FloatArray:
        """The mix of the chosen stems, `[C, T]`; silence if none is chosen."""
        if not chosen:
            return self.origin.like(self.latents[0]).astype(np.float32)
        return mix([self.latents[stem] for stem in chosen], origin=self.origin)

    def song(self) -> dict[str, Any]:
        """What every sample of this song has: `key`, `metadata`, `epoch` and `position`."""
        names = ("key", "metadata", "epoch", "position")
        return {name: getattr(self, name) for name in names}

    def fields_of(self, stem: int) -> Mapping[str, FieldValue]:
        """The fields of one stem; empty if none are read."""
        return self.fields[stem] if self.fields else {}

    def mask_of(self, chosen: Sequence[int]) -> Flags:
        """`[T]`, True for frames of any of the chosen stems."""
        flags: Flags = self.mask[list(chosen)].any(axis=0)
        return flags


@dataclass(frozen=True)
class RandomStemGains:
    """Applies a random gain to each stem.

    Attributes:
        decibels: The lowest and the highest gain, in dB.
    """

    decibels: Decibels = (-6.0, 6.0)

    def __post_init__(self) -> None:
        check_decibels(self.decibels)

    def __call__(self, stems: Stems, random: np.random.Generator) -> Stems:
        """Apply the gains; `active` is not changed."""
        louder = [
            gain(latent, random_factor(self.decibels, random), origin=stems.origin)
            for latent in stems.latents
        ]
        return replace(stems, latents=np.stack(louder))


T_co = TypeVar("T_co", covariant=True)


class StemTask(Protocol[T_co]):
    """Makes a training sample of a song's stems. Must be picklable and a pure function."""

    def __call__(self, stems: Stems, random: np.random.Generator) -> T_co:
        """Return a training sample that `collate` accepts: a named tuple or a dict of arrays."""
        ...


class ContextTarget(NamedTuple):
    """A sub-mix of a song and one stem to add to it: latents `[C, T]`, flags `[T]`."""

    context: FloatArray
    target: FloatArray
    mask: Flags
    active: Flags  # of the target
    role: str  # of the target
    key: str  # of the song
    metadata: Mapping[str, float]
    epoch: int
    position: int
    fields: Mapping[str, FieldValue] = {}  # of the target


@dataclass(frozen=True)
class ContextAndTarget:
    """A random sub-mix as context, and one of the other stems as target.

    Attributes:
        target: Role of the target, which a song of the store must have; None chooses a random stem.
        audible: Whether to choose the target among stems that are audible in the crop, if any is.
    """

    target: str | None = None
    audible: bool = True

    def __call__(self, stems: Stems, random: np.random.Generator) -> ContextTarget:
        """Choose target and context; the context of a song with one stem is silence."""
        target = _one(stems, random, self.target, self.audible)
        rest = [stem for stem in range(len(stems)) if stem != target]
        context = _some(rest, random)
        return ContextTarget(
            context=stems.mix(context),
            target=stems.latents[target],
            mask=stems.mask_of([*context, target]),
            active=stems.active[target],
            role=stems.roles[target],
            fields=stems.fields_of(target),
            **stems.song(),
        )


class Triplet(NamedTuple):
    """A mixture, and the sub-mix and stem that add up to it: latents `[C, T]`, flags `[T]`."""

    mixture: FloatArray
    submix: FloatArray
    source: FloatArray
    mask: Flags
    active: Flags  # of the source
    role: str  # of the source
    key: str  # of the song
    metadata: Mapping[str, float]
    epoch: int
    position: int
    fields: Mapping[str, FieldValue] = {}  # of the source


@dataclass(frozen=True)
class MixtureTriplet:
    """A mixture, a sub-mix of it, and the one stem that is missing in the sub-mix.

    Attributes:
        whole: Whether to mix all stems; otherwise a random subset.
        audible: Whether to choose the stem among those that are audible in the crop, if any is.
    """

    whole: bool = False
    audible: bool = True

    def __call__(self, stems: Stems, random: np.random.Generator) -> Triplet:
        """Choose stem and sub-mix; the sub-mix of a song with one stem is silence."""
        source = _one(stems, random, None, self.audible)
        rest = [stem for stem in range(len(stems)) if stem != source]
        submix = rest if self.whole else _some(rest, random)
        together = sorted([*submix, source])
        return Triplet(
            mixture=stems.mix(together),
            submix=stems.mix(submix),
            source=stems.latents[source],
            mask=stems.mask_of(together),
            active=stems.active[source],
            role=stems.roles[source],
            fields=stems.fields_of(source),
            **stems.song(),
        )


class StemSet(NamedTuple):
    """Stems of given roles `[S, C, T]`, their mixture `[C, T]`, and flags `[S, T]`."""

    stems: FloatArray
    mixture: FloatArray
    mask: Flags
    active: Flags
    key: str  # of the song
    metadata: Mapping[str, float]
    epoch: int
    position: int


@dataclass(frozen=True)
class AllStems:
    """Separate stems, and their mixture.

    Attributes:
        roles: Roles of the stems, in this order. Several stems of one role are mixed; a role that
            is missing in a song is silence. A role that no song has is silence with a warning; if
            no song has any of the roles, it is an error. The mixture consists of these roles only.
    """

    roles: tuple[str, ...]

    def __call__(self, stems: Stems, random: np.random.Generator) -> StemSet:
        """Arrange the stems; `random` is not used."""
        if any(stems.fields):
            raise ConfigError(
                "AllStems mixes stems, and a mix has no fields: read none, or use a task of your "
                "own, which has the fields of each stem in `stems.fields`."
            )
        of = [[n for n, role in enumerate(stems.roles) if role == wanted] for wanted in self.roles]
        return StemSet(
            stems=np.stack([stems.mix(chosen) for chosen in of]),
            mixture=stems.mix([stem for chosen in of for stem in chosen]),
            mask=np.stack([stems.mask_of(chosen) for chosen in of]),
            active=np.stack([stems.active[chosen].any(axis=0) for chosen in of]),
            **stems.song(),
        )


def _one(stems: Stems, random: np.random.Generator, role: str | None, audible: bool) -> int:
    """Choose a random stem of a role (None: of any), among the audible ones if `audible`."""
    among = [n for n, own in enumerate(stems.roles) if role in (None, own)]
    if not among:
        raise ConfigError(
            f"song {stems.key} has no stem {role!r}, only {', '.join(stems.roles)}: leave such "
            f"songs out by having=[{role!r}], or set target=None for a random stem."
        )
    active = [stem for stem in among if stems.active[stem].any()]
    among = active if audible and active else among
    return among[int(random.integers(len(among)))]


def _some(stems: Sequence[int], random: np.random.Generator) -> list[int]:
    """A random non-empty subset of some stems; all subsets are equally likely."""
    if not stems:
        return []
    while True:
        chosen = [stem for stem in stems if random.random() < 0.5]
        if chosen:
            return chosen
