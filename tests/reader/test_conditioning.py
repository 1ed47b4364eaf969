"""Fields as conditions: dropout, fields at the latents' rate, fields of stems."""

from __future__ import annotations

import functools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.reader.field_values import FieldForm, FieldValue
from latentmill.reader.sample import Sample, sample_random
from latentmill.reader.stems import (
    AllStems,
    ContextAndTarget,
    ContextTarget,
    MixtureTriplet,
    Stems,
    Triplet,
)
from latentmill.reader.transforms import RandomFade, RandomGain
from support.field_stores import NAMES, write_fields
from support.latent_store import write_latents

LENGTHS = [40, 64, 65, 200, 300, 31, 90, 50, 70, 44, 120, 33]
CROP = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> lm.LatentStore:
    store = write_latents(str(tmp_path_factory.mktemp("base")), LENGTHS, per_unit=4)
    write_fields(store, LENGTHS)
    return store


def empty_of(store: lm.LatentStore, name: str) -> np.ndarray:
    return np.load(f"{store.url}/fields/{name}/origin.npy")


def dropped(value: FieldValue, store: lm.LatentStore, name: str) -> bool:
    if name == "text":
        return np.array_equal(value.values, empty_of(store, name).T)
    if name == "clap":
        return np.array_equal(value.values, empty_of(store, name)[:, 0])
    return not value.values.any()


def test_fields_are_dropped_at_the_given_rate_and_alone(base: lm.LatentStore) -> None:
    drops = [lm.Drop("text", 0.3), lm.Drop("clap", 0.5)]
    dataset = lm.LatentDataset(base, crop=CROP, fields=NAMES, transforms=drops)
    plain = lm.LatentDataset(base, crop=CROP, fields=NAMES)
    numbers = [(epoch, n, n) for epoch in range(40) for n in range(len(LENGTHS))]
    counts = dict.fromkeys(("text", "clap"), 0)
    for epoch in range(40):
        asked = numbers[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        pairs = zip(dataset.__getitems__(asked), plain.__getitems__(asked), strict=True)
        for sample, kept in pairs:
            for name, count in counts.items():
                value = sample.fields[name]
                if dropped(value, base, name):
                    counts[name] = count + 1
                    assert value.mask.all()
                else:
                    assert np.array_equal(value.values, kept.fields[name].values)
            assert np.array_equal(sample.latents, kept.latents)
            assert np.array_equal(sample.fields["fine"].values, kept.fields["fine"].values)
    # Binomial with 480 draws: more than four standard deviations on each side.
    assert 100 < counts["text"] < 190
    assert 190 < counts["clap"] < 290


def test_dropped_samples_are_a_function_of_seed_epoch_and_position(base: lm.LatentStore) -> None:
    def stream(workers: int) -> list[Any]:
        stream = lm.LatentStream(
            base.url, crop=CROP, fields=["text"], batch_size=4, transforms=[lm.Drop("text", 0.5)]
        )
        if workers < 0:
            return list(DataLoader(stream, 4, collate_fn=lm.collate))
        with lm.Loader(stream, workers=workers) as loader:
            return list(loader)

    for workers in (0, 2):
        for one, other in zip(stream(workers), stream(-1), strict=True):
            assert one["key"] == other["key"]
            for mine, wanted in zip(one["fields"]["text"], other["fields"]["text"], strict=True):
                assert torch.equal(mine, wanted)


@pytest.mark.parametrize("name", ["text", "clap", "windows", "codes", "fine"])
def test_what_takes_the_place_of_a_dropped_field(base: lm.LatentStore, name: str) -> None:
    def read(**options: Any) -> FieldValue:
        transforms = [lm.Drop(name, 1.0, **options)]
        dataset = lm.LatentDataset(base, crop=CROP, fields=[name], transforms=transforms)
        dataset.set_epoch(3)
        return dataset[5].fields[name]

    plain = lm.LatentDataset(base, crop=CROP, fields=[name], transforms=[lm.Drop(name, 0.0)])
    plain.set_epoch(3)
    kept, value, zeros = plain[5].fields[name], read(), read(zeros=True)
    assert not zeros.values.any()
    assert zeros.values.shape == kept.values.shape
    assert np.array_equal(zeros.mask, kept.mask)
    if name in ("text", "windows"):
        assert np.array_equal(value.values, empty_of(base, name).T)
    elif name == "clap":
        assert np.array_equal(value.values, empty_of(base, name)[:, 0])
    else:  # silence, as at the place of the crop; the middle of E(0) is one value per channel
        assert value.values.shape == kept.values.shape
        assert value.values.dtype == kept.values.dtype
        silence = set(base.field(name).origin.frames[0].tolist())
        assert set(value.values[0].tolist()) <= silence
        assert not np.array_equal(value.values, kept.values)


def sample_with(values: np.ndarray, rate: float, shift: float, frames: int = 12) -> Sample:
    value = FieldValue(
        values, np.ones(values.shape[1], np.bool_), FieldForm("frames"), rate=rate, shift=shift
    )
    latents = np.zeros((2, frames), np.float32)
    return Sample("a", latents, np.ones(frames, np.bool_), fields={"hints": value})


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.3])
def test_fields_at_the_rate_of_the_latents(rate: float, shift: float) -> None:
    """A ramp over time, so a value tells the time that it was taken from."""
    count, frames, random = 60, 12, np.random.default_rng(0)
    ramp = np.stack([np.arange(count) + 0.5, np.full(count, 7.0)]).astype(np.float32)
    middles = shift + (np.arange(frames) + 0.5) * rate  # of the latents' frames
    sample = sample_with(ramp, rate, shift)
    linear = lm.Align("hints", "linear")(sample, random).fields["hints"]
    assert np.allclose(linear.values[0], np.clip(middles, 0.5, count - 0.5), atol=1e-5)
    assert (linear.values[1] == 7).all()
    nearest = lm.Align("hints")(sample, random).fields["hints"]
    assert nearest.values.shape == (2, frames)
    assert (np.abs(nearest.values[0] - np.maximum(middles, 0.0)) <= 0.5 + 1e-6).all()
    assert nearest.mask.all()
    assert (nearest.rate, nearest.shift) == (1.0, 0.0)


