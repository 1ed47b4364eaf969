"""In which order an epoch's samples come: a pure function of seed, epoch and position.

The samples of all sources lie in blocks of neighbours. The blocks are shuffled, and then the
samples inside windows of many blocks (what a shuffle buffer does, but any position of it is known
at once, without going through those before). Nothing is kept between positions, so any rank or
worker can start anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_WINDOWS_KEPT = 2
_PASSES_KEPT = 8


@dataclass(frozen=True)
class Mixture:
    """How many samples of each source an epoch has, and how they are shuffled.

    Attributes:
        sizes: Samples of each source.
        taken: Samples that an epoch takes of each source. Where that is not the source's size,
            epochs go on where the last one stopped: over and over through the source, each pass
            in an order of its own, every sample once a pass.
        seed: Of the shuffling.
        shuffle: Whether to shuffle; otherwise the sources follow one another.
        block: Neighbours that stay together until their window is shuffled.
        window: Samples in a window, a multiple of `block`.
    """

    sizes: tuple[int, ...]
    taken: tuple[int, ...]
    seed: int
    shuffle: bool
    block: int
    window: int

    @property
    def total(self) -> int:
        """Samples of an epoch."""
        return sum(self.taken)

    @property
    def digest(self) -> str:
        """A short hash: two mixtures with the same have the same orders."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def apportion(total: int, weights: list[float]) -> tuple[int, ...]:
    """Split `total` in proportion to weights, by largest remainders; the sum is exact."""
    share = np.array(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(share).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:rest]] += 1
    return tuple(int(count) for count in counts)


class EpochOrder:
    """The samples of one epoch by position."""

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        self.mixture, self.epoch = mixture, epoch
        self._windows: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._passes: OrderedDict[tuple[int, int], _Blocks] = OrderedDict()

    def __len__(self) -> int:
        return self.mixture.total

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Source and sample of some positions of the epoch.

        Args:
            positions: `[n]`, each from 0 to the epoch's length; quickest if they are near.

        Returns:
            The numbers of the sources and of the samples in them, both `[n]`.
        """
        sources = np.empty(len(positions), np.int64)
        samples = np.empty(len(positions), np.int64)
        if not self.mixture.shuffle:
            return self._blocks.at(positions)
        windows = self._blocks.window_of(positions)
        for window in np.unique(windows).tolist():
            here = windows == window
            first, found = self._blocks.window_start(window), self._window(window)
            sources[here] = found[0][positions[here] - first]
            samples[here] = found[1][positions[here] - first]
        return sources, samples

    @cached_property
    def _blocks(self) -> _Blocks:
        mixture = self.mixture
        key = (mixture.seed, self.epoch) if mixture.shuffle else None
        return _Blocks(mixture.taken, mixture.block, mixture.window // mixture.block, key)

    def _window(self, window: int) -> tuple[Ints, Ints]:
        """Source and sample of all positions of a window."""
        if window not in self._windows:
            first, last = (self._blocks.window_start(number) for number in (window, window + 1))
            order = permutation(last - first, (self.mixture.seed, self.epoch, window, 1))
            sources, draws = self._blocks.at(first + order)
            self._windows[window] = sources, self._samples(sources, draws)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return self._windows[window]

    def _samples(self, sources: Ints, draws: Ints) -> Ints:
        """The samples that an epoch's n-th draws from the sources are."""
        samples = draws.copy()
        for source in np.unique(sources).tolist():
            size, taken = self.mixture.sizes[source], self.mixture.taken[source]
            if taken == size:  # one pass, already shuffled
                continue
            here = np.flatnonzero(sources == source)
            passes, places = np.divmod(self.epoch * taken + draws[here], size)
            for number in np.unique(passes).tolist():
                these = passes == number
                samples[here[these]] = self._pass(source, number).at(places[these])[1]
        return samples

    def _pass(self, source: int, number: int) -> _Blocks:
        place = (source, number)
        if place not in self._passes:
            key = (self.mixture.seed, source, number, 2)
            self._passes[place] = _Blocks((self.mixture.sizes[source],), self.mixture.block, 1, key)
            if len(self._passes) > _PASSES_KEPT * len(self.mixture.sizes):
                self._passes.popitem(last=False)
        return self._passes[place]


class _Blocks:
    """The samples of some sources in shuffled blocks, each of one source; by position.

    A source's last block may be short, so a position is found by bisection.
    """

    def __init__(
        self, sizes: tuple[int, ...], block: int, per_window: int, key: tuple[int, ...] | None
    ) -> None:
        counts = [-(-size // block) for size in sizes]
        total = sum(counts)
        self._first = np.cumsum([0, *counts])  # of each source's blocks
        self._block, self._per_window = block, per_window
        self._order = np.arange(total) if key is None else permutation(total, key)
        lengths = np.full(total, block, np.int64)
        for last, size in zip(self._first[1:], sizes, strict=True):
            if size:
                lengths[last - 1] = size - (size - 1) // block * block
        self._starts = np.concatenate([[0], np.cumsum(lengths[self._order])])

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Source and sample of positions."""
        places = np.searchsorted(self._starts, positions, "right") - 1
        blocks = self._order[places]
        sources = np.searchsorted(self._first, blocks, "right") - 1
        samples = (blocks - self._first[sources]) * self._block
        return sources, samples + positions - self._starts[places]

    def window_of(self, positions: Ints) -> Ints:
        """The windows that positions lie in."""
        windows: Ints = (np.searchsorted(self._starts, positions, "right") - 1) // self._per_window
        return windows

    def window_start(self, window: int) -> int:
        """The first position of a window; of the one after the last, the number of samples."""
        return int(self._starts[min(window * self._per_window, len(self._starts) - 1)])


def permutation(count: int, key: tuple[int, ...]) -> Ints:
    """A random order of `count` things, the same in every version of numpy.

    The raw numbers of a bit generator are guaranteed to stay; `Generator.permutation` is not.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


def random_below(limits: Ints, seed: int, epoch: int, positions: Ints) -> Ints:
    """One random number below each limit: a pure function of seed, epoch and position.

    By the finaliser of SplitMix64 (Steele, Lea, Flood 2014), for all positions at once.
    """
    key = np.random.SeedSequence((seed, epoch, 3)).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        mixed = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    # 53 bits as a fraction, times the limit: even to one part in 2^53 / limit.
    below = ((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 * limits).astype(np.int64)
    return np.minimum(below, limits - 1)
