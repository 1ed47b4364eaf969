"""The order of an epoch: everything once, the same everywhere, well mixed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import ConfigError
from latentmill.reader.order import EpochOrder, Mixture, apportion, permutation, random_below
from latentmill.reader.sharding import (
    BLOCK,
    STATE_VERSION,
    WINDOW,
    Rank,
    Resumable,
    mixture,
)
from latentmill.reader.stream import worker_share

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def order_of(mixed: Mixture, epoch: int = 0) -> list[tuple[int, int]]:
    found = EpochOrder(mixed, epoch).at(np.arange(mixed.total))
    return list(zip(*(array.tolist() for array in found), strict=True))


@given(
    sizes,
    st.integers(0, 9),
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 70),
)
def test_every_sample_comes_once(
    counts: list[int], seed: int, epoch: int, shuffle: bool, block: int, window: int
) -> None:
    mixed = mixture(counts, None, seed, shuffle=shuffle, block=block, window=max(block, window))
    expected = [(source, n) for source, count in enumerate(counts) for n in range(count)]
    assert sorted(order_of(mixed, epoch)) == expected
    if not shuffle:
        assert order_of(mixed, epoch) == expected


@given(sizes, st.data())
def test_a_position_is_the_same_however_it_is_asked_for(
    counts: list[int], data: st.DataObject
) -> None:
    mixed = mixture(counts, None, 5, shuffle=True, block=3, window=17)
    whole = order_of(mixed, 2)
    asked = data.draw(st.lists(st.integers(0, mixed.total - 1), min_size=1, max_size=20))
    sources, samples = EpochOrder(mixed, 2).at(np.array(asked))
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == [whole[n] for n in asked]


@given(sizes, st.data())
def test_weights_give_their_share_and_every_pass_every_sample(
    counts: list[int], data: st.DataObject
) -> None:
    weights = data.draw(
        st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)), "weights"
    )
    mixed = mixture(counts, weights, 1, shuffle=True, block=4, window=32)
    total = sum(counts)
    assert mixed.total == total
    drawn: list[list[int]] = [[] for _ in counts]
    for epoch in range(3):
        order = order_of(mixed, epoch)
        for source, weight in enumerate(weights):
            share = Counter(s for s, _ in order)[source]
            assert abs(share - total * weight / sum(weights)) < 1
        for source in range(len(counts)):
            drawn[source] += sorted(n for s, n in order if s == source)
    for source, count in enumerate(counts):
        times = Counter(drawn[source])
        passes, rest = divmod(len(drawn[source]), count)
        # Whole passes have every sample once, the one begun has no sample twice.
        expected = {passes: count - rest, passes + 1: rest}
        assert Counter(times[n] for n in range(count)) == {k: v for k, v in expected.items() if v}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    one, other = (
        mixture([50, 30], None, seed, shuffle=True, block=4, window=40) for seed in (0, 1)
    )
    orders = [order_of(one, 0), order_of(one, 1), order_of(other, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert one.digest != other.digest
    assert order_of(one, 0) == orders[0]


def test_the_numbers_stay_what_they_are() -> None:
    """A state saved today means the same order tomorrow, whatever numpy is installed."""
    assert permutation(8, (1, 2, 3)).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    below = random_below(np.full(6, 1000), 7, 3, np.arange(6))
    assert below.tolist() == [367, 871, 811, 814, 507, 434]
    settings = (
        '{"block": 16, "seed": 5, "shuffle": true, "sizes": [3, 4], "taken": [3, 4], '
        '"window": 16384}'
    )
    mixed = mixture([3, 4], None, 5, shuffle=True, block=BLOCK, window=WINDOW)
    assert mixed.digest == hashlib.sha256(settings.encode()).hexdigest()[:16]


def test_the_order_of_many_windows_stays_what_it_is() -> None:
    """Of stores with passes of their own, asked for at once, backwards and one by one."""
    mixed = mixture([1000, 300], [1, 2], 5, shuffle=True, block=4, window=64)
    order = order_of(mixed, 2)
    text = ",".join(f"{store}:{sample}" for store, sample in order)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "afe3183138cb714c"
    backwards = EpochOrder(mixed, 2).at(np.arange(mixed.total)[::-1])
    assert list(zip(*(array.tolist() for array in backwards), strict=True)) == order[::-1]
    one, none = EpochOrder(mixed, 2), np.arange(0)
    assert [one.at(np.array([n])) for n in range(mixed.total)] == order
    assert [len(array) for array in one.at(none)] == [0, 0]


def test_random_numbers_are_those_of_splitmix64() -> None:
    """Its finaliser in Python's whole numbers; a large limit shows all of the 53 bits."""
    key = int(np.random.SeedSequence((7, 3, 3)).generate_state(1, np.uint64)[0])
    expected = []
    for position in range(50):
        mixed = ((position + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        expected.append((mixed ^ mixed >> 31) >> 11)
    assert random_below(np.full(50, 2**53), 7, 3, np.arange(50)).tolist() == expected


@given(st.integers(1, 10**6), st.integers(0, 50), st.integers(0, 50))
def test_random_numbers_stay_below(limit: int, seed: int, epoch: int) -> None:
    found = random_below(np.full(50, limit), seed, epoch, np.arange(50))
    assert found.min() >= 0
    assert found.max() < limit


def test_random_numbers_are_even() -> None:
    found = random_below(np.full(100_000, 10), 0, 0, np.arange(100_000))
    counts = np.bincount(found, minlength=10)
    chi = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi < 30  # 9 degrees of freedom: exceeded once in 2,000
    lag = np.corrcoef(found[:-1], found[1:])[0, 1]
    assert abs(lag) < 0.015


def same_block_pairs(order: np.ndarray, batch: int, neighbours: int) -> float:
    """Mean number of pairs in a batch that are neighbours in the store."""
    batches = order[: len(order) // batch * batch].reshape(-1, batch)
    near = np.abs(batches[:, :, None] - batches[:, None, :]) < neighbours
    return float((near.sum((1, 2)) - batch).mean() / 2)


def test_the_shuffle_is_about_as_good_as_a_full_permutation() -> None:
    count = 200_000
    mixed = mixture([count], None, 0, shuffle=True, block=16, window=16384)
    order = EpochOrder(mixed, 0).at(np.arange(count))[1]
    full = permutation(count, (99,))
    position = np.arange(count)
    # Where a sample comes says nothing of where it lies (a full permutation: 1 / sqrt(n)).
    assert abs(np.corrcoef(position, order)[0, 1]) < 0.02
    # Every twentieth of the epoch is spread over the whole store, as evenly as by chance for
    # its 625 blocks (a twentieth of them in each cell, give or take 0.009).
    for stretch in np.array_split(order, 20):
        counts = np.bincount(stretch * 20 // count, minlength=20)
        assert np.abs(counts / len(stretch) - 0.05).max() < 0.035
    # Neighbours meet in a batch of 32 in under one of 496 pairs; unshuffled blocks: over 200.
    assert same_block_pairs(full, 32, 16) < 0.1
    assert same_block_pairs(order, 32, 16) < 1.0
    one = mixture([count], None, 0, shuffle=True, block=1, window=16384)
    assert same_block_pairs(EpochOrder(one, 0).at(position)[1], 32, 16) < 0.1


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from(["off", "drop", "pad"]))
def test_shares(remaining: int, world: int, even: str) -> None:
    shares = [Rank.of(rank, world, even).share(remaining) for rank in range(world)]
    if even == "off":
        assert sum(shares) == remaining
        assert max(shares) - min(shares) <= 1
    else:
        assert len(set(shares)) == 1
        assert 0 <= (remaining - sum(shares)) * (1 if even == "drop" else -1) < world


@given(st.integers(0, 300), st.integers(1, 6), st.integers(1, 20))
def test_workers_shares(count: int, workers: int, run: int) -> None:
    dealt: list[list[int]] = [[] for _ in range(workers)]
    for n in range(count):
        dealt[n // run % workers].append(n)
    assert [worker_share(count, w, workers, run) for w in range(workers)] == [*map(len, dealt)]


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_apportion(total: int, weights: list[float]) -> None:
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert all(
        abs(count - total * weight / sum(weights)) <= 1
        for count, weight in zip(counts, weights, strict=True)
    )
    share = [total * weight / sum(weights) for weight in weights]
    above = [part - count for part, count in zip(share, counts, strict=True) if count < part]
    below = [part - count + 1 for part, count in zip(share, counts, strict=True) if count > part]
    assert max(above, default=0.0) < min(below, default=1.0) + 1e-6  # the largest are rounded up


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0]}, "weights needs a number above zero for each of 2 stores"),
        ({"weights": [1.0, 0.0]}, "above zero"),
        ({"weights": [1.0, np.inf]}, "above zero"),
        ({"weights": [1.0, 1.0], "shuffle": False}, "weights needs shuffle=True"),
        ({"block": 0}, "shuffle_block"),
        ({"block": 8, "window": 4}, "shuffle_window"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, object], message: str, one_sentence
) -> None:
    options = {"weights": None, "shuffle": True, "block": 4, "window": 16, **change}
    with pytest.raises(ConfigError, match=message) as error:
        mixture([3, 4], options.pop("weights"), 0, **options)
    one_sentence(error.value)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, None), (None, 4)])