def test_aligned_fields_of_crops_and_batches(base: lm.LatentStore) -> None:
    """Each latent frame gets the field's frame at its middle, with the mask of that frame."""
    transforms = [lm.Align("fine"), lm.Align("codes"), lm.Align("coarse", "linear")]
    names = ["fine", "codes", "coarse"]
    dataset = lm.LatentDataset(base, crop=CROP, fields=names, transforms=transforms)
    seen = 0
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for sample in dataset.__getitems__(range(len(LENGTHS))):
            start = round(sample.metadata["seconds_start"] * 44100 / 4096)
            for name in ("fine", "codes"):
                field, value = base.field(name), sample.fields[name]
                model, whole = field.info.model, field[sample.key].latent.astype(np.float32)
                rate = 4096 * model["sample_rate"] / (44100 * model["hop"])
                at = np.floor((start + np.arange(CROP) + 0.5) * rate).astype(int)
                inside = at < whole.shape[1]
                assert np.array_equal(value.values[:, inside], whole[:, at[inside]])
                assert value.mask[inside].all()
                seen += int(inside.sum())
    assert seen > 200 * CROP
    batch = lm.collate(dataset.__getitems__(range(4)))
    assert batch["fields"]["fine"].values.shape == (4, 3, CROP)
    assert batch["fields"]["coarse"].mask.shape == (4, CROP)
    whole = lm.LatentDataset(base, fields=names, transforms=transforms)
    batch = lm.collate(whole.__getitems__(range(4)))
    assert batch["fields"]["codes"].values.shape[2] == batch["latents"].shape[2]


