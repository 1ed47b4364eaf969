"""The map-style dataset, batches of it, and what a batch holds."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.sample import Sample, StoredMetadata
from latentmill.store.store import LatentStore
from support.latent_store import HOP, RATE, write_latents


def whole(store: LatentStore, key: str) -> np.ndarray:
    return store[key].latent.astype(np.float32)


@pytest.mark.parametrize("mode", ["random", "start"])
def test_every_item_is_a_sample(made: LatentStore, mode: str) -> None:
    dataset = LatentDataset(made, crop=64, mode=mode)
    assert sorted(sample.key for sample in dataset) == list(made.keys())
    for sample in dataset:
        latent = whole(made, sample.key)
        start = round(sample.metadata["seconds_start"] * RATE / HOP)
        have = min(64, latent.shape[1] - start)
        assert np.array_equal(sample.latents[:, :have], latent[:, start : start + have])
        assert sample.mask.tolist() == [True] * have + [False] * (64 - have)
        assert sample.latents.dtype == np.float32
        assert have == 64 or start == 0
        assert start == 0 or mode == "random"
        assert sample.metadata["number"] == int(sample.key[-5:])
        assert sample.metadata["seconds_total"] == pytest.approx(made[sample.key].duration)


def test_metadata_is_parsed_when_it_is_read(made: LatentStore) -> None:
    """Until then a sample can be pickled, copied, changed and printed as any other."""
    dataset = LatentDataset(made, crop=64, mode="start")
    expected = dataset[3].metadata
    assert expected.keys() == {"number", "seconds_start", "seconds_total"}
    assert type(expected) is dict
    for same in (
        pickle.loads(pickle.dumps(dataset[3])),
        copy.deepcopy(dataset[3]),
        replace(dataset[3], epoch=5),
    ):
        assert same.metadata == expected
    assert repr(expected) in repr(dataset[3])
    sample = dataset[3]
    sample.metadata["caption"] = "a song"
    assert sample.metadata["caption"] == "a song"
    with pytest.raises(AttributeError, match="'Sample' object has no attribute 'latent'"):
        sample.latent  # noqa: B018
    with pytest.raises(FrozenInstanceError):
        sample.key = "other"


@pytest.mark.parametrize("damaged", ["{", "[1]", '"text"', "null"])
def test_damaged_metadata_is_an_error_when_it_is_read(damaged: str) -> None:
    sample = Sample.unparsed(StoredMetadata(damaged, 0.0, 1.0), key="item")
    with pytest.raises(StorageError, match="metadata of a record is not a valid JSON object"):
        sample.metadata  # noqa: B018


def test_windows_are_all_of_every_item(made: LatentStore) -> None:
    dataset = LatentDataset(made, crop=50, mode="windows")
    assert len(dataset) == sum(-(-record.frames // 50) for record in made)
    parts: dict[str, list[Sample]] = {}
    for sample in dataset:
        parts.setdefault(sample.key, []).append(sample)
    for key, samples in parts.items():
        pieces = [sample.latents[:, sample.mask] for sample in samples]
        assert np.array_equal(np.concatenate(pieces, axis=1), whole(made, key))
        starts = [sample.metadata["seconds_start"] * RATE / HOP for sample in samples]
        assert starts == pytest.approx([50 * n for n in range(len(samples))])
    assert dataset.lengths.sum() == sum(record.frames for record in made)


def test_crops_change_with_the_epoch_and_the_seed_alone(made: LatentStore) -> None:
    def starts(epoch: int, seed: int = 0) -> list[float]:
        dataset = LatentDataset(made, crop=8, seed=seed)
        dataset.set_epoch(epoch)
        return [sample.metadata["seconds_start"] for sample in dataset]

    assert starts(1) == starts(1)
    assert len({tuple(starts(*one)) for one in [(0,), (1,), (0, 1)]}) == 3
    dataset = LatentDataset(made, crop=8)
    dataset.set_epoch(0)
    backwards = dataset.__getitems__(list(range(len(made)))[::-1])
    assert [sample.metadata["seconds_start"] for sample in backwards][::-1] == starts(0)


def test_numbers_count_from_the_end_too(made: LatentStore) -> None:
    dataset = LatentDataset(made, crop=8)
    assert dataset[-1].key == dataset[len(dataset) - 1].key
    for number in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[number]


def test_whole_items_are_padded_by_collate(made: LatentStore) -> None:
    dataset = LatentDataset(made)
    samples = dataset.__getitems__([0, 1, 2])
    batch = lm.collate(samples)
    frames = max(made[sample.key].frames for sample in samples)
    assert batch["latents"].shape == (3, 4, frames)
    assert batch["latents"].dtype == torch.float32
    assert batch["mask"].dtype == torch.bool
    for row, sample in enumerate(samples):
        latent = whole(made, sample.key)
        have = latent.shape[1]
        assert np.array_equal(batch["latents"][row, :, :have], latent)
        silence = made.origin.of_length(frames)[:, have:]
        assert np.array_equal(batch["latents"][row, :, have:], silence)
        assert batch["mask"][row].sum() == have
    assert [one["number"] for one in batch["metadata"]] == [int(key[-5:]) for key in batch["key"]]


def test_collate_refuses_what_it_cannot_pad(made: LatentStore, one_sentence) -> None:
    short, long = sorted(LatentDataset(made).__getitems__([0, 1]), key=lambda s: s.latents.shape[1])
    with pytest.raises(ConfigError, match="silence is not known") as error:
        lm.collate([replace(short, origin=None), long])
    one_sentence(error.value)
    other = replace(long, latents=long.latents[:2])
    with pytest.raises(ConfigError, match="channels"):
        lm.collate([long, other])


class Louder:
    """A transform that uses chance, and builds a new sample from what it knows of."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        return Sample(sample.key, sample.latents * random.uniform(1, 2), sample.mask)


