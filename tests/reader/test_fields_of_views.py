"""Fields of views: the values that the bases' fields have for the view's records."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import ConfigError, StoreError
from latentmill.reader.crops import CropReader
from latentmill.reader.field_crops import StoreFields
from support.field_stores import NAMES, write_fields
from support.latent_store import write_again, write_latents

LENGTHS = {"one": [5, 40, 64, 7, 90, 12, 33, 8, 51], "two": [9, 30, 65, 21]}
KEPT = "number != 2 and number != 7"


def write_base(folder: str, name: str, **fields: Any) -> lm.LatentStore:
    store = write_latents(f"{folder}/{name}", LENGTHS[name], per_unit=3, prefix=name)
    write_fields(store, LENGTHS[name], **fields)
    return lm.open(store.url)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lm.LatentStore]:
    """Two stores with all kinds of fields; leave them unchanged."""
    folder = str(tmp_path_factory.mktemp("bases"))
    return {name: write_base(folder, name) for name in LENGTHS}


@pytest.fixture
def view(bases: dict[str, lm.LatentStore], tmp_path: Path) -> lm.LatentStore:
    """A selection of both stores, with prefixes."""
    both = str(tmp_path / "both")
    lm.merge([bases["two"].url, bases["one"].url], both, prefix=True)
    lm.select(both, str(tmp_path / "view"), where=KEPT)
    return lm.open(tmp_path / "view")


def base_of(bases: dict[str, lm.LatentStore], key: str) -> tuple[lm.LatentStore, str]:
    name, _, own = key.partition("/")
    return bases[name], own


def test_values_are_those_of_the_bases(
    bases: dict[str, lm.LatentStore], view: lm.LatentStore
) -> None:
    assert view.fields == sorted(NAMES)
    for name in NAMES:
        field = view.field(name)
        assert list(field.keys()) == list(view.keys())
        assert field.info.field == bases["one"].field(name).info.field
        for key in view.keys():  # noqa: SIM118
            base, own = base_of(bases, key)
            ours, theirs = field[key], base.field(name)[own]
            assert np.array_equal(ours.latent, theirs.latent)
            assert ours.latent.dtype == theirs.latent.dtype
            assert ours.key == key
    samples = list(lm.LatentStream(view, fields=["text", "clap"], shuffle=False))
    assert len(samples) == len(view)
    for sample in samples:
        base, own = base_of(bases, sample.key)
        assert np.array_equal(sample.fields["text"].values, base.field("text")[own].latent.T)
        assert np.array_equal(sample.fields["clap"].values, base.field("clap")[own].latent[:, 0])


def test_crops_are_those_of_the_bases(
    bases: dict[str, lm.LatentStore], view: lm.LatentStore
) -> None:
    """One batch of crops of all fields, by a reader that was pickled."""

    def read(store: lm.LatentStore, keys: list[str], starts: list[int]) -> list[Any]:
        crops = CropReader(store)
        reader = pickle.loads(pickle.dumps(StoreFields(crops, [store.field(n) for n in NAMES])))
        rows = np.array([crops.row(key) for key in keys])
        values = reader.read(rows, np.array(starts), 24)
        reader._crops.read_block(rows, np.array(starts), 24, values.requests)
        return values.samples(placed=True)

    keys = list(view.keys())
    starts = [int(view.entry(key).frames * 0.6) for key in keys]
    for key, start, fields in zip(keys, starts, read(view, keys, starts), strict=True):
        base, own = base_of(bases, key)
        (wanted,) = read(base, [own], [start])
        for name in NAMES:
            ours, theirs = fields[name], wanted[name]
            count = theirs.values.shape[-1 if theirs.form.timed else 0]
            assert np.array_equal(
                ours.values[..., :count] if theirs.form.timed else ours.values, theirs.values
            ), name
            assert (ours.rate, ours.shift, ours.form) == (theirs.rate, theirs.shift, theirs.form)


def test_records_without_a_value(
    bases: dict[str, lm.LatentStore], tmp_path: Path, one_sentence: Any
) -> None:
    """One base lacks a field, another has it for some records only."""
    for name in LENGTHS:
        shutil.copytree(bases[name].url, tmp_path / name)
    shutil.rmtree(tmp_path / "two" / "fields" / "text")
    one = write_base(str(tmp_path / "new"), "one", names=["text"], failed=(1, 4))
    view = str(tmp_path / "view")
    lm.merge([one.url, str(tmp_path / "two")], view)
    assert lm.open(view).fields == []
    with pytest.raises(ConfigError, match="has no value for 6 of 13 records") as error:
        lm.LatentDataset(view, fields=["text"])
    one_sentence(error.value)
    data = lm.LatentDataset(view, fields=["text"], missing_fields="leave_out")
    assert len(data) == 7
    with pytest.raises(StoreError, match="has no field 'nothing'"):
        lm.LatentDataset(view, fields=["nothing"])


def test_fields_with_other_settings_are_refused(
    bases: dict[str, lm.LatentStore], tmp_path: Path
) -> None:
    shutil.copytree(bases["two"].url, tmp_path / "two")
    shutil.copytree(tmp_path / "two" / "fields" / "clap", tmp_path / "two" / "fields" / "other")
    shutil.copytree(bases["one"].url, tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "fields" / "text", tmp_path / "one" / "fields" / "other")
    lm.merge([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "view"))
    with pytest.raises(StoreError, match="computed with other settings"):
        lm.open(tmp_path / "view").field("other")
    (tmp_path / "two" / "fields" / "other" / "dataset.json").unlink()
    with pytest.raises(StoreError, match="is not complete"):
        lm.open(tmp_path / "view").field("other")


def test_a_field_is_brought_up_to_date_while_it_is_read(
    bases: dict[str, lm.LatentStore], tmp_path: Path
) -> None:
    shutil.copytree(bases["one"].url, tmp_path / "one")
    lm.select(str(tmp_path / "one"), str(tmp_path / "view"), where=KEPT)
    data = lm.LatentDataset(str(tmp_path / "view"), fields=["windows"])
    field = lm.open(tmp_path / "view").field("windows")
    before = next(iter(field)).latent.T
    old = [record.latent for record in lm.open(f"{tmp_path}/one/fields/windows")]
    units = range(len(field.plan.units))
    write_again(f"{tmp_path}/one/fields/windows", units, [latent + 1 for latent in old])
    assert np.array_equal(data[0].fields["windows"].values, before + 1)
    assert np.array_equal(next(iter(field)).latent.T, before + 1)


def test_a_field_is_brought_up_to_date_before_it_is_read(
    bases: dict[str, lm.LatentStore], tmp_path: Path
) -> None:
    shutil.copytree(bases["one"].url, tmp_path / "one")
    lm.select(str(tmp_path / "one"), str(tmp_path / "view"), where=KEPT)
    field = lm.open(tmp_path / "view").field("coarse")
    old = {record.key: record.latent for record in lm.open(f"{tmp_path}/one/fields/coarse")}
    units = range(len(field.plan.units))
    write_again(f"{tmp_path}/one/fields/coarse", units, [latent + 1 for latent in old.values()])
    reader = CropReader(field)
    block, _ = reader.read_block(np.zeros(1, np.int64), np.zeros(1, np.int64), 1)
    assert np.array_equal(block[0].T, (old[reader.key(0)] + 1)[:, :1])


def test_views_in_buckets() -> None:
    for name in LENGTHS:
        write_base("memory://views", name, names=["text", "coarse"])
    urls = [f"memory://views/{name}" for name in LENGTHS]
    lm.merge(urls, "memory://views/both")
    read = lm.LatentDataset("memory://views/both", crop=8, fields=["text", "coarse"])
    assert len(read) == 13
    for number, sample in enumerate(read[n] for n in range(13)):
        base = lm.open(urls[number >= 9])
        wanted = base.field("text")[sample.key].latent.T
        assert np.array_equal(sample.fields["text"].values, wanted)


@pytest.mark.parametrize("remote_first", [True, False])
def test_a_local_view_of_a_bucket_and_a_disk(tmp_path: Path, remote_first: bool) -> None:
    folders = ["memory://mixed", str(tmp_path)][:: 1 if remote_first else -1]
    bases = [
        write_base(folder, name, names=["text", "coarse"])
        for folder, name in zip(folders, LENGTHS, strict=True)
    ]
    view = tmp_path / "view"
    lm.merge([base.url for base in bases], view)
    text = lm.open(view).field("text")
    assert np.array_equal(text.origin.frames, bases[0].field("text").origin.frames)
    data = lm.LatentDataset(view, crop=8, fields=["text", "coarse"])
    assert len(data) == 13
    for sample in data.__getitems__(range(13)):
        base = next(one for one in bases if sample.key in one)
        wanted = base.field("text")[sample.key].latent
        assert np.array_equal(text[sample.key].latent, wanted)
        assert np.array_equal(sample.fields["text"].values, wanted.T)