def test_transforms_of_latents_leave_fields_as_they_are(base: lm.LatentStore) -> None:
    changes = [RandomGain(), RandomFade(4)]
    changed = lm.LatentDataset(base, crop=CROP, fields=NAMES, transforms=changes)
    plain = lm.LatentDataset(base, crop=CROP, fields=NAMES)
    requests = [(2, n, n) for n in range(len(LENGTHS))]
    pairs = zip(changed.__getitems__(requests), plain.__getitems__(requests), strict=True)
    for one, other in pairs:
        assert not np.array_equal(one.latents, other.latents)
        for name in NAMES:
            assert np.array_equal(one.fields[name].values, other.fields[name].values)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: lm.Drop("text", 1.5), "from 0 to 1"),
        (lambda: lm.Align("fine", "cubic"), "'nearest' or 'linear'"),
        (lambda: lm.Drop("txt", 0.5), "no field 'txt'"),
        (lambda: lm.Align("text"), "no rate, because its kind is tokens"),
        (lambda: lm.Align("codes", "linear"), "cannot be interpolated"),
    ],
)
def test_wrong_conditions_are_one_sentence(
    base: lm.LatentStore, make: Any, reason: str, one_sentence: Any
) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        lm.LatentDataset(base, crop=CROP, fields=NAMES, transforms=[make()])[0]
    one_sentence(error.value)


# --- stems


def each_stem(stems: Stems, random: np.random.Generator) -> dict[str, Any]:
    """A task that returns what it was given."""
    return {"stems": stems}