def test_transforms_are_repeatable(made: LatentStore) -> None:
    dataset = LatentDataset(made, crop=8, transforms=[Louder()], seed=4)
    plain = LatentDataset(made, crop=8, seed=4)
    dataset.set_epoch(0)
    plain.set_epoch(0)
    first, again = dataset[7], dataset.__getitems__([3, 7])[1]
    assert np.array_equal(first.latents, again.latents)
    pairs = zip(dataset, plain, strict=True)
    factors = [one.latents.sum() / two.latents.sum() for one, two in pairs]
    assert len(set(factors)) == len(factors)
    assert first.position == 7
    assert first.origin is not None


def test_normalising_comes_last(made: LatentStore) -> None:
    normal = lm.Normalize.from_store(made)
    sample = LatentDataset(made, transforms=[Louder(), normal])[5]
    plain = LatentDataset(made, transforms=[Louder()])[5]
    assert np.allclose(sample.latents, (plain.latents - made.mean[:, None]) / made.std[:, None])
    every = [LatentDataset(made, transforms=[normal])[n].latents for n in range(len(made))]
    joined = np.concatenate(every, axis=1)
    assert np.abs(joined.mean(1)).max() < 1e-3
    assert np.abs(joined.std(1) - 1).max() < 1e-3
    assert np.allclose(normal.undo(normal.apply(plain.latents)), plain.latents, atol=1e-4)


def test_what_collate_adds_is_normalised_too(made: LatentStore) -> None:
    normal = lm.Normalize.from_store(made)
    plain, normalised = (
        lm.collate(LatentDataset(made, transforms=transforms).__getitems__([0, 1, 2]))
        for transforms in ([], [normal])
    )
    assert not plain["mask"].all()
    assert np.allclose(normalised["latents"], normal.apply(plain["latents"].numpy()), atol=1e-5)
    forgetful = LatentDataset(made, transforms=[normal, Louder()])  # it gives samples no origin
    batch = lm.collate(forgetful.__getitems__([0, 1, 2]))
    padding = ~batch["mask"][:, None].expand_as(batch["latents"])
    assert torch.equal(batch["latents"][padding], normalised["latents"][padding])


def test_other_ways_to_normalise(made: LatentStore, one_sentence) -> None:
    latents = np.concatenate([record.latent for record in made], axis=1).astype(np.float64)
    overall = lm.Normalize.from_store(made.url, by="overall")
    assert lm.Normalize.from_store(Path(made.url), by="overall") == overall
    assert np.allclose(
        overall.apply(latents), (latents - latents.mean()) / latents.std(), atol=1e-4
    )
    with pytest.raises(ConfigError, match="by is 'std'") as error:
        lm.Normalize.from_store(made, by="std")
    one_sentence(error.value)
    with pytest.raises(ConfigError, match="2 channels") as error:
        lm.Normalize((0.0, 0.0), (1.0, 1.0)).apply(latents)
    one_sentence(error.value)


def test_constant_channels_cannot_be_normalised(tmp_path: Path, one_sentence) -> None:
    store = write_latents(str(tmp_path), [4], latents=[np.ones((4, 4), np.float16)])
    with pytest.raises(ConfigError, match="does not vary") as error:
        lm.Normalize.from_store(store)
    one_sentence(error.value)


def test_several_stores_are_one_after_the_other(mixed: list[str]) -> None:
    dataset = LatentDataset(mixed, crop=8)
    assert len(dataset) == 73
    assert dataset[0].key.startswith("s1/")
    assert dataset[72].key == "s41/00040"
    asked = dataset.__getitems__([50, 0, 3, 72, 1])
    assert [sample.key for sample in asked] == [dataset[n].key for n in [50, 0, 3, 72, 1]]


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_dataloader_reads_it(mixed: list[str], way: str) -> None:
    dataset = LatentDataset(mixed, crop=16)
    dataset[0]  # its files are open
    dataset.set_epoch(0)
    loader = DataLoader(
        dataset,
        batch_size=7,
        num_workers=1,
        collate_fn=lm.collate,
        multiprocessing_context=way,
    )
    batches = list(loader)
    assert sum(len(batch["key"]) for batch in batches) == len(dataset)
    for number, batch in enumerate(batches):
        there = range(7 * number, min(7 * number + 7, len(dataset)))
        expected = lm.collate([dataset[one] for one in there])
        assert torch.equal(batch["latents"], expected["latents"])


def test_a_filter_travels_in_bits(made: LatentStore) -> None:
    chosen = {"drums", "vocals"}
    dataset = LatentDataset(made, crop=8, where=lambda fields: fields["role"] in chosen)
    sent = pickle.dumps(dataset)
    assert len(sent) < 3000
    copy = pickle.loads(sent)
    assert [sample.key for sample in copy] == [sample.key for sample in dataset]
    assert len(copy) == 20


def test_a_store_that_changed_on_the_way_is_refused(tmp_path: Path, one_sentence) -> None:
    folder = tmp_path / "store"
    sent = pickle.dumps(LatentDataset(write_latents(str(folder), [9, 9]), crop=8))
    shutil.rmtree(folder)
    write_latents(str(folder), [9, 9, 9])
    with pytest.raises(StoreError, match="changed") as error:
        pickle.loads(sent)
    one_sentence(error.value)


def test_an_empty_store_is_refused(tmp_path: Path, one_sentence) -> None:
    with pytest.raises(StoreError, match="no records") as error:
        LatentDataset(write_latents(str(tmp_path), []), crop=8)
    one_sentence(error.value)
