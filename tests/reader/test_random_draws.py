"""Crops, gains and mixes are new in every epoch, whichever way a DataLoader reads the dataset."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.reader.stems import AllStems, ContextAndTarget
from latentmill.store.store import LatentStore
from support.latent_store import write_latents

ITEMS, CROP = 24, 16
Epoch = dict[str, list[bytes]]  # what was read of each item
LIVING = pytest.param((2, "fork", True), marks=pytest.mark.slow)  # persistent workers
CONFIGS = [(0, None, False), (2, "fork", False), LIVING]
SPAWN = [
    pytest.param((1, "spawn", persistent), marks=pytest.mark.slow) for persistent in (True, False)
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("long")
    return write_latents(str(folder / "store"), [1000] * ITEMS).url


def samples(url: str) -> lm.LatentDataset:
    return lm.LatentDataset(url, crop=CROP, seed=3)


def stems(url: str) -> lm.StemDataset[Any]:
    return lm.StemDataset(
        url, ContextAndTarget(), crop=CROP, seed=3, gains=(-6, 6), active_db=None, per_song=4
    )


MAKE = pytest.mark.parametrize("make", [samples, stems])
Make = Callable[[str], Any]


def loader(dataset: Any, config: tuple[int, str | None, bool], **options: Any) -> DataLoader[Any]:
    workers, way, persistent = config
    options.setdefault("batch_size", 8)
    if "batch_sampler" in options:
        del options["batch_size"]
    return DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context=way,
        persistent_workers=persistent,
        collate_fn=lm.collate,
        **options,
    )


def read(batches: Any) -> Epoch:
    seen: Epoch = {}
    for batch in batches:
        latents = batch["latents"] if "latents" in batch else batch["target"]
        for key, latent in zip(batch["key"], latents.numpy(), strict=True):
            seen.setdefault(key, []).append(latent.tobytes())
    return {key: sorted(found) for key, found in seen.items()}


def frozen(*epochs: Epoch) -> int:
    """How many items have the same in two of the epochs."""
    return sum(
        one[key] == other[key]
        for number, one in enumerate(epochs)
        for other in epochs[:number]
        for key in one.keys() & other.keys()
    )


@MAKE
@pytest.mark.parametrize("config", [*CONFIGS, *SPAWN], ids=str)
def test_crops_differ_between_epochs(url: str, make: Make, config: Any) -> None:
    """With a plain sampler without and with `set_epoch`, and with `BatchSampler`."""
    torch.manual_seed(0)
    dataset = make(url)
    plain = loader(dataset, config, shuffle=True)
    assert frozen(*(read(plain) for _ in range(3))) <= 1  # of 72 chances of 1 in 985
    told = []
    for epoch in (0, 1, 0):  # the workers that live on are told, too
        dataset.set_epoch(epoch)
        told.append(read(plain))
    assert told[0] == told[2]
    assert frozen(told[0], told[1]) == 0
    again = make(url)
    again.set_epoch(1)
    assert read(loader(again, (0, None, False))) == told[1]  # in any order, by any worker

    batched = loader(dataset, config, batch_sampler=lm.BatchSampler(dataset, 8))
    epochs = [read(batched) for _ in range(3)]
    assert frozen(*epochs) == 0
    again = make(url)
    sampler = lm.BatchSampler(again, 8)
    sampler.set_epoch(2)
    assert read(loader(again, (0, None, False), batch_sampler=sampler)) == epochs[2]


@MAKE
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_draws_of_one_item_differ(url: str, make: Make, config: Any) -> None:
    dataset = make(url)
    weights = [1.0] + [0.0] * (len(dataset) - 1)
    one = WeightedRandomSampler(weights, 64)
    ((plain,),) = [read(loader(dataset, config, sampler=one)).values()]
    assert len(set(plain)) > 55  # of 64 draws from 985 places
    sampler = lm.BatchSampler(dataset, 8, sampler=one)
    ((drawn,),) = [read(loader(dataset, config, batch_sampler=sampler)).values()]
    assert len(set(drawn)) > 55
    dataset.set_epoch(4)
    batch = lm.collate(dataset.__getitems__([0] * 8))  # of one batch at least
    assert len(set(next(iter(read([batch]).values())))) == 8
    assert batch["position"] == [n * len(dataset) for n in range(8)]


SAMPLERS: dict[str, Callable[[int], Any]] = {
    "weighted": lambda size: WeightedRandomSampler(np.arange(size) + 1.0, 50),
    "random": lambda size: RandomSampler(range(size)),
    "replacement": lambda size: RandomSampler(
        range(size), replacement=True, num_samples=30, generator=torch.Generator().manual_seed(5)
    ),
    "subset": lambda size: SubsetRandomSampler(range(0, size, 2)),
    "sequential": lambda size: SequentialSampler(range(size)),
}


def asked(sampler: lm.BatchSampler, epochs: int = 1) -> list[list[tuple[int, int, int]]]:
    return [batch for _ in range(epochs) for batch in sampler]


@MAKE
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("buckets", [1, 3])
def test_any_sampler_is_repeatable_sharded_and_resumable(
    url: str, make: Make, name: str, buckets: int
) -> None:
    dataset = make(url)

    def batches(**options: Any) -> lm.BatchSampler:
        sampler = SAMPLERS[name](len(dataset))
        return lm.BatchSampler(dataset, 7, sampler=sampler, buckets=buckets, **options)

    before = torch.random.get_rng_state()
    first = asked(batches(), epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)  # training's own chance is untouched
    torch.rand(3)
    assert asked(batches(), epochs=2) == first
    half = len(first) // 2
    numbers = [[[n for *_, n in batch] for batch in part] for part in (first[:half], first[half:])]
    assert (numbers[0] != numbers[1]) == (name != "sequential" or buckets > 1)
    assert sorted({p for batch in first[:half] for _, p, _ in batch}) == list(
        range(sum(map(len, first[:half])))
    )
    ranks = [asked(batches(rank=rank, world_size=3)) for rank in range(3)]
    dealt = [batch for turn in range(len(ranks[0])) for rank in ranks for batch in rank[turn:][:1]]
    assert dealt == first[:half]
    sampler = batches()
    state = sampler.state_after({"epoch": [0], "position": [first[1][0][1]]})
    resumed = batches()
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert asked(resumed) == first[2:half]
    if name != "sequential":
        with pytest.raises(ConfigError, match="another order"):
            batches(seed=9).load_state_dict(state)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_distributed_sampler_deals_itself(url: str, world: int) -> None:
    dataset = samples(url)

    def rank(number: int) -> lm.BatchSampler:
        dealt: DistributedSampler[Any] = DistributedSampler(dataset, world, number)
        return lm.BatchSampler(dataset, 5, sampler=dealt)

    epochs: list[set[int]] = []
    for epoch in (0, 1):
        ranks = [rank(number) for number in range(world)]
        for one in ranks:
            one.set_epoch(epoch)
        batches = [asked(one) for one in ranks]
        samples_ = [sample for part in batches for batch in part for sample in batch]
        assert sorted(number for _, _, number in samples_) == list(range(ITEMS))
        assert sorted(position for _, position, _ in samples_) == list(range(ITEMS))
        epochs.append({tuple(batch) for part in batches for batch in part})  # type: ignore[misc]
        states = [
            one.state_after({"epoch": [epoch], "position": [part[0][0][1]]})
            for one, part in zip(ranks, batches, strict=True)
        ]
        assert all(state == states[0] for state in states)
        resumed = rank(world - 1)
        resumed.load_state_dict(states[0])
        assert asked(resumed) == batches[-1][1:]
    assert epochs[0] != epochs[1]


@MAKE
def test_a_run_resumes_in_the_middle(url: str, make: Make) -> None:
    def run(state: Any = None) -> tuple[list[Any], Any]:
        dataset = make(url)
        sampler = lm.BatchSampler(
            dataset, 5, sampler=WeightedRandomSampler(np.arange(len(dataset)) + 1.0, 40)
        )
        if state:
            sampler.load_state_dict(state)
        found = loader(dataset, (2, "fork", False), batch_sampler=sampler)
        batches = [batch for _ in range(2) for batch in found]
        return batches, sampler.state_after(batches[10])

    whole, state = run()
    assert (state["epoch"], state["position"]) == (1, 3)
    rest, _ = run(state)
    for ours, theirs in zip(rest[:5], whole[11:], strict=True):
        assert ours["key"] == theirs["key"]
        assert read([ours]) == read([theirs])


def test_a_sampler_may_yield_tensors(url: str) -> None:
    dataset = samples(url)
    numbers = torch.arange(3, 15)
    sampler = lm.BatchSampler(dataset, 4, sampler=SubsetRandomSampler(numbers))
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert {number for batch in batches for _, _, number in batch} == set(range(3, 15))


def test_what_samplers_cannot_be_is_said(url: str, one_sentence) -> None:
    dataset = samples(url)
    pairs = torch.utils.data.BatchSampler(SequentialSampler(range(8)), 2, False)
    for options, word in [
        ({"sampler": pairs}, "not one of batches"),
        ({"sampler": SequentialSampler(range(99))}, "samples 0 to 23"),
        ({"sampler": [0.5]}, "does not yield sample numbers"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            list(lm.BatchSampler(dataset, 4, **options))
        one_sentence(error.value)
    for given, word in [
        ((dataset, 4.0), "batch_size must be a whole number, not 4.0: write 4"),
        ((torch.zeros(8), 4), "not Tensor"),
    ]:
        with pytest.raises(ConfigError, match=word):
            lm.BatchSampler(*given)
    with pytest.raises(ConfigError, match="not both"):
        lm.BatchSampler(dataset, 4, weights=[1], sampler=SequentialSampler(range(4)))
    for wrong in (1.5, -1, "1"):
        with pytest.raises(ConfigError, match="epoch must be"):
            dataset.set_epoch(wrong)  # type: ignore[arg-type]
    for wrong in ("item/00003", 1.0):
        with pytest.raises(ConfigError, match="read by number"):
            dataset[wrong]  # type: ignore[index]
    for mixed in ([(0, 1, 2), 3], [3, (0, 1, 2)], [(0, 1), (2, 3), (4, 5)], [(0, 1, 2.5)]):
        with pytest.raises(ConfigError) as error:
            dataset.__getitems__(mixed)
        one_sentence(error.value)


def segments() -> set[str]:
    """Torch's named memory of this process; other processes may run tests too."""
    return {path.name for path in Path("/dev/shm").glob(f"torch_{os.getpid()}_*")}


