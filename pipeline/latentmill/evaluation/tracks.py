"""Choosing the sounds that the linearity card is measured on.

A track is a group of stems of one song. In a store without groups, a track is a pair of items.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentmill.errors import ConfigError, ItemError
from latentmill.evaluation.audio_metrics import rms
from latentmill.evaluation.rows import ShardRows
from latentmill.record import MIXES, FloatArray
from latentmill.sources.address import starts_at
from latentmill.sources.group import groups_together
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

SPARES = 3  # other candidates for each item, because some may be silent or cannot be read
QUIET = 10 ** (-50 / 20)  # RMS below which a sound is not scored
FAINT = 10 ** (-30 / 20)  # the same, relative to the mix
LOADED_SECONDS = 600.0  # of each recording, from its start
MAX_STEMS = 16  # of a group: all are in memory at once, and each is compared with all others

_log = get_logger("evaluation")


@dataclass(frozen=True)
class Track:
    """Sounds `[C, T]` of one length that are mixed.

    Attributes:
        name: The group, or the keys.
        stems: At least two sounds that are audible in their mix.
        silent: Number of stems of the group that are not.
    """

    name: str
    stems: tuple[Tensor, ...]
    silent: int = 0


class UnreadSources:
    """Sources of a store that cannot be read; their records are left out."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._reasons: dict[str, str] = {}  # by key

    @contextlib.contextmanager
    def noted(self, key: str) -> Iterator[None]:
        """Note an ItemError of the record `key`."""
        try:
            yield
        except ItemError as error:
            self._reasons[key] = str(error)

    def report(self, *, any_left: bool) -> None:
        """Log how many there are and why; raises ConfigError if no record is left."""
        if not self._reasons:
            return
        reasons = Counter(self._reasons.values()).most_common(3)
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons)
        sources = counted(len(self._reasons), "source")
        if not any_left:
            raise ConfigError(
                f"{sources} of {self._url} cannot be read, and nothing else can be measured "
                f"({why}): make the sources readable, or raise --items."
            )
        _log.warning("%s cannot be read, and others are measured (%s)", sources, why)


def audible(sound: Tensor, mix: Tensor | None = None) -> bool:
    """Whether a sound is loud enough to be scored."""
    level = rms(sound)
    return level >= QUIET and (mix is None or level >= FAINT * rms(mix))


def stem_groups(store: LatentStore, count: int) -> list[tuple[str, list[str]]]:
    """Up to `count` groups of at least two stems, spread over the store, with their keys.

    Segments of a song's stems are in one group if they begin at the same time. Shards are read
    until enough of them have a group. The plan splits groups that it did not know, so a group may
    have more stems in the other shards.
    """
    rows = ShardRows(store)
    stems: list[tuple[str, float, str, int]] = []  # song, start, key, shard
    counts: Counter[tuple[str, float]] = Counter()
    enough: set[int] = set()  # shards in which a group becomes one of at least two stems
    for shard in rows.spread():
        fields = rows.fields(shard, ("key", "group", "role", "source_uri"))
        starts = starts_at(pa.array(fields.pop("source_uri"), pa.string()))
        for key, song, role, start in zip(*fields.values(), starts, strict=True):
            if song is not None and role not in MIXES:
                stems.append((song, start or 0.0, key, shard))
                near = song, round(start or 0.0, 3)
                counts[near] += 1
                if counts[near] == 2:
                    enough.add(shard)
        if len(enough) >= count:
            break
    numbers, names = groups_together([song for song, *_ in stems], [one[1] for one in stems])
    members: list[list[int]] = [[] for _ in names]
    for place, number in enumerate(numbers.tolist()):
        members[number].append(place)
    turns: Counter[int] = Counter()
    ranked = []
    for _, number in sorted((of[1], number) for number, of in enumerate(members) if len(of) > 1):
        shard = stems[members[number][1]][3]
        ranked.append((turns[shard], number))
        turns[shard] += 1
    return [
        (names[number], sorted(stems[place][2] for place in members[number]))
        for number in sorted(number for _, number in sorted(ranked)[:count])
    ]


