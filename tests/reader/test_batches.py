"""Batches: every sample once for any ranks, like lengths together, exactly on after a resume."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

from latentmill.errors import ConfigError
from latentmill.reader.batches import BatchSampler
from latentmill.reader.collate import collate
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.order import EpochOrder, permutation
from latentmill.reader.sharding import BLOCK, WINDOW, mixture

options = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 12), "buckets": st.integers(1, 4), "shuffle": st.booleans()}
)


def as_batch(asked: list[tuple[int, int, int]]) -> dict[str, Any]:
    """What `state_after` needs of a batch."""
    epochs, positions, _ = np.array(asked).T
    return {"epoch": epochs, "position": positions}


def read(
    samplers: list[BatchSampler], steps: int | None = None
) -> tuple[list[tuple[int, ...]], dict[str, Any] | None]:
    """Let all ranks take steps; gives the numbers of their batches and their state."""
    iterators: list[Any] = [iter(sampler) for sampler in samplers]
    seen: list[tuple[int, ...]] = []
    state = None
    while steps is None or steps > 0:
        batches = [next(one, None) for one in iterators]
        seen += [tuple(number for _, _, number in batch) for batch in batches if batch]
        if batches[0] is None:
            break
        states = [
            sampler.state_after(as_batch(batch))
            for sampler, batch in zip(samplers, batches, strict=True)
            if batch
        ]
        state = states[0]
        assert all(other == state for other in states)  # whichever rank saves it
        for iterator, batch in zip(iterators, batches, strict=True):
            assert batch is None or iterator.state_dict() == state
        steps = None if steps is None else steps - 1
    return seen, state


def ranks(dataset: LatentDataset, world: int, **given_: Any) -> list[BatchSampler]:
    return [BatchSampler(dataset, rank=rank, world_size=world, **given_) for rank in range(world)]


@pytest.fixture(scope="module")
def dataset(mixed: list[str]) -> LatentDataset:
    return LatentDataset(mixed)


@given(options, st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_is_every_sample_once(
    dataset: LatentDataset, chosen: dict[str, Any], world: int, epoch: int
) -> None:
    samplers = ranks(dataset, world, **chosen)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert sum(len(sampler) for sampler in samplers) == -(-len(dataset) // chosen["batch_size"])
    seen, _ = read(samplers)
    assert sorted(number for batch in seen for number in batch) == list(range(len(dataset)))
    assert sum(len(batch) < chosen["batch_size"] for batch in seen) <= 1


@settings(max_examples=40)
@given(options, st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=4))
def test_a_resumed_epoch_goes_on_exactly(
    dataset: LatentDataset, chosen: dict[str, Any], path: list[tuple[int, int]]
) -> None:
    (alone,) = ranks(dataset, 1, **chosen)
    alone.set_epoch(2)
    expected, _ = read([alone])
    seen: list[tuple[int, ...]] = []
    state = None
    for world, steps in [*path, (1, None)]:
        samplers = ranks(dataset, world, **chosen)
        for sampler in samplers:
            if state:
                sampler.load_state_dict(state)
            sampler.set_epoch(2)
        assert sum(len(sampler) for sampler in samplers) == len(expected)
        part, after = read(samplers, steps)
        seen += part
        state = after or state
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("even", ["drop", "pad"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_even_lengths(dataset: LatentDataset, world: int, even: str) -> None:
    samplers = ranks(dataset, world, batch_size=7, even=even)  # 11 batches
    seen, state = read(samplers)
    assert len({len(sampler) for sampler in samplers}) == 1
    times = Counter(number for batch in seen for number in batch)
    if even == "drop":
        assert set(times.values()) == {1}
        assert len(seen) == 11 // world * world
    else:
        assert len(times) == len(dataset)
        assert len(seen) == -(-11 // world) * world
    assert state is not None
    assert state["position"] == 11


@given(options, st.booleans(), st.integers(0, 3))
def test_batches_are_cut_one_by_one(
    dataset: LatentDataset, chosen: dict[str, Any], drop_last: bool, epoch: int
) -> None:
    """The batches are those of lists, and every position of a batch gives its state."""
    sampler = BatchSampler(dataset, **chosen, drop_last=drop_last)
    sampler.set_epoch(epoch)
    size, count = chosen["batch_size"], chosen["buckets"]
    mixed = mixture(dataset.sizes, None, 0, shuffle=chosen["shuffle"], block=BLOCK, window=WINDOW)
    of_store, samples = EpochOrder(mixed, epoch).at(np.arange(len(dataset)))
    order = (np.cumsum([0, *dataset.sizes])[of_store] + samples).tolist()
    lengths = dataset.lengths[order]
    edges = [np.quantile(lengths, part / count) for part in range(1, count)]
    buckets: list[list[int]] = [[] for _ in range(count)]
    for position, length in enumerate(lengths):
        buckets[sum(edge < length for edge in edges)].append(position)
    expected = [
        bucket[at : at + size]
        for bucket in buckets
        for at in range(0, len(bucket) - size + 1, size)
    ]
    rest = [position for bucket in buckets for position in bucket[len(bucket) // size * size :]]
    expected += [rest[at : at + size] for at in range(0, len(rest), size)]
    if count > 1 and chosen["shuffle"]:
        expected = [expected[number] for number in permutation(len(expected), (0, epoch, 4))]
    if drop_last:
        expected = [batch for batch in expected if len(batch) == size]
    assert len(sampler) == len(expected)
    assert list(sampler) == [[(epoch, at, order[at]) for at in batch] for batch in expected]
    for number, batch in enumerate(expected):
        for at in batch:
            state = sampler.state_after({"epoch": [epoch], "position": [at]})
            assert (state["epoch"], state["position"]) == (epoch, number + 1)


class Counted(RandomSampler):
    """A sampler that counts how often it draws."""

    times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return super().__iter__()


def test_lengths_and_states_do_not_order_an_epoch_again(
    dataset: LatentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loop that asks for both after every batch, as progress bars do."""
    ordered = []

    def order(*given: Any) -> EpochOrder:
        ordered.append(given)
        return EpochOrder(*given)

    def hashed(data: bytes) -> Any:
        hashes.append(data)
        return hashlib.sha256(data)

    monkeypatch.setattr("latentmill.reader.batches.EpochOrder", order)
    hashes: list[bytes] = []
    monkeypatch.setattr("latentmill.reader.batches.hashlib", SimpleNamespace(sha256=hashed))
    drawn = Counted(dataset)
    for sampler in (None, drawn):
        batches = BatchSampler(dataset, 7, sampler=sampler)
        for _ in range(3):
            for batch in batches:
                assert len(batches) == 11
                batches.state_after(as_batch(batch))
    assert len(ordered) == 3
    assert drawn.times == 6  # for each epoch, and for the length of the one after it
    assert len(hashes) == 3


