"""Fields of samples: cut at the same seconds, whole, padded, in every reader."""

from __future__ import annotations

import functools
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.errors import ConfigError, StoreError
from latentmill.models.families.mdct import build
from latentmill.plan import FieldEntry
from latentmill.reader.field_values import Cutting
from latentmill.storage.storage import Storage
from support.field_stores import NAMES, RATES, write_fields
from support.in_process import encode, in_process
from support.latent_store import HOP, RATE, write_again, write_latents

LENGTHS = [1, 7, 40, 64, 65, 200, 300, 58, 90, 12]
CROP = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> lm.LatentStore:
    store = write_latents(str(tmp_path_factory.mktemp("base")), LENGTHS, per_unit=4)
    write_fields(store, LENGTHS)
    return lm.open(store.url)


def nearest_start(start: int, crop: int, rate: Fraction) -> tuple[int, int]:
    """First frame and number of frames, by trying every start; the later of two is taken."""
    count = int(-((-crop * rate) // 1))
    middle = (start + Fraction(crop, 2)) * rate
    tried = range(int(start * rate) - count - 2, int((start + crop) * rate) + 2)
    return min(tried, key=lambda first: (abs(first + Fraction(count, 2) - middle), -first)), count


@functools.cache
def opened(url: str, name: str) -> lm.LatentStore:
    return lm.open(url).field(name)


@functools.cache
def _whole(url: str, name: str, key: str) -> np.ndarray:
    return opened(url, name)[key].latent.astype(np.float32)


def whole(store: lm.LatentStore, name: str, key: str) -> np.ndarray:
    return _whole(store.url, name, key)


def expected(store: lm.LatentStore, name: str, key: str, start: int, crop: int) -> Any:
    """A crop of a field and its mask, by the slow way."""
    hop, rate, _ = RATES.get(name, (HOP // 2, RATE, 2))
    values = whole(store, name, key)
    first, count = nearest_start(start, crop, Fraction(HOP * rate, RATE * hop))
    first = min(first, values.shape[1] - 1)
    silence = opened(store.url, name).origin.of_length(first + count)[:, values.shape[1] :]
    mask = np.arange(first, first + count) < values.shape[1]
    return np.concatenate([values, silence], axis=1)[:, first : first + count], mask


def check(store: lm.LatentStore, sample: Any, start: int, crop: int | None) -> None:
    """Compare all fields of a sample with the whole fields."""
    for name in ("text", "windows", "clap"):
        value, wanted = sample.fields[name], whole(store, name, sample.key).T
        assert np.array_equal(value.values, wanted[0] if name == "clap" else wanted)
        assert value.mask.all()
    for name in (*RATES, "codes"):
        value = sample.fields[name]
        if crop is None:
            wanted, mask = whole(store, name, sample.key), None
        else:
            wanted, mask = expected(store, name, sample.key, start, crop)
        assert value.values.dtype == (np.int64 if name == "codes" else np.float32)
        assert np.array_equal(value.values, wanted), (name, sample.key, start)
        assert np.array_equal(value.mask, np.ones(wanted.shape[1], bool) if crop is None else mask)


def first_frame(sample: Any) -> int:
    return round(sample.metadata["seconds_start"] * RATE / HOP)


@pytest.mark.parametrize(
    ("mode", "crop"), [("random", CROP), ("start", 3), ("windows", 7), ("windows", 19)]
)
def test_all_fields_are_cut_at_the_seconds_of_the_latents(
    base: lm.LatentStore, mode: Any, crop: int
) -> None:
    dataset = lm.LatentDataset(base, crop=crop, mode=mode, fields=NAMES)
    seen = 0
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for sample in dataset.__getitems__(range(min(len(dataset), 40))):
            check(base, sample, first_frame(sample), crop)
            seen += 1
        if seen >= 200:
            break
    assert seen >= 200


def test_whole_items_have_whole_fields(base: lm.LatentStore) -> None:
    for sample in lm.LatentDataset(base, fields=NAMES).__getitems__(range(len(LENGTHS))):
        check(base, sample, 0, None)


@pytest.mark.parametrize("rate", [(1, 1), (1, 10), (3, 2), (147, 80), (160, 147), (1, 3), (7, 1)])
def test_crops_of_fields_have_no_gap_and_the_nearest_middle(rate: tuple[int, int]) -> None:
    cutting = Cutting(rate)
    for crop in (1, 2, 3, 24):
        starts = np.arange(0, 400, 7)
        found = cutting.starts(starts, crop)
        for start, first in zip(starts.tolist(), found.tolist(), strict=True):
            assert (first, cutting.frames(crop)) == nearest_start(start, crop, Fraction(*rate))
        windows = cutting.starts(np.arange(0, 400, crop), crop)
        assert windows[0] == 0
        assert (np.diff(windows) <= cutting.frames(crop)).all()


def sines(count: int, rate: int, seed: int) -> np.ndarray:
    """A sound without high frequencies, so that it is known at every sample rate."""
    time = np.arange(count) / rate
    return sum(
        0.2 * np.sin(2 * np.pi * (f * time + seed / 7)) for f in (311.0, 740.5, 1203.25)
    ).astype(np.float32)


def test_crops_of_fields_decode_to_the_waveform(tmp_path: Path) -> None:
    (tmp_path / "songs").mkdir()
    seconds = {f"{n}": 0.5 + n / 3 for n in range(4)}
    for seed, (key, length) in enumerate(seconds.items()):
        path = tmp_path / "songs" / f"{key}.wav"
        soundfile.write(path, sines(round(length * 44100), 44100, seed), 44100, subtype="FLOAT")
    store = str(tmp_path / "store")
    models = {"": (64, 44100), "/fields/b": (48, 44100), "/fields/c": (80, 16000)}
    with in_process():
        for place, (hop, rate) in models.items():
            options = {"hop": hop, "sample_rate": rate}
            encode(tmp_path / "songs", store + place, dtype="float32", model_options=options)
    crop = 100
    dataset = lm.LatentDataset(store, crop=crop, fields=["b", "c"])
    for epoch in range(50):
        dataset.set_epoch(epoch)
        for sample in dataset.__getitems__(range(4)):
            start = round(sample.metadata["seconds_start"] * 44100) // 64
            for name, (hop, rate) in (("b", (48, 44100)), ("c", (80, 16000))):
                field = sample.fields[name]
                first, count = nearest_start(start, crop, Fraction(64 * rate, 44100 * hop))
                assert field.values.shape == (hop, count)
                model = build(hop=hop, sample_rate=rate).load("cpu")
                latents = torch.from_numpy(np.ascontiguousarray(field.values))[None]
                audio = model.decode(latents, (count - 1) * hop)[0, 0].numpy()
                seed = int(sample.key)
                total = round(seconds[sample.key] * rate)
                wanted = sines(total, rate, seed)[first * hop : (first + count - 1) * hop]
                # A resampler's filter reaches beyond the borders of a sound.
                safe = slice(0 if rate == 44100 or first else 200, len(wanted) - 400)
                error = np.abs(audio[: len(wanted)] - wanted)[safe].max()
                assert error < (1e-5 if rate == 44100 else 2e-3), (name, sample.key, first)
    assert dataset[0].fields["b"].shift == pytest.approx(0, abs=0.5)


def test_batches_pad_fields_and_have_masks(base: lm.LatentStore) -> None:
    dataset = lm.LatentDataset(base, fields=NAMES)
    samples = dataset.__getitems__(range(len(LENGTHS)))
    fields = lm.collate(samples)["fields"]
    assert list(fields) == NAMES
    for number, sample in enumerate(samples):
        for name, (values, mask) in fields.items():
            value = sample.fields[name]
            if name == "clap":
                assert torch.equal(values[number], torch.from_numpy(value.values))
                assert mask.all()
                continue
            rows, have = value.time_major, len(value.time_major)
            block = values[number].T if value.form.timed else values[number]
            assert torch.equal(block[:have], torch.from_numpy(np.ascontiguousarray(rows)))
            assert mask[number].tolist() == [True] * have + [False] * (len(block) - have)
            if not value.form.timed:
                assert not block[have:].any()
            elif have < len(block):
                silence = base.field(name).origin.of_length(len(block))[:, have:]
                assert np.array_equal(block[have:].numpy(), silence.T.astype(block.numpy().dtype))
    shapes = {name: tuple(values.shape) for name, (values, _) in fields.items()}
    assert shapes["text"] == (10, 11, 5)
    assert shapes["clap"] == (10, 6)
    assert shapes["windows"] == (10, 3, 6)
    assert shapes["codes"] == (10, 2, 600)
    assert fields["codes"].values.dtype == torch.int64


def equal(batch: Any, wanted: Any) -> None:
    """Two batches: values, types, and the order of tensors in memory."""
    assert type(batch) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert batch.dtype == wanted.dtype
        assert batch.stride() == wanted.stride()
        assert torch.equal(batch, wanted)
    elif isinstance(wanted, dict):
        assert list(batch) == list(wanted)
        for name in wanted:
            equal(batch[name], wanted[name])
    elif isinstance(wanted, tuple):
        for one, other in zip(batch, wanted, strict=True):
            equal(one, other)
    else:
        assert batch == wanted


@pytest.fixture(scope="module")
def two(base: lm.LatentStore, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two stores with the same fields."""
    other = write_latents(
        str(tmp_path_factory.mktemp("other")), LENGTHS[3:], per_unit=3, prefix="b"
    )
    write_fields(other, LENGTHS[3:])
    return [base.url, other.url]


@pytest.mark.parametrize("collate", [lm.collate, lm.collate_tensors])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stores", [1, 2])
def test_a_loader_makes_the_batches_of_a_data_loader(
    two: list[str], workers: int, stores: int, collate: Any
) -> None:
    def stream() -> lm.LatentStream:
        return lm.LatentStream(two[:stores], crop=CROP, batch_size=4, fields=NAMES)

    plain = stream()
    wanted = list(DataLoader(plain, batch_size=4, collate_fn=collate))
    with lm.Loader(stream(), workers=workers, collate_fn=collate) as loader:
        held = list(loader)
        for batch, one in zip(held, wanted, strict=True):
            equal(batch, one)
        for batch, one in zip(loader, DataLoader(plain, 4, collate_fn=collate), strict=True):
            equal(batch, one)
    with lm.Loader(stream(), workers=workers, dtype="float16") as loader:
        fields = next(iter(loader))["fields"]
        assert fields["text"].values.dtype == torch.float16
        assert fields["codes"].values.dtype == torch.int64
        assert torch.equal(fields["text"].values.float(), wanted[0]["fields"]["text"].values)


def test_a_state_is_resumed_with_other_fields(base: lm.LatentStore) -> None:
    def stream(*names: str) -> lm.LatentStream:
        return lm.LatentStream(base.url, crop=CROP, batch_size=3, fields=names)

    plain, with_fields = stream(), stream("text", "fine")
    batches = zip(DataLoader(plain, 3), DataLoader(with_fields, 3), strict=True)
    for number, (one, other) in enumerate(batches):
        assert other["key"] == one["key"]
        assert torch.equal(other["latents"], one["latents"])
        if number == 1:
            assert with_fields.state_after(other) == plain.state_after(one)
            state = plain.state_after(one)
        if number == 2:
            wanted = other
    resumed = stream("text", "fine")
    resumed.load_state_dict(state)
    equal(next(iter(DataLoader(resumed, 3))), wanted)


def test_all_fields_of_a_remote_batch_are_read_in_one_round(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names, lengths = ["fine", "text", "clap"], LENGTHS[:6]
    store = write_latents(f"{s3_bucket}/store", lengths, per_unit=3)
    write_fields(store, lengths, names=names)
    rounds: list[int] = []
    real = Storage.read_ranges
    monkeypatch.setattr(
        Storage,
        "read_ranges",
        lambda self, ranges: rounds.append(len(ranges)) or real(self, ranges),
    )
    for crop in (CROP, None):
        options: dict[str, Any] = {"crop": crop, "fields": names, "metadata": False}
        rounds.clear()
        samples = lm.LatentDataset(store.url, mode="start", **options).__getitems__(range(6))
        assert rounds == [6 * 4]
        cached = lm.LatentDataset(store.url, mode="start", cache=tmp_path / "cache", **options)
        cached.__getitems__(range(6))
        rounds.clear()
        again = lm.collate(cached.__getitems__(range(6)))
        equal(again["fields"], lm.collate(samples)["fields"])
        assert rounds == []  # all of it is in the cache
        for sample in samples:
            for name in ("text", "clap"):
                wanted = whole(store, name, sample.key).T
                wanted = wanted[0] if name == "clap" else wanted
                assert np.array_equal(sample.fields[name].values, wanted)
            wanted, mask = expected(store, "fine", sample.key, 0, crop or CROP)
            if crop is None:
                wanted, mask = whole(store, "fine", sample.key), np.True_
            assert np.array_equal(sample.fields["fine"].values, wanted)
            assert (sample.fields["fine"].mask == mask).all()
    monkeypatch.undo()
    options = {"crop": CROP, "fields": names, "batch_size": 2}
    plain = DataLoader(lm.LatentStream(store.url, **options), 2)
    with lm.Loader(lm.LatentStream(store.url, **options), workers=1) as loader:
        for batch, one in zip(loader, plain, strict=True):  # its worker reads two at a time
            equal(batch, one)


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_a_field_that_is_sealed_again_while_it_is_read(tmp_path: Path, format_name: str) -> None:
    store = write_latents(str(tmp_path / "store"), [40] * 8, format_name=format_name, per_unit=4)
    url = f"{store.url}/fields/b"
    entry = FieldEntry("b", "frames", "audio")
    write_latents(url, [40] * 8, format_name=format_name, per_unit=4, field=entry)
    dataset = lm.LatentDataset(store, crop=8, mode="start", fields=["b"])
    first = lm.LatentDataset(store, crop=8, mode="start", fields=["b"])
    before = first.__getitems__(range(8))
    assert np.array_equal(before[5].fields["b"].values, before[5].latents)
    latents = [np.full((4, 40), number, np.float16) for number in range(8)]
    write_again(url, [0, 1], latents)
    for number, sample in enumerate(dataset.__getitems__(range(8))):
        assert (sample.fields["b"].values == number).all()
        assert np.array_equal(sample.latents, before[number].latents)


def test_records_without_a_field_are_an_error_or_left_out(
    tmp_path: Path, one_sentence: Any
) -> None:
    store = write_latents(str(tmp_path / "store"), LENGTHS, per_unit=4)
    write_fields(store, LENGTHS, failed=(2, 5))
    with pytest.raises(ConfigError, match=r"no value for 2 of 10 records, such as") as error:
        lm.LatentDataset(store, fields=["fine", "text"])
    assert "item/00002" in one_sentence(error.value)
    assert f"`latentmill status {store.url}/fields/text` shows why others" in str(error.value)
    every = lm.LatentDataset(store, fields=["fine"])
    left = lm.LatentDataset(store, fields=["fine", "text"], missing_fields="leave_out")
    assert (len(every), len(left)) == (10, 8)
    assert "left_out=2" in repr(left)
    keys = [sample.key for sample in every.__getitems__(range(10))]
    samples = left.__getitems__(range(8))
    assert [sample.key for sample in samples] == [
        key for key in keys if key not in ("item/00002", "item/00005")
    ]
    for sample in samples:
        assert np.array_equal(sample.fields["text"].values, whole(store, "text", sample.key).T)
    with_where = lm.LatentDataset(store, fields=["text"], where="number > 5")
    assert len(with_where) == 4
    with pytest.raises(ConfigError, match="1 of 4 records"):
        lm.LatentDataset(store, fields=["text"], where=lambda r: 3 <= r["metadata"]["number"] < 7)
    with pytest.raises(ConfigError, match="no record of"):
        lm.LatentDataset(store, fields=["text"], where="number == 5", missing_fields="leave_out")
    with pytest.raises(ConfigError, match="missing_fields"):
        lm.LatentDataset(store, fields=["text"], missing_fields="drop")  # type: ignore[arg-type]


def test_names_of_fields(base: lm.LatentStore, one_sentence: Any) -> None:
    assert base.fields == sorted(NAMES)
    assert base.field("text").info.field is not None
    with pytest.raises(
        StoreError, match="has no field 'txt', its fields are clap, coarse"
    ) as error:
        lm.LatentDataset(base, fields=["txt"])
    one_sentence(error.value)
    with pytest.raises(StoreError, match="has no field 'b', it has no fields"):
        base.field("text").field("b")
    for wrong in ("text", ["text", "text"]):
        with pytest.raises(ConfigError, match="list of different names"):
            lm.LatentStream(base, fields=wrong)


@pytest.mark.parametrize("turned", [False, True])
def test_fields_of_another_form_cannot_be_mixed(
    tmp_path: Path, turned: bool, one_sentence: Any
) -> None:
    """One vector for the item in one store, and one for each window in the other."""
    stores = []
    for name, count, seconds in (("one", 1, None), ("each", 3, 10.0)):
        store = write_latents(str(tmp_path / name), [8, 9], prefix=name)
        values = [np.full((2, count), number, np.float16) for number in range(2)]
        write_latents(
            f"{store.url}/fields/clap",
            [count] * 2,
            channels=2,
            latents=values,
            prefix=name,
            field=FieldEntry("clap", "vector", "audio", seconds),
        )
        stores.append(store.url)
    with pytest.raises(ConfigError, match="cannot be mixed") as refused:
        lm.LatentDataset(stores[::-1] if turned else stores, crop=4, fields=["clap"])
    assert "a vector for each window" in one_sentence(refused.value)


def test_a_store_without_fields_is_not_asked_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_latents(str(tmp_path / "store"), LENGTHS)
    asked: list[str] = []
    real = Storage.folders
    monkeypatch.setattr(
        Storage, "folders", lambda self, folder: asked.append(folder) or real(self, folder)
    )
    samples = lm.LatentDataset(store.url, crop=CROP).__getitems__([0])
    assert "fields" not in lm.collate(samples)
    assert samples[0].fields == {}
    assert asked == []
    assert lm.open(store.url).fields == []
    assert asked == ["fields"]


def test_a_dataset_with_fields_is_small_when_pickled(base: lm.LatentStore) -> None:
    dataset = lm.LatentDataset(base, crop=CROP, fields=NAMES)
    data = pickle.dumps(dataset)
    assert len(data) < 4000
    for one, other in zip(
        pickle.loads(data).__getitems__([3]), dataset.__getitems__([3]), strict=True
    ):
        assert one.key == other.key