def stem_tracks(
    store: LatentStore, count: int, longest: int, unread: UnreadSources
) -> tuple[list[Track], int]:
    """Tracks of stem groups, and the number of their stems that are too quiet.

    Of each group the first `MAX_STEMS` stems are used. Of each song the window of `longest`
    samples is used in which most stems are audible, in its first 10 minutes.
    """
    tracks, silent = [], 0
    for group, keys in stem_groups(store, count):
        audio = []
        for key in keys[:MAX_STEMS]:
            with unread.noted(key):
                audio.append(source_of(store, key, longest))
        if len(audio) < 2:
            continue
        stems = _window(audio, longest)
        mix = torch.stack(stems).sum(dim=0)
        kept = tuple(stem for stem in stems if audible(stem, mix))
        silent += len(stems) - len(kept)
        if len(kept) > 1:
            tracks.append(Track(group, kept))
    return tracks, silent


def pair_tracks(store: LatentStore, count: int, longest: int, unread: UnreadSources) -> list[Track]:
    """Each of `count` items with the next one, the last with the first."""
    sounds = list(itertools.islice(_sounds(store, count, longest, unread), count))
    if len(sounds) < 2:
        return []
    tracks = []
    for (key, sound), (other, next_sound) in zip(sounds, [*sounds[1:], sounds[0]], strict=True):
        length = min(sound.shape[1], next_sound.shape[1])
        tracks.append(Track(f"{key} + {other}", (sound[:, :length], next_sound[:, :length])))
    return tracks


def spread_keys(store: LatentStore, count: int) -> list[str]:
    """Keys spread evenly over the store: `count` of them first, then spare ones between them."""
    return [store.index.key(row) for row in spread_rows(len(store), count, SPARES)]


def _sounds(
    store: LatentStore, count: int, longest: int, unread: UnreadSources
) -> Iterator[tuple[str, Tensor]]:
    """Key and the first `longest` samples of items, without leading silence."""
    for key in spread_keys(store, count):
        if store[key].rms < QUIET / 10:  # loud parts of long items may still be audible
            continue
        audio: FloatArray | None = None
        with unread.noted(key):
            audio = source_of(store, key, longest)
        if audio is None:
            continue
        start = int(np.argmax(np.abs(audio).max(axis=0) >= QUIET))
        sound = torch.tensor(audio[:, start : start + longest])  # copied: a view keeps the whole
        if audible(sound):
            yield key, sound


def source_of(store: LatentStore, key: str, longest: int) -> FloatArray:
    """The first 10 minutes of the audio `[C, T]` of a record, or `longest` samples if that is more.

    Raises ItemError if it cannot be read.
    """
    spec = store.model().spec
    loaded = max(longest, round(LOADED_SECONDS * spec.sample_rate))
    return read_source(store[key], spec.channels, loaded)


def _window(audio: list[FloatArray], longest: int) -> list[Tensor]:
    """The window of all stems in which the most are audible, and of those the loudest."""
    total = max(one.shape[1] for one in audio)
    best: tuple[int, float] = (-1, 0.0)
    chosen: list[Tensor] = []
    for start in range(0, max(1, total - longest // 2), longest):
        begin = max(0, min(start, total - longest))
        length = min(longest, total - begin)
        stems = [_padded(one[:, begin : begin + length], length) for one in audio]
        mix = torch.stack(stems).sum(dim=0)
        score = (sum(audible(stem, mix) for stem in stems), rms(mix))
        if score > best:
            best, chosen = score, stems
    return chosen


def _padded(audio: FloatArray, length: int) -> Tensor:
    return torch.from_numpy(np.pad(audio, ((0, 0), (0, length - audio.shape[1]))))  # copied