def test_weights_that_change_after_an_epoch_count_in_the_next_one(dataset: LatentDataset) -> None:
    """Also if the length of the next one was asked for before."""
    sampler = WeightedRandomSampler([1.0] * len(dataset), 28)
    batches = BatchSampler(dataset, 7, sampler=sampler)
    for batch in batches:
        assert len(batches) == 4
        batches.state_after(as_batch(batch))
    sampler.weights = torch.eye(len(dataset), dtype=torch.float64)[3]
    assert {number for batch in batches for *_, number in batch} == {3}


def test_lightning_finds_set_epoch(dataset: LatentDataset) -> None:
    """It looks at the loader's sampler and at the batch sampler's own."""
    loader = DataLoader(dataset, batch_sampler=BatchSampler(dataset, 7), collate_fn=collate)
    loader.batch_sampler.sampler.set_epoch(3)  # type: ignore[union-attr]
    assert {epoch for batch in loader for epoch in batch["epoch"]} == {3}


def test_a_state_from_the_end_is_followed_by_the_next_epoch(dataset: LatentDataset) -> None:
    _, state = read([BatchSampler(dataset, 7)])
    assert state is not None
    resumed = BatchSampler(dataset, 7)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert {epoch for batch in resumed for epoch, _, _ in batch} == {1}


def test_the_draws_of_a_sampler_stay_what_they_are(dataset: LatentDataset) -> None:
    """A state saved today means the same samples tomorrow: seed, epoch, the sampler's own seed."""
    sampler = BatchSampler(dataset, 100, sampler=RandomSampler(dataset), seed=7)
    sampler.set_epoch(3)
    key = int(np.random.SeedSequence((7, 3, 0, 5)).generate_state(1, np.uint64)[0]) >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        expected = list(RandomSampler(dataset))
    assert [number for batch in sampler for _, _, number in batch] == expected
    other = BatchSampler(dataset, 100, sampler=SequentialSampler(dataset), seed=7)
    with pytest.raises(ConfigError, match="another order"):
        other.load_state_dict(sampler.state_after({"epoch": [3], "position": [0]}))