def test_no_named_shared_memory_stays(url: str) -> None:
    before = segments()
    dataset = samples(url)
    assert segments() == before  # not even while it is used
    list(loader(dataset, (2, "fork", False)))
    list(loader(dataset, (1, "spawn", False)))
    copy = pickle.loads(pickle.dumps(dataset))
    copy.set_epoch(7)
    assert dataset.epoch == 0
    assert segments() == before


def test_a_batch_has_the_names_of_its_samples(url: str) -> None:
    """With and without `collate_fn`, from each dataset."""
    everything = lm.StemDataset(url, AllStems(("drums", "bass")), crop=CROP, active_db=None)
    for dataset in (samples(url), stems(url), everything, lm.LatentStream(url, crop=CROP)):
        sample = next(iter(dataset))
        names = set(getattr(sample, "__dataclass_fields__", getattr(sample, "_fields", ())))
        for options in ({}, {"collate_fn": lm.collate}):
            batch = next(iter(DataLoader(dataset, batch_size=3, **options)))
            assert set(batch) == names - {"origin", "fields"}  # there are no fields
            assert {"key", "mask", "metadata", "epoch", "position"} <= set(batch)
            assert {"seconds_start", "seconds_total"} <= set(batch["metadata"][0])
            assert batch["mask"].shape[0] == len(batch["key"]) == 3
        tensors = lm.collate_tensors(dataset_samples(dataset))
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
        assert {"seconds_start", "seconds_total", "epoch", "position"} <= set(tensors)
        assert set(tensors) - {"seconds_start", "seconds_total"} <= names


