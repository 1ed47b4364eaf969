"""The stems of songs: which records belong together, their synchronised crops, and mixes of them.

Stems lie on one time line and one grid, so that their latents can be added (`ops`): what a model
trains on is mixed in latent space when it is read, and no mix need be stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops import Origin, gain, mix
from latentmill.reader.fields import FieldReader
from latentmill.reader.transforms import Decibels, check_decibels, random_factor
from latentmill.record import FloatArray
from latentmill.store.store import LatentStore

By = Literal["fields", "folder"]
Flags = npt.NDArray[np.bool_]
MIXES = ("mix", "mixture")


@dataclass(frozen=True)
class StemGroup:
    """The records of one song.

    Attributes:
        name: The song.
        rows: The records' positions in the store's sorted keys.
        roles: What each is in the song.
    """

    name: str
    rows: tuple[int, ...]
    roles: tuple[str, ...]


def stem_groups(
    store: LatentStore, by: By = "fields", *, without: Sequence[str] = MIXES
) -> tuple[StemGroup, ...]:
    """The stem groups of a store, in the order of their names; no latent is read.

    Args:
        store: The store.
        by: `fields`: the records' `group` and `role`, which their metadata gave; `folder`: the
            key's folder and its last part, as in `song/drums`.
        without: Roles that are left out, as they are mixes of the others.

    Raises:
        ConfigError: There are no groups, or another `by`.
    """
    if by == "fields":
        table = FieldReader(store, ("key", "group", "role")).gather().to_pydict()
        named = zip(table["key"], table["group"], table["role"], strict=True)
        found = [(group, role or key.rpartition("/")[2]) for key, group, role in named]
    elif by == "folder":
        parts = (key.rpartition("/") for key in store.keys())  # noqa: SIM118
        found = [(folder or None, name) for folder, _, name in parts]
    else:
        raise ConfigError(f"Stems are grouped by fields or by folder, not by {by!r}.")
    members: dict[str, list[tuple[int, str]]] = {}
    for row, (group, role) in enumerate(found):
        if group is not None and role not in without:
            members.setdefault(group, []).append((row, role))
    if not members:
        cure = "take by='folder', or give the items a group" if by == "fields" else "check the keys"
        raise ConfigError(f"{store.url} has no stem groups by {by}: {cure}.")
    return tuple(
        StemGroup(name, tuple(row for row, _ in of), tuple(role for _, role in of))
        for name, of in sorted(members.items())
    )


@dataclass(frozen=True)
class Stems:
    """Crops of the stems of one song, of the same frames.

    Attributes:
        key: The song: the name of its group.
        roles: What each stem is in it.
        keys: The key of each stem's record; of a remix, they are of several songs.
        latents: `[S, C, T]`, float32; silence where a stem has ended.
        mask: `[S, T]`, True where a frame is the stem's.
        active: `[S, T]`, True where the stem can be heard.
        origin: The latent of silence at the place of the crop.
        metadata: `seconds_start`, where the song's crop begins, and `seconds_total`.
        epoch: The epoch that the sample was drawn in.
        position: Its place in that epoch.
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

    def __len__(self) -> int:
        return len(self.roles)

    def mix(self, chosen: Sequence[int]) -> FloatArray:
        """The latent of the chosen stems together, `[C, T]`; of none, silence."""
        if not chosen:
            return self.origin.like(self.latents[0]).astype(np.float32)
        return mix([self.latents[stem] for stem in chosen], origin=self.origin)

    def mask_of(self, chosen: Sequence[int]) -> Flags:
        """`[T]`, True where a frame is one of the chosen stems'."""
        flags: Flags = self.mask[list(chosen)].any(axis=0)
        return flags


@dataclass(frozen=True)
class RandomStemGains:
    """Makes each stem louder or softer by a random gain of its own.

    Attributes:
        decibels: The lowest and the highest gain, dB.
    """

    decibels: Decibels = (-6.0, 6.0)

    def __post_init__(self) -> None:
        check_decibels(self.decibels)

    def __call__(self, stems: Stems, random: np.random.Generator) -> Stems:
        """The stems; `active` stays as it was stored."""
        louder = [
            gain(latent, random_factor(self.decibels, random), origin=stems.origin)
            for latent in stems.latents
        ]
        return replace(stems, latents=np.stack(louder))