def test_buckets_keep_padding_low(made) -> None:
    dataset = LatentDataset(made)

    def padding(buckets: int) -> float:
        numbers, _ = read([BatchSampler(dataset, 4, buckets=buckets)])
        batches = [dataset.lengths[list(batch)] for batch in numbers]
        return sum((batch.max() - batch).sum() for batch in batches) / dataset.lengths.sum()

    assert padding(6) < 0.5 * padding(1)


def test_drop_last_leaves_out_one_batch(dataset: LatentDataset) -> None:
    seen, _ = read([BatchSampler(dataset, 10, drop_last=True, buckets=3)])
    assert [len(batch) for batch in seen] == [10] * 7


def test_a_dataloader_goes_through_epochs(mixed: list[str]) -> None:
    """Workers that live on take each epoch's crops, though nobody tells them the epoch."""
    dataset = LatentDataset(mixed, crop=4)
    sampler = BatchSampler(dataset, 8)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=2,
        collate_fn=collate,
        persistent_workers=True,
    )
    assert len(loader) == 10
    epochs = [list(loader), list(loader)]
    starts = []
    for number, batches in enumerate(epochs):
        assert {int(batch["epoch"][0]) for batch in batches} == {number}
        assert len({key for batch in batches for key in batch["key"]}) == 73
        of_key = zip(
            [key for batch in batches for key in batch["key"]],
            [one["seconds_start"] for batch in batches for one in batch["metadata"]],
            strict=True,
        )
        starts.append(dict(of_key))
    assert starts[0] != starts[1]
    state = sampler.state_after(epochs[1][4])
    assert (state["epoch"], state["position"]) == (1, 5)
    other = BatchSampler(LatentDataset(mixed, crop=4), 8)
    other.load_state_dict(state)
    resumed = DataLoader(dataset, batch_sampler=other, collate_fn=collate)
    assert [batch["key"] for batch in resumed] == [batch["key"] for batch in epochs[1][5:]]


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 1), (2, 4)])
def test_torchdata_keeps_the_state_of_batches(mixed: list[str], workers: int, every: int) -> None:
    """At any time in an epoch after the first one, and between two epochs."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def build() -> Any:
        dataset = LatentDataset(mixed, crop=4)
        return stateful(
            dataset,
            batch_sampler=BatchSampler(dataset, 8),
            num_workers=workers,
            collate_fn=collate,
            snapshot_every_n_steps=every,
        )

    def read_batches(loader: Any) -> list[Any]:
        return [(batch["epoch"], batch["position"], batch["key"]) for batch in loader]

    dataset = LatentDataset(mixed, crop=4)
    batches = BatchSampler(dataset, 8)
    batches.set_epoch(1)
    plain = DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
    second, third = read_batches(plain), read_batches(plain)
    broken = build()
    next(iter(broken))  # an epoch that was not finished
    iterator = iter(broken)
    states = [pickle.dumps(broken.state_dict())]
    states += [pickle.dumps(broken.state_dict()) for _ in iterator]
    states.append(pickle.dumps(broken.state_dict()))
    for number in (0, 3, 10):
        resumed = build()
        resumed.load_state_dict(pickle.loads(states[number]))
        assert read_batches(resumed) == second[number:]
        assert read_batches(resumed) == third
    resumed = build()
    resumed.load_state_dict(pickle.loads(states[11]))
    assert read_batches(resumed) == third


def test_weights_repeat_a_store(mixed: list[str]) -> None:
    dataset = LatentDataset(mixed[2:], crop=4)
    seen, _ = read([BatchSampler(dataset, 5, weights=[3, 1])])
    numbers = [number for batch in seen for number in batch]
    assert abs(sum(number < 24 for number in numbers) - 65 * 3 / 4) < 1


def test_what_does_not_fit_is_refused(dataset: LatentDataset, one_sentence) -> None:
    for given_ in (
        {"batch_size": 0},
        {"batch_size": 2, "buckets": 0},
        {"batch_size": 2, "seed": -1},
    ):
        with pytest.raises(ConfigError) as error:
            BatchSampler(dataset, **given_)
        one_sentence(error.value)
    for number in (-1, len(dataset)):
        with pytest.raises(ConfigError, match=f"samples 0 to {len(dataset) - 1}"):
            list(BatchSampler(dataset, 4, sampler=[0, number]))
    state = BatchSampler(dataset, 4).state_after({"epoch": [0], "position": [0]})
    with pytest.raises(ConfigError, match="another order"):
        BatchSampler(dataset, 5).load_state_dict(state)
