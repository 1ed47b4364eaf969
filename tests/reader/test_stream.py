"""The stream: every sample once, for any ranks and workers, and exactly on after a resume."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from latentmill.errors import ConfigError
from latentmill.reader import stream as stream_module
from latentmill.reader.collate import collate, collate_tensors
from latentmill.reader.stream import LatentStream
from latentmill.store.store import LatentStore
from support.latent_store import write_latents

Batch = dict[str, Any]


def loader(stream: LatentStream, batch: int, workers: int) -> Iterator[Batch]:
    """What a DataLoader does, without processes: copies of the stream that take turns."""
    copies = [pickle.loads(pickle.dumps(stream)) for _ in range(workers)] or [stream]
    iterators = []
    with pytest.MonkeyPatch.context() as patch:
        for id_, copy in enumerate(copies):
            info = SimpleNamespace(id=id_, num_workers=workers) if workers else None
            patch.setattr(stream_module, "get_worker_info", lambda info=info: info)
            iterators.append(iter(copy))
    turn = 0
    while iterators:
        samples = [sample for _, sample in zip(range(batch), iterators[turn], strict=False)]
        if samples:
            yield collate(samples)
        if len(samples) < batch:
            iterators.pop(turn)
            turn = turn % len(iterators) if iterators else 0
        else:
            turn = (turn + 1) % len(iterators)


@dataclass(frozen=True)
class World:
    """How an epoch is read: ranks, workers of each, batch size."""

    ranks: int
    workers: int
    batch: int


worlds = st.builds(World, st.integers(1, 4), st.integers(0, 3), st.integers(1, 9))
mixes = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)

Seen = dict[int, tuple[str, bytes]]


def keys_of(url: str) -> list[str]:
    return list(LatentStore(url).keys())


def open_ranks(stores: list[str], world: World, **options: Any) -> list[LatentStream]:
    return [
        LatentStream(
            stores, crop=8, rank=rank, world_size=world.ranks, batch_size=world.batch, **options
        )
        for rank in range(world.ranks)
    ]


def look(batch: Batch, seen: list[tuple[int, str, bytes]]) -> None:
    latents = batch["latents"].numpy()
    for number, position in enumerate(batch["position"]):
        seen.append((position, batch["key"][number], latents[number].tobytes()))


def read_epoch(
    ranks: list[LatentStream], world: World, steps: int | None = None
) -> tuple[list[tuple[int, str, bytes]], dict[str, Any] | None]:
    """Let all ranks take steps, or finish the epoch; gives what they saw and their state."""
    seen: list[tuple[int, str, bytes]] = []
    state = None
    loaders = [loader(stream, world.batch, world.workers) for stream in ranks]
    taken = 0
    while loaders and taken != steps:
        batches = [next(one, None) for one in loaders]
        for batch in batches:
            if batch is not None:
                look(batch, seen)
        if batches[0] is None:
            break
        states = [
            stream.state_after(batch)
            for stream, batch in zip(ranks, batches, strict=True)
            if batch is not None
        ]
        state = states[0]
        assert all(other == state for other in states)  # whichever rank saves it
        taken += 1
    return seen, state


@settings(max_examples=30)
@given(mixes, worlds, st.booleans(), st.integers(0, 5))
def test_an_epoch_is_every_item_once(
    mixed: list[str], mix: list[int], world: World, shuffle: bool, epoch: int
) -> None:
    stores = [mixed[number] for number in mix]
    ranks = open_ranks(stores, world, shuffle=shuffle, seed=3)
    for stream in ranks:
        stream.set_epoch(epoch)
    seen, _ = read_epoch(ranks, world)
    keys = [key for url in stores for key in keys_of(url)]
    assert Counter(key for _, key, _ in seen) == Counter(keys)
    assert sorted(position for position, _, _ in seen) == list(range(len(keys)))
    assert sum(len(stream) for stream in ranks) == len(keys)


@settings(max_examples=25)
@given(mixes, st.lists(worlds, min_size=1, max_size=4), st.data())
def test_a_resumed_epoch_goes_on_exactly(
    mixed: list[str], mix: list[int], path: list[World], data: st.DataObject
) -> None:
    """Broken off at any step, and resumed in another world, several times over."""
    stores = [mixed[number] for number in mix]
    weights = data.draw(st.sampled_from([None, [1.0, 3.0, 2.0][: len(mix)]]), "weights")
    alone, epoch = World(1, 0, 5), 4
    (whole,) = open_ranks(stores, alone, weights=weights)
    whole.set_epoch(epoch)
    expected, _ = read_epoch([whole], alone)
    seen: list[tuple[int, str, bytes]] = []
    state: dict[str, Any] | None = None
    for world in [*path, alone]:
        ranks = open_ranks(stores, world, weights=weights)
        for stream in ranks:
            if state is None:
                stream.set_epoch(epoch)
            else:
                stream.load_state_dict(state)
                stream.set_epoch(epoch)  # what a training loop does anyway
        steps = data.draw(st.integers(0, 4), "steps")
        part, after = read_epoch(ranks, world, None if world is alone else steps)
        seen += part
        state = after or state
    assert sorted(seen) == sorted(expected)


@settings(max_examples=12)
@given(st.integers(0, 73), worlds)
def test_the_streams_own_state_goes_on_exactly(mixed: list[str], taken: int, world: World) -> None:
    (stream,) = open_ranks(mixed, World(1, 0, world.batch))
    iterator = iter(stream)
    first = [next(iterator).key for _ in range(taken)]
    state = stream.state_dict()
    ranks = open_ranks(mixed, world)
    for one in ranks:
        one.load_state_dict(state)
    rest, _ = read_epoch(ranks, world)
    keys = [key for url in mixed for key in keys_of(url)]
    assert Counter(first + [key for _, key, _ in rest]) == Counter(keys)


@settings(max_examples=12)
@given(st.integers(2, 5), st.sampled_from(["drop", "pad"]), st.integers(0, 9))
def test_even_lengths(mixed: list[str], world_size: int, even: str, before: int) -> None:
    world = World(world_size, 0, 1)
    ranks = open_ranks(mixed, world, even=even)
    first, state = read_epoch(ranks, world, before)
    resumed = open_ranks(mixed, World(3, 0, 1), even=even)
    for stream in resumed:
        if state:
            stream.load_state_dict(state)
    counts = {len(stream) for stream in resumed}
    assert len(counts) == 1
    rest, _ = read_epoch(resumed, World(3, 0, 1))
    total = sum(len(LatentStore(url)) for url in mixed)
    times = Counter(key for _, key, _ in first + rest)
    lost, twice = total - len(times), sum(times.values()) - len(times)
    assert (lost < 3, twice) == (True, 0) if even == "drop" else (lost, twice < 3) == (0, True)


def test_every_iteration_is_the_next_epoch(mixed: list[str]) -> None:
    stream = LatentStream(mixed, crop=8)
    epochs = [[sample.position for sample in stream] for _ in range(2)]
    orders = [[sample.key for sample in stream]]
    assert epochs[0] == epochs[1] == list(range(73))
    stream.set_epoch(2)
    assert [sample.key for sample in stream] == orders[0]
    first = next(iter(stream))  # broken off: the next iteration is another epoch
    assert (first.epoch, next(iter(stream)).epoch) == (3, 4)


def test_the_shuffle_is_the_documented_one_by_default(mixed: list[str]) -> None:
    """docs/reader.md: a seed gives the same order with every version."""
    documented = LatentStream(mixed, crop=8, shuffle_block=16, shuffle_window=16_384)
    orders = [
        [sample.key for sample in stream] for stream in (LatentStream(mixed, crop=8), documented)
    ]
    assert orders[0] == orders[1]


def test_a_state_from_the_end_leaves_nothing(mixed: list[str]) -> None:
    stream = LatentStream(mixed, crop=8)
    list(stream)
    state = stream.state_dict()
    other = LatentStream(mixed, crop=8, rank=1, world_size=3)
    other.load_state_dict(state)
    assert len(other) == 24
    assert list(other) == []
    assert [sample.epoch for sample in other] == [1] * 24  # and then comes the next epoch


def test_workers_that_get_nothing_of_the_rest_go_on_with_the_others(mixed: list[str]) -> None:
    broken = LatentStream(mixed, crop=8, batch_size=8)
    iterator = iter(broken)
    for _ in range(72):
        next(iterator)
    resumed = LatentStream(mixed, crop=8, batch_size=8)
    resumed.load_state_dict(broken.state_dict())
    real = DataLoader(
        resumed, batch_size=8, num_workers=2, collate_fn=collate, persistent_workers=True
    )
    epochs = [[(batch["epoch"][0], len(batch["key"])) for batch in real] for _ in range(2)]
    assert epochs == [[(0, 1)], [(1, 8)] * 9 + [(1, 1)]]


def test_the_length_is_that_of_a_whole_epoch_after_a_resume(mixed: list[str]) -> None:
    state = LatentStream(mixed, crop=8, batch_size=8).state_after(
        {"epoch": [0], "position": range(56, 64)}
    )
    resumed = LatentStream(mixed, crop=8, batch_size=8)
    resumed.load_state_dict(state)
    real = DataLoader(
        resumed, batch_size=8, num_workers=1, collate_fn=collate, persistent_workers=True
    )
    for epoch, left in enumerate([2, 10, 10]):
        assert (len(resumed), len(real)) == (73, 10)
        assert [batch["epoch"][0] for batch in real] == [epoch] * left


def test_weights_mix_the_stores(mixed: list[str]) -> None:
    stream = LatentStream(mixed[2:], weights=[3, 1], crop=8)
    counts = Counter(sample.key.partition("/")[0] for sample in stream)
    assert abs(counts["s24"] - 65 * 3 / 4) < 1
    assert sum(counts.values()) == 65


def test_state_needs_to_know_what_was_read(mixed: list[str], one_sentence) -> None:
    with pytest.raises(ConfigError, match="state_after") as error:
        LatentStream(mixed, crop=8).state_dict()
    one_sentence(error.value)
    for batch_size, workers in [(None, 2), (4, 2), (3, 2)]:
        stream = LatentStream(mixed, crop=8, batch_size=batch_size)
        batches = list(loader(stream, 6, workers))
        with pytest.raises(ConfigError, match="batch_size") as error:
            stream.state_after(batches[1])
        one_sentence(error.value)


def test_a_state_of_another_order_is_refused(mixed: list[str]) -> None:
    stream = LatentStream(mixed, crop=8)
    next(iter(stream))
    state = stream.state_dict()
    for other in (
        LatentStream(mixed, crop=8, seed=1),
        LatentStream(mixed[:2], crop=8),
        LatentStream(mixed, crop=9),
        LatentStream(mixed, crop=8, where=lambda fields: fields["role"] == "drums"),
        LatentStream(mixed, crop=8, shuffle_block=3),
    ):
        with pytest.raises(ConfigError, match="another order"):
            other.load_state_dict(state)


def test_options_that_do_not_fit_are_refused(mixed: list[str], tmp_path, one_sentence) -> None:
    other = write_latents(str(tmp_path / "other"), [8, 9], model={"weights_sha256": "abc"})
    small = write_latents(str(tmp_path / "small"), [8, 9], channels=2)
    for options, word in [
        ({"stores": [mixed[0], other]}, "weights_sha256"),
        ({"stores": [mixed[0], small]}, "latent_channels"),
        ({"stores": []}, "No store"),
        ({"batch_size": 0}, "batch_size"),
        ({"crop": 0}, "crop must be at least 1"),
        ({"crop": 16.0}, "crop must be a whole number, not 16.0: write 16"),
        ({"crop": "16"}, "crop must be a whole number, not '16'"),
        ({"crop": True}, "crop must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"batch_size": 8.0}, "batch_size must be a whole number"),
        ({"stores": [7]}, "7 is not a store"),
        ({"mode": "middle"}, "mode"),
        ({"crop": None, "mode": "windows"}, "windows"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            LatentStream(**{"stores": mixed, "crop": 8, **options})
        one_sentence(error.value)


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_dataloader_reads_it(mixed: list[str], way: str) -> None:
    """Real workers, which live on: epoch after epoch, each every item once, in batches of 8."""
    stream = LatentStream(mixed, crop=8, batch_size=8)
    assert len(pickle.dumps(stream)) < 8000
    real = DataLoader(
        stream,
        batch_size=8,
        num_workers=2,
        collate_fn=collate,
        multiprocessing_context=way,
        persistent_workers=True,
    )
    alone = LatentStream(mixed, crop=8)
    for _ in range(2):
        batches = list(real)
        expected = list(alone)
        assert [key for batch in batches for key in batch["key"]] == [s.key for s in expected]
        assert [len(batch["key"]) for batch in batches] == [8] * 9 + [1]
        latents = np.concatenate([batch["latents"].numpy() for batch in batches])
        assert np.array_equal(latents, np.stack([sample.latents for sample in expected]))
    state = stream.state_after(batches[3])
    assert (state["epoch"], state["position"]) == (1, 32)


def test_torchdata_keeps_its_state(mixed: list[str]) -> None:
    """StatefulDataLoader asks the workers' copies."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def build() -> Any:
        stream = LatentStream(mixed, crop=8, batch_size=8)
        return stateful(stream, batch_size=8, num_workers=2, collate_fn=collate)

    first = build()
    expected = [batch["key"] for batch in first]
    for steps in (0, 1, 4, 9):
        broken = build()
        iterator = iter(broken)
        part = [next(iterator)["key"] for _ in range(steps)]
        state = broken.state_dict()
        resumed = build()
        resumed.load_state_dict(state)
        assert part + [batch["key"] for batch in resumed] == expected


class OnDevice(torch.Tensor):
    """A tensor that numpy refuses, as one on a GPU."""

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_the_state_of_a_batch_on_a_device(mixed: list[str]) -> None:
    stream = LatentStream(mixed, crop=8, batch_size=8)
    batch = next(iter(DataLoader(stream, batch_size=8, collate_fn=collate_tensors)))
    moved = {name: batch[name].as_subclass(OnDevice) for name in ("epoch", "position")}
    with pytest.raises(TypeError):
        np.asarray(moved["position"])
    assert stream.state_after(moved) == stream.state_after(batch)
    assert stream.state_after(moved)["position"] == 8


def test_one_iterator_at_a_time(mixed: list[str], one_sentence) -> None:
    stream = LatentStream(mixed, crop=8, batch_size=8)
    older = iter(stream)
    next(older)
    newer = list(stream)  # the abandoned epoch did not count
    assert len(newer) == 73
    with pytest.raises(ConfigError, match="use one iterator of a LatentStream at a time") as error:
        next(older)
    one_sentence(error.value)
    with pytest.raises(ConfigError, match="iterated over again"):
        next(zip(stream, stream, strict=True))
    assert len({sample.key for sample in stream}) == 73