T_co = TypeVar("T_co", covariant=True)


class StemTask(Protocol[T_co]):
    """What becomes of a song's stems. Picklable, and a pure function of its arguments."""

    def __call__(self, stems: Stems, random: np.random.Generator) -> T_co:
        """A training sample, such as a named tuple or a dict of arrays, which `collate` takes."""
        ...


class ContextTarget(NamedTuple):
    """A part of a song and one stem to add to it: latents `[C, T]`, flags `[T]`."""

    context: FloatArray
    target: FloatArray
    mask: Flags
    active: Flags  # of the target
    role: str  # of the target
    key: str  # of the song
    metadata: Mapping[str, float]
    epoch: int
    position: int


@dataclass(frozen=True)
class ContextAndTarget:
    """A random sub-mix as context, and one of the other stems as target.

    Attributes:
        target: The role of the target; None: a random one.
        audible: Whether a random target is one that can be heard in the crop, if there is one.
    """

    target: str | None = None
    audible: bool = True

    def __call__(self, stems: Stems, random: np.random.Generator) -> ContextTarget:
        """The sample; the context of a song of one stem is silence."""
        target = _one(stems, random, self.target, self.audible)
        rest = [stem for stem in range(len(stems)) if stem != target]
        context = _some(rest, random)
        return ContextTarget(
            context=stems.mix(context),
            target=stems.latents[target],
            mask=stems.mask_of([*context, target]),
            active=stems.active[target],
            role=stems.roles[target],
            key=stems.key,
            metadata=stems.metadata,
            epoch=stems.epoch,
            position=stems.position,
        )


class Triplet(NamedTuple):
    """A mixture and the two parts that it is the sum of: latents `[C, T]`, flags `[T]`."""

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


@dataclass(frozen=True)
class MixtureTriplet:
    """A mixture, a sub-mix of it, and the one stem that the sub-mix lacks.

    Attributes:
        whole: Whether the mixture is of all stems; else it is of a random part of them.
        audible: Whether the stem is one that can be heard in the crop, if there is one.
    """

    whole: bool = False
    audible: bool = True

    def __call__(self, stems: Stems, random: np.random.Generator) -> Triplet:
        """The sample; the sub-mix of a song of one stem is silence."""
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
            key=stems.key,
            metadata=stems.metadata,
            epoch=stems.epoch,
            position=stems.position,
        )


class StemSet(NamedTuple):
    """The stems of given roles, `[S, C, T]`, their mixture `[C, T]`, and flags `[S, T]`."""

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
    """All stems side by side, and their mixture.

    Attributes:
        roles: The stems, in this order. Stems of one role are added up; a role that a song lacks
            is silence. The mixture is of these roles.
    """

    roles: tuple[str, ...]

    def __call__(self, stems: Stems, random: np.random.Generator) -> StemSet:
        """The sample; nothing is random about it."""
        of = [[n for n, role in enumerate(stems.roles) if role == wanted] for wanted in self.roles]
        return StemSet(
            stems=np.stack([stems.mix(chosen) for chosen in of]),
            mixture=stems.mix([stem for chosen in of for stem in chosen]),
            mask=np.stack([stems.mask_of(chosen) for chosen in of]),
            active=np.stack([stems.active[chosen].any(axis=0) for chosen in of]),
            key=stems.key,
            metadata=stems.metadata,
            epoch=stems.epoch,
            position=stems.position,
        )


def _one(stems: Stems, random: np.random.Generator, role: str | None, audible: bool) -> int:
    """A stem: of a role, or a random one, which can be heard if that is wanted and any can."""
    among = [n for n, own in enumerate(stems.roles) if role in (None, own)]
    if not among:
        raise ConfigError(
            f"Song {stems.key} has no stem {role!r} but {', '.join(stems.roles)}: leave such "
            f"songs out by having=[{role!r}], or let the target be None for any."
        )
    heard = [stem for stem in among if stems.active[stem].any()]
    among = heard if audible and heard else among
    return among[int(random.integers(len(among)))]


def _some(stems: Sequence[int], random: np.random.Generator) -> list[int]:
    """A random part of some stems, at least one; every part is as likely as any other."""
    if not stems:
        return []
    while True:
        chosen = [stem for stem in stems if random.random() < 0.5]
        if chosen:
            return chosen