def test_ranks_that_cannot_be_are_refused(rank: int | None, world: int | None) -> None:
    with pytest.raises(ConfigError):
        Rank.of(rank, world, "off")


def test_another_even_is_refused() -> None:
    with pytest.raises(ConfigError, match="even is 'all'"):
        Rank.of(0, 1, "all")


@dataclass
class ResumableReader(Resumable):
    order: str
    records: list[int]
    _kind = "stream"

    def __post_init__(self) -> None:
        super().__init__(None, None, "off")

    def _order(self, epoch: int, version: int = STATE_VERSION) -> str:
        return self.order

    def _records(self) -> list[int]:
        return self.records


def test_a_foreign_state_is_refused(one_sentence) -> None:
    state = {"kind": "stream", "version": 1, "order": "a", "epoch": 1, "position": 2}
    reader = ResumableReader("a", [3])
    reader.load_state_dict(state)
    assert reader._upcoming().position == 2
    for changed, order in [(state, "b"), (state | {"version": 9}, "a"), ({}, "a")]:
        with pytest.raises(ConfigError) as error:
            ResumableReader(order, [3]).load_state_dict(changed)
        one_sentence(error.value)
    with pytest.raises(ConfigError, match="3 records then, 5 now") as error:
        ResumableReader("b", [5]).load_state_dict(state | {"records": [3]})
    assert "set_epoch(2)" in one_sentence(error.value)