def dataset_samples(dataset: Any) -> list[Any]:
    return [sample for sample, _ in zip(dataset, range(3), strict=False)]


def test_collate_says_what_it_cannot_take(url: str, one_sentence) -> None:
    sample, other = samples(url)[0], stems(url)[0]
    for given, word in [
        ([], "no samples"),
        (sample, "a single one: give the DataLoader a batch_size"),
        (other, "a single one"),
        ([sample, other], "different types"),
    ]:
        for function in (lm.collate, lm.collate_tensors):
            with pytest.raises(ConfigError, match=word) as error:
                function(given)  # type: ignore[arg-type]
            one_sentence(error.value)


@pytest.fixture
def printed_warnings() -> Iterator[None]:
    """Forked workers print their warnings, as outside of pytest."""

    def show(message: Any, category: type[Warning], *rest: Any) -> None:
        sys.stderr.write(f"{category.__name__}: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@pytest.fixture
def stream(url: str) -> Iterator[lm.LatentStream]:
    yield lm.LatentStream(url, crop=CROP, batch_size=8)


def stream_loader(stream: lm.LatentStream, way: str, persistent: bool) -> DataLoader[Any]:
    return loader(stream, (2 if way == "fork" else 1, way, persistent))


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_stream_that_starts_an_epoch_again_warns(
    stream: lm.LatentStream, way: str, capfd: pytest.CaptureFixture[str], printed_warnings: None
) -> None:
    """The workers warn, on the error output: a forked worker is not heard of elsewhere."""
    found = stream_loader(stream, way, persistent=False)
    assert read(found)
    assert "RepeatedEpochWarning" not in capfd.readouterr().err
    read(found)
    assert capfd.readouterr().err.count("RepeatedEpochWarning: this DataLoader reads epoch 0") == 1
    epochs = []
    for epoch in (1, 2):
        stream.set_epoch(epoch)
        epochs.append(read(found))
    stream.set_epoch(2)  # wanted
    assert read(found) == epochs[1]
    assert frozen(*epochs) == 0
    assert "RepeatedEpochWarning" not in capfd.readouterr().err


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_living_workers_of_a_stream_advance_and_are_told(
    stream: lm.LatentStream, way: str, capfd: pytest.CaptureFixture[str], printed_warnings: None
) -> None:
    found = stream_loader(stream, way, persistent=True)
    epochs = [read(found) for _ in range(3)]
    assert frozen(*epochs) == 0
    stream.set_epoch(1)
    assert read(found) == epochs[1]
    assert read(found) == epochs[2]
    stream.set_epoch(0)
    batches = list(found)
    stream.load_state_dict(stream.state_after(batches[0]))
    assert [batch["key"] for batch in found] == [batch["key"] for batch in batches[1:]]
    assert read(found) == epochs[1]
    assert "RepeatedEpochWarning" not in capfd.readouterr().err


def test_a_stream_of_which_nothing_is_random_does_not_warn(
    url: str, capfd: pytest.CaptureFixture[str], printed_warnings: None
) -> None:
    found = loader(lm.LatentStream(url, crop=CROP, mode="start", shuffle=False), (1, "fork", False))
    assert read(found) == read(found)
    assert "RepeatedEpochWarning" not in capfd.readouterr().err


def test_an_incomplete_store_warns(tmp_path: Path, url: str) -> None:
    place = str(tmp_path / "part")
    write_latents(place, [40] * 20, sealed=False)
    (tmp_path / "part" / "commits" / "000001.json").unlink()
    count = r"2 of 3 units are committed, so 8 of 20 items are missing"
    for opened in (
        lambda: lm.open(place),
        lambda: lm.LatentDataset(place, crop=8),
        lambda: lm.LatentStream([place], crop=8),
        lambda: lm.StemDataset(place, ContextAndTarget(), crop=8),
    ):
        with pytest.warns(lm.IncompleteStoreWarning, match=count) as caught:
            opened()
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = lm.open(url)
        read = pickle.loads(pickle.dumps(lm.LatentDataset(store, crop=8)))  # as a worker gets it
        assert len([read[number] for number in range(len(read))]) == ITEMS
    with pytest.raises(ConfigError, match=r"read by key, not by 0: use store\[key\]"):
        store[0]  # type: ignore[index]


def test_a_state_of_a_store_that_has_grown_says_so(tmp_path: Path, one_sentence) -> None:
    def states(lengths: list[int]) -> tuple[lm.LatentStream, lm.BatchSampler]:
        place = tmp_path / str(len(lengths))
        store: LatentStore = write_latents(str(place), lengths)
        dataset = lm.LatentDataset(store, crop=8)
        return lm.LatentStream(store, crop=8, batch_size=4), lm.BatchSampler(dataset, 4)

    batch = {"epoch": [3], "position": [0, 1, 2, 3]}
    for before, after in zip(states([20] * 9), states([20] * 12), strict=True):
        before.set_epoch(3)
        with pytest.raises(ConfigError, match="9 records then, 12 now") as error:
            after.load_state_dict(before.state_after(batch))
        assert "set_epoch(4)" in one_sentence(error.value)