@pytest.mark.parametrize("remix", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_fields_of_stems_are_cut_with_their_stems(base: lm.LatentStore, remix: float) -> None:
    """`fine` of a stem must be what `LatentDataset` cuts for the same crop of the same item."""
    dataset = lm.StemDataset(
        base, each_stem, crop=CROP, fields=["fine", "text"], remix=remix, active_db=None
    )
    plain = lm.LatentDataset(base, crop=CROP, fields=["fine", "text"])
    keys = [sample.key for sample in plain.__getitems__(range(len(LENGTHS)))]
    checked = 0
    for epoch in range(30):
        for (stems,) in (
            one.values() for one in dataset.__getitems__([(epoch, n, n) for n in range(3)])
        ):
            assert len(stems.fields) == len(stems)
            for key, fields in zip(stems.keys, stems.fields, strict=True):
                text = base.field("text")[key].latent.astype(np.float32).T
                assert np.array_equal(fields["text"].values, text)
                whole = base.field("fine")[key].latent.astype(np.float32)
                value = fields["fine"]
                if not remix:  # all stems have the crop of the song
                    start = round(stems.metadata["seconds_start"] * 44100 / 4096)
                    rate = 4096 * 24000 / (44100 * 480)
                    count = value.values.shape[1]
                    first = int(np.floor((start + CROP / 2) * rate - count / 2 + 0.5))
                    if start < base[key].frames:
                        first = min(first, whole.shape[1] - 1)
                    have = max(0, min(count, whole.shape[1] - first))
                    assert np.array_equal(value.values[:, :have], whole[:, first : first + have])
                    assert value.mask.tolist() == [True] * have + [False] * (count - have)
                checked += 1
    assert checked == 30 * len(LENGTHS)
    assert set(keys) == {base.index.key(row) for row in range(len(LENGTHS))}


@pytest.mark.parametrize("task", [ContextAndTarget(), MixtureTriplet()])
def test_tasks_return_the_fields_of_the_target(base: lm.LatentStore, task: Any) -> None:
    options: dict[str, Any] = {"crop": CROP, "fields": ["text", "clap"], "active_db": None}
    dataset = lm.StemDataset(base, task, **options)
    samples = dataset.__getitems__([(0, n, n) for n in range(3)])
    roles = ("drums", "bass", "vocals", "other")
    for sample in samples:
        number = int(sample.key.rpartition(" ")[2]) * 4 + roles.index(sample.role)
        text = base.field("text")[f"item/{number:05d}"].latent.astype(np.float32)
        assert np.array_equal(sample.fields["text"].values, text.T)
    batch = lm.collate(samples)
    assert batch["fields"]["text"].values.shape[::2] == (3, 5)
    assert batch["fields"]["clap"].values.shape == (3, 6)
    plain = lm.StemDataset(base, task, crop=CROP, active_db=None)
    without = lm.collate(plain.__getitems__([(0, n, n) for n in range(3)]))
    assert "fields" not in without
    assert without.keys() | {"fields"} == batch.keys()
    for name in without.keys() - {"metadata", "role", "key", "epoch", "position"}:
        assert torch.equal(without[name], batch[name])
    dropping = lm.StemDataset(base, task, transforms=[lm.Drop("text", 1.0)], **options)
    with lm.Loader(dropping, 3, workers=1) as loader:
        values, mask = next(iter(loader))["fields"]["text"]
    assert np.array_equal(values[0].numpy(), empty_of(base, "text").T)
    assert mask.all()


def with_own(fields: Any, stems: Stems, random: np.random.Generator) -> dict[str, Any]:
    """A task that returns a dict, with fields of the store or something else by that name."""
    given = stems.fields_of(0) if fields is None else fields
    return {"latents": stems.latents[0], "mask": stems.mask[0], "fields": given}


def test_a_task_that_returns_a_dict(base: lm.LatentStore) -> None:
    """`Drop` and `Align` change its fields; something of its own by that name stays in batches."""
    options: dict[str, Any] = {"crop": CROP, "fields": ["text", "fine"], "active_db": None}
    changes = [lm.Drop("text", 1.0), lm.Align("fine")]
    task = functools.partial(with_own, None)
    dataset = lm.StemDataset(base, task, transforms=changes, **options)
    batch = lm.collate([dataset[0], dataset[1]])
    assert np.array_equal(batch["fields"]["text"].values[0].numpy(), empty_of(base, "text").T)
    assert batch["fields"]["fine"].values.shape == (2, 3, CROP)
    for own in ({}, {"mine": 1}):
        dataset = lm.StemDataset(base, functools.partial(with_own, own), **options)
        assert lm.collate([dataset[0], dataset[1]])["fields"] == [own, own]
    no_mask = lm.StemDataset(base, each_stem, transforms=[lm.Drop("text", 1.0)], **options)
    with pytest.raises(ConfigError, match="samples have no field 'text'"):
        no_mask[0]


@pytest.mark.parametrize("kind", [ContextTarget, Triplet])
def test_results_of_tasks_can_be_made_without_fields(kind: Any) -> None:
    """As code does that was written before there were fields."""
    values = [np.zeros((2, 3), np.float32)] * (len(kind._fields) - 1)
    sample = pickle.loads(pickle.dumps(kind(*values)))
    assert sample.fields == {}
    assert "fields" not in lm.collate([sample, sample])


def test_a_mix_of_stems_has_no_fields(base: lm.LatentStore, one_sentence: Any) -> None:
    dataset = lm.StemDataset(base, AllStems(("drums",)), crop=CROP, fields=["text"], active_db=None)
    with pytest.raises(ConfigError, match="a mix has no fields") as error:
        dataset[0]
    one_sentence(error.value)


def test_songs_with_a_stem_without_a_field(tmp_path: Any) -> None:
    store = write_latents(str(tmp_path / "store"), LENGTHS, per_unit=4)
    write_fields(store, LENGTHS, failed=(5,))
    options: dict[str, Any] = {"crop": CROP, "fields": ["text"], "active_db": None}
    with pytest.raises(ConfigError, match="no value for 1 of 12 records, such as 'item/00005'"):
        lm.StemDataset(store, ContextAndTarget(), **options)
    left = lm.StemDataset(store, ContextAndTarget(), missing_fields="leave_out", **options)
    assert [group.name for group in left.groups] == ["group 0", "group 2"]
    assert "fields=text" in repr(left)
    assert "left_out=1" in repr(left)


def test_a_sample_made_anew_keeps_its_fields(base: lm.LatentStore) -> None:
    """A transform of a user may return `replace(sample, ...)`."""

    def louder(sample: Sample, random: np.random.Generator) -> Sample:
        return replace(sample, latents=sample.latents * 2)

    dataset = lm.LatentDataset(base, crop=CROP, fields=["text"], transforms=[louder])
    assert list(dataset[0].fields) == ["text"]
    assert sample_random(0, 0, 0).random() == sample_random(0, 0, 0).random()
