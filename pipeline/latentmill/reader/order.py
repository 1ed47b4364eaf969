"""The order of samples in an epoch: a pure function of seed, epoch and position.

The samples of all stores are divided into blocks of neighbours. First the blocks are shuffled,
then the samples inside windows of many blocks. The effect is that of a shuffle buffer, but the
sample at any position can be computed without the positions before it. So any rank or worker can
start anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_WINDOWS_KEPT = 2
_PASSES_KEPT = 8


@dataclass(frozen=True)
class Mixture:
    """Number of samples that an epoch takes from each store, and how they are shuffled.

    Attributes:
        sizes: Number of samples of each store.
        taken: Number of samples that an epoch takes from each store. If it differs from the size,
            each epoch continues where the last one stopped, in repeated passes through the store;
            each pass has its own order and yields every sample once.
        seed: Seed of the shuffling.
        shuffle: Whether to shuffle; otherwise one store follows another.
        block: Number of neighbours that stay together until their window is shuffled.
        window: Number of samples in a window, a multiple of `block`.
    """

    sizes: tuple[int, ...]
    taken: tuple[int, ...]
    seed: int
    shuffle: bool
    block: int
    window: int

    @property
    def total(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.taken)

    @property
    def digest(self) -> str:
        """A short hash of the settings; mixtures with equal hashes have equal orders."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def apportion(total: int, weights: list[float]) -> tuple[int, ...]:
    """Split `total` in proportion to weights, by largest remainders, with an exact sum."""
    share = np.array(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(share).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:rest]] += 1
    return tuple(int(count) for count in counts)


class EpochOrder:
    """The order of one epoch: maps positions to samples."""

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        self.mixture, self.epoch = mixture, epoch
        self._windows: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._passes: OrderedDict[tuple[int, int], _Blocks] = OrderedDict()

    def __len__(self) -> int:
        return self.mixture.total

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the numbers of the stores, and of the samples in them, at positions `[n]`.

        Positions that are close to each other are the fastest.
        """
        if not self.mixture.shuffle:
            return self._blocks.at(positions)
        stores = np.empty(len(positions), np.int64)
        samples = np.empty(len(positions), np.int64)
        windows = self._blocks.window_of(positions)
        order = np.argsort(windows, kind="stable")  # linear if the positions are sorted
        starts = np.flatnonzero(np.diff(windows[order], prepend=-1))
        for here in np.split(order, starts)[1:]:
            window = int(windows[here[0]])
            of_store, found = self._window(window)
            inside = positions[here] - self._blocks.window_start(window)
            stores[here], samples[here] = of_store[inside], found[inside]
        return stores, samples

    @cached_property
    def _blocks(self) -> _Blocks:
        mixture = self.mixture
        key = (mixture.seed, self.epoch) if mixture.shuffle else None
        return _Blocks(mixture.taken, mixture.block, mixture.window // mixture.block, key)

    def _window(self, window: int) -> tuple[Ints, Ints]:
        """Store and sample at all positions of a window."""
        if window not in self._windows:
            first, last = (self._blocks.window_start(number) for number in (window, window + 1))
            order = permutation(last - first, (self.mixture.seed, self.epoch, window, 1))
            stores, draws = self._blocks.at(first + order)
            self._windows[window] = stores, self._samples(stores, draws)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return self._windows[window]

    def _samples(self, stores: Ints, draws: Ints) -> Ints:
        """Map the n-th draws from each store in this epoch to samples."""
        samples = draws.copy()
        for store in np.unique(stores).tolist():
            size, taken = self.mixture.sizes[store], self.mixture.taken[store]
            if taken == size:  # one pass, already shuffled
                continue
            here = np.flatnonzero(stores == store)
            passes, places = np.divmod(self.epoch * taken + draws[here], size)
            for number in np.unique(passes).tolist():
                these = passes == number
                samples[here[these]] = self._pass(store, number).at(places[these])[1]
        return samples

    def _pass(self, store: int, number: int) -> _Blocks:
        place = (store, number)
        if place not in self._passes:
            key = (self.mixture.seed, store, number, 2)
            self._passes[place] = _Blocks((self.mixture.sizes[store],), self.mixture.block, 1, key)
            if len(self._passes) > _PASSES_KEPT * len(self.mixture.sizes):
                self._passes.popitem(last=False)
        return self._passes[place]


class _Blocks:
    """The samples of some stores in shuffled blocks; each block belongs to one store.

    The last block of a store may be shorter, so positions are found by bisection.
    """

    def __init__(
        self, sizes: tuple[int, ...], block: int, per_window: int, key: tuple[int, ...] | None
    ) -> None:
        counts = [-(-size // block) for size in sizes]
        total = sum(counts)
        self._first = np.cumsum([0, *counts])  # number of each store's first block
        self._block, self._per_window = block, per_window
        self._order = np.arange(total) if key is None else permutation(total, key)
        lengths = np.full(total, block, np.int64)
        for last, size in zip(self._first[1:], sizes, strict=True):
            if size:
                lengths[last - 1] = size - (size - 1) // block * block
        self._starts = np.concatenate([[0], np.cumsum(lengths[self._order])])

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Store and sample at positions."""
        places = np.searchsorted(self._starts, positions, "right") - 1
        blocks = self._order[places]
        stores = np.searchsorted(self._first, blocks, "right") - 1
        samples = (blocks - self._first[stores]) * self._block
        return stores, samples + positions - self._starts[places]

    def window_of(self, positions: Ints) -> Ints:
        """The windows that contain the positions."""
        windows: Ints = (np.searchsorted(self._starts, positions, "right") - 1) // self._per_window
        return windows

    def window_start(self, window: int) -> int:
        """First position of a window; after the last window, the number of samples."""
        return int(self._starts[min(window * self._per_window, len(self._starts) - 1)])


def permutation(count: int, key: tuple[int, ...]) -> Ints:
    """A random permutation of `count` elements that is the same in every numpy version.

    numpy guarantees a bit generator's raw numbers, but not the result of `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


@lru_cache(maxsize=64)
def _crop_key(seed: int, epoch: int) -> np.uint64:
    """The key of an epoch's random crops."""
    key: np.uint64 = np.random.SeedSequence((seed, epoch, 3)).generate_state(1, np.uint64)[0]
    return key


def random_below(limits: Ints, seed: int, epoch: int, positions: Ints) -> Ints:
    """One random number below each limit: a pure function of seed, epoch and position.

    Uses the finaliser of SplitMix64 (Steele, Lea, Flood 2014) on all positions at once.
    """
    key = _crop_key(seed, epoch)
    with np.errstate(over="ignore"):
        mixed = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    # 53 bits as a fraction, times the limit: uniform to one part in 2^53 / limit.
    below = ((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 * limits).astype(np.int64)
    return np.minimum(below, limits - 1)
