"""select, merge and split: against a dict, when bases change, and with hostile views."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import latentmill as lm
from latentmill.curation import view_metadata
from latentmill.curation.split import _assigned
from latentmill.curation.views import Curated, refuse_repeated
from latentmill.errors import ConfigError, LatentmillError, StoreError
from latentmill.storage.storage import Storage
from latentmill.store.left_out import read_left_out
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.latent_store import latent_of, write_again, write_latents

GENRES = ("jazz", "rock", "folk")
Model = dict[str, tuple[bytes, Any]]  # latent and metadata by key


def facts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"number": first + n, "genre": GENRES[n % 3]} for n in range(count)]


def keys_of(store: LatentStore) -> list[str]:
    return list(store.keys())


def model_of(store: LatentStore) -> Model:
    return {record.key: (record.latent.tobytes(), record.metadata) for record in store}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two stores with different latents; leave them unchanged."""
    folder = tmp_path_factory.mktemp("bases")
    latents = [latent_of(n + 100, 5 + n % 4) + n for n in range(11)]
    write_latents(f"{folder}/one", [4 + n % 5 for n in range(20)], metadata=facts(20))
    lengths = [latent.shape[1] for latent in latents]
    write_latents(
        f"{folder}/two", lengths, latents=latents, prefix="other", metadata=facts(11, 100)
    )
    return f"{folder}/one", f"{folder}/two"


steps = st.lists(
    st.tuples(
        st.sampled_from(["where", "keys", "sample", "merge", "prefix", "split", "annotate"]),
        st.integers(0, 10**6),
        st.booleans(),  # a copy
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None)
@given(steps=steps)
def test_any_sequence_gives_the_same_as_a_dict(
    bases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("sequence")
    current, model = bases[0], model_of(lm.open(bases[0]))
    known = set(model)  # the records of the bases
    for number, (kind, draw, copy) in enumerate(steps):
        out, random = str(folder / str(number)), np.random.default_rng(draw)
        if kind == "split":
            current, model = divided(current, model, out, draw)
            continue
        if kind == "annotate" and current not in bases:
            some = {key: {"mood": draw % 7, "number": draw % 130} for key in list(model)[::2]}
            lines = [json.dumps({"key": key, **values}) for key, values in some.items()]
            Path(f"{out}.jsonl").write_text("\n".join(lines))
            lm.annotate(current, f"{out}.jsonl")
            model |= {key: (model[key][0], model[key][1] | some[key]) for key in some}
            assert model_of(lm.open(current)) == model
            assert verify(lm.open(current)).faults == []
            continue
        made: Callable[[], Curated]
        kept: Model | None = model
        size = int(random.integers(1, len(model) + 1))
        if kind == "where":
            limit = int(random.integers(0, 130))
            kept = {key: one for key, one in model.items() if one[1]["number"] > limit}
            made = partial(lm.select, current, out, where=f"number > {limit}", copy=copy)
        elif kind == "keys":
            kept = {key: one for key, one in model.items() if random.random() < 0.7}
            made = partial(lm.select, current, out, keys=sorted(kept), copy=copy)
        elif kind == "sample":
            kept = None
            made = partial(lm.select, current, out, sample=size, stratify="genre", copy=copy)
        elif kind == "merge" and not any(key.startswith("other/") for key in model):
            kept = model | model_of(lm.open(bases[1]))
            known |= set(kept)
            made = partial(lm.merge, [current, bases[1]], out, copy=copy)
        else:
            name = current.rpartition("/")[2]
            kept = {f"{name}/{key}": one for key, one in model.items()}
            known = {f"{name}/{key}" for key in known}
            made = partial(lm.merge, [current], out, prefix=True, copy=copy)
        if kept == {}:
            with pytest.raises(ConfigError):
                made()
            continue
        result, store = made(), lm.open(out)
        if kept is None:
            kept = {key: model[key] for key in keys_of(store)}
            assert len(kept) == size
        before = len(model) if kind in ("where", "keys", "sample") else len(kept)
        assert result.records == len(kept) == len(store) == store.info.encoded
        assert store.info.items == len(kept) + sum(result.left_out.values())
        assert store.info.items == (before if copy else len(known))
        assert (store.bases is None) == copy
        if copy:
            known = set(kept)
        else:
            assert sorted(read_left_out(store)["key"].to_pylist()) == sorted(known - kept.keys())
        assert verify(store).faults == []
        current, model = out, kept
        assert model_of(store) == model
    store = lm.open(current)
    for key, (_, metadata) in model.items():
        assert store.without_latent(key).metadata == metadata
        assert store.crop(key, 1, 2).tobytes() == store[key].latent[:, 1:3].tobytes()


def divided(url: str, model: Model, out: str, seed: int) -> tuple[str, Model]:
    """Split a store; return the first part, which has no groups in common with the other."""
    parts = lm.split(url, out, {"a": 0.6, "b": 0.4}, seed=seed)
    models = [(one.store.dest, model_of(lm.open(one.store.dest))) for one in parts if one.store]
    assert sum(len(found) for _, found in models) == len(model)
    assert {key: one for _, found in models for key, one in found.items()} == model
    groups = [{record.group for record in lm.open(place)} for place, _ in models]
    assert len(groups) == 1 or not groups[0] & groups[1]
    return models[0]


def test_the_metadata_of_many_row_groups(
    bases: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views have neighbouring keys, and other numbers of records."""
    monkeypatch.setattr(view_metadata, "ROW_GROUP", 3)
    names = list(model_of(lm.open(bases[0])))
    for name, part in (("a", names[1::3]), ("b", names[:1]), ("c", names[2::3] + names[3::3])):
        lm.select(bases[0], tmp_path / name, keys=part)
    for prefix in (False, True):
        out = tmp_path / f"all-{prefix}"
        lm.merge([tmp_path / "c", tmp_path / "b", tmp_path / "a"], out, prefix=prefix)
        store = lm.open(out)
        assert verify(store).faults == []
        table = store.table(["key", "frames", "metadata_number"]).to_pylist()
        wanted = [(one.key, one.frames, one.metadata["number"]) for one in store]
        assert [tuple(row.values()) for row in table] == wanted
        assert len(wanted) == len(names)
        assert sorted(key[-10:] for key, _, _ in wanted) == names
    file = pq.ParquetFile(out / str(store.info.metadata))
    assert file.num_row_groups == 7


def test_what_is_left_out_is_listed(bases: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "view")
    made = lm.select(bases[0], out, where="genre == 'jazz'", sample=2)
    store = lm.open(out)
    assert made.left_out == {"where: not genre == 'jazz'": 13, "not in the sample": 5}
    assert (store.info.items, store.info.encoded, store.info.skipped) == (20, 2, 18)
    assert store.info.left_out_file is not None
    rows = pq.read_table(Path(out, store.info.left_out_file)).to_pylist()
    assert {row["key"] for row in rows} | set(keys_of(store)) == set(keys_of(lm.open(bases[0])))
    jazz = {f"item/{n:05d}" for n in range(0, 20, 3)}
    assert {r["key"] for r in rows if r["reason"].startswith("where")}.isdisjoint(jazz)


def test_all_parts_are_normalised_with_all_latents_of_the_bases(
    bases: tuple[str, str], tmp_path: Path
) -> None:
    every = [record.latent.astype(np.float64) for url in bases for record in lm.open(url)]
    frames = np.concatenate(every, axis=1)
    for url in bases:
        lm.split(url, tmp_path / url[-3:], {"train": 0.7, "valid": 0.3})
    found = []
    for part in ("train", "valid"):
        parts = [tmp_path / url[-3:] / part for url in bases]
        found.append(lm.open(lm.merge(parts, tmp_path / part).dest))
        found.append(lm.open(lm.merge(parts[::-1], tmp_path / f"{part} 2").dest))
        again = [parts[0], tmp_path / f"{part} 2"]  # the first base is in both
        found.append(lm.open(lm.merge(again, tmp_path / f"{part} 3", prefix=True).dest))
    for store in found:
        np.testing.assert_allclose(store.mean, frames.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(store.std, frames.std(axis=1), rtol=1e-12)
    assert found[0].info.mean == found[3].info.mean
    assert found[0].info.std == found[3].info.std


def test_a_part_without_records_of_a_base_is_normalised_as_the_others(
    bases: tuple[str, str], tmp_path: Path
) -> None:
    whole = lm.open(lm.merge(bases, tmp_path / "all", prefix=True).dest)
    assert whole.bases is not None
    keys = list(whole.keys())[:10]  # all of one base
    part = lm.select(whole, tmp_path / "part", keys=keys).dest
    again = lm.open(lm.select(part, tmp_path / "again", sample=3).dest)
    assert again.bases is not None
    assert (len(whole.bases.entries), len(again.bases.entries)) == (2, 1)
    assert lm.open(part).info.mean == again.info.mean == whole.info.mean
    assert lm.open(part).info.std == again.info.std == whole.info.std


def test_training_on_a_view_reads_the_records_of_the_view(
    bases: tuple[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "view")
    lm.merge(list(bases), out)
    lm.select(out, f"{out}2", where="genre != 'folk'")
    view = pickle.loads(pickle.dumps(lm.open(f"{out}2")))
    assert view.bases is not None and [e.url for e in view.bases.entries] == list(bases)
    wanted = model_of(view)
    dataset = lm.LatentDataset(view, where="number < 200")
    loader = torch.utils.data.DataLoader(dataset, 1, num_workers=2, collate_fn=lm.collate)
    seen = {batch["key"][0]: batch for batch in loader}
    assert seen.keys() == wanted.keys()
    for key, (latent, metadata) in wanted.items():
        read = np.ascontiguousarray(seen[key]["latents"][0].numpy().astype(np.float16))
        assert read.tobytes() == latent
        assert seen[key]["metadata"][0]["number"] == metadata["number"]
    stream = lm.LatentStream(view, crop=3, batch_size=4)
    assert sorted(sample.key for sample in stream) == sorted(wanted)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """5 and 8 have the latent of 2, and 7 the file of 1; 9 is almost 3; 11 is unlike the others."""
    random = np.random.default_rng(0)
    shape = np.linspace(1, 3, 16)[:, None]
    latents = [(random.normal(size=(16, 200)) * shape).astype(np.float16) for _ in range(12)]
    latents[5] = latents[8] = latents[2]
    latents[9] = (latents[3] + random.normal(size=(16, 200)) * 0.01).astype(np.float16)
    latents[11] = (random.normal(size=(16, 200)) * shape[::-1] * 9).astype(np.float16)
    hashes = [f"xxh3:{n}" for n in range(12)]
    hashes[7] = hashes[1]
    url = str(tmp_path_factory.mktemp("repeated") / "store")
    rms = [0.1 + n / 100 for n in range(12)]
    options: dict[str, Any] = {"content_hashes": hashes, "rms": rms}
    write_latents(url, [200] * 12, latents=latents, channels=16, **options)
    return url


@pytest.mark.parametrize(("kind", "repeats"), [("exact", {5, 7, 8}), ("near", {5, 7, 8, 9})])
def test_duplicates_are_left_out(
    repeated: str, tmp_path: Path, kind: Any, repeats: set[int]
) -> None:
    made = lm.select(repeated, tmp_path / "view", drop_duplicates=kind)
    store = lm.open(made.dest)
    assert {int(key[-5:]) for key in keys_of(store)} == set(range(12)) - repeats
    assert store.info.left_out_file is not None
    rows = pq.read_table(Path(made.dest, store.info.left_out_file)).to_pylist()
    kept = {int(row["key"][-5:]): int(row["detail"][-5:]) for row in rows}
    assert kept == {n: {5: 2, 7: 1, 8: 2, 9: 3}[n] for n in repeats}


def test_outliers_are_left_out(repeated: str, tmp_path: Path) -> None:
    made = lm.select(repeated, tmp_path / "view", drop_outliers=True)
    assert made.left_out == {"outlier": 1}
    assert "item/00011" not in lm.open(made.dest)


def test_a_split_stays_when_records_are_added(tmp_path: Path) -> None:
    shares = {"train": 0.8, "valid": 0.1, "test": 0.05}
    sides: list[dict[str, str]] = []
    for count in (600, 900):
        url, out = str(tmp_path / f"store {count}"), str(tmp_path / f"split {count}")
        write_latents(url, [2] * count, per_unit=300)
        parts = lm.split(url, out, shares, by="number", seed=3)
        found = {
            key: part.name
            for part in parts
            if part.store
            for key in keys_of(lm.open(part.store.dest))
        }
        sides.append(found)
        for part in parts:  # within four standard deviations of a binomial distribution
            assert abs(part.share - part.wanted) < 4 * (part.wanted / count) ** 0.5
        assert abs(len(found) / count - 0.95) < 4 * (0.05 / count) ** 0.5
    assert {key: side for key, side in sides[1].items() if int(key[-5:]) < 600} == sides[0]
    other = lm.split(url, f"{out} b", shares, by="number", seed=4)
    assert other[0].store is not None
    assert set(keys_of(lm.open(other[0].store.dest))) != {
        k for k, v in found.items() if v == "train"
    }


def test_near_duplicates_stay_together(tmp_path: Path) -> None:
    random, count = np.random.default_rng(1), 40
    latents = [random.normal(size=(16, 100)).astype(np.float16) for _ in range(count + 3)]
    for n in range(0, 20, 2):
        latents[n + 1] = (latents[n] + random.normal(size=(16, 100)) * 0.01).astype(np.float16)
    shares = {"a": 0.5, "b": 0.5}

    def split(size: int) -> dict[int, str]:
        url = str(tmp_path / f"store{size}")
        hashes = [f"xxh3:{n}" for n in range(size)]
        write_latents(url, [100] * size, latents=latents[:size], channels=16, content_hashes=hashes)
        options = {"by": "key", "duplicates_together": True, "overwrite": True}
        parts = lm.split(url, tmp_path / "split", shares, **options)
        stores = [(part.name, lm.open(part.store.dest)) for part in parts if part.store]
        return {int(key[-5:]): name for name, store in stores for key in keys_of(store)}

    first = split(count)
    assert len(first) == count
    assert all(first[n] == first[n + 1] for n in range(0, 20, 2))
    alone = lm.split(tmp_path / f"store{count}", tmp_path / "alone", shares, by="key")
    assert alone[0].store is not None
    keys = {int(key[-5:]) for key in keys_of(lm.open(alone[0].store.dest))}
    assert {n for n, side in first.items() if side == "a"} != keys  # some were moved
    one = next(n for n in range(20, count) if first[n] == "a")
    latents[count + 1] = (latents[one] + random.normal(size=(16, 100)) * 0.01).astype(np.float16)
    second = split(count + 2)
    assert {n: side for n, side in second.items() if n < count} == first
    assert second[count + 1] == first[one]


def test_a_record_that_would_connect_two_parts_is_left_out() -> None:
    own: dict[str, str | None] = {"x": "a", "y": "b", "new": "a", "free": "b", "more": "b"}
    known: dict[str, str | None] = {"x": "a", "y": "b", "old": "a"}
    found, conflicts = _assigned(own, [{"x", "new", "y"}, {"free", "more"}], known)
    assert found == {"x": "a", "y": "b", "free": "b", "more": "b"}
    assert conflicts == {"new": "a and b"}
    found, conflicts = _assigned(own, [{"y", "new", "more"}], known)
    assert (found["new"], found["more"], conflicts) == ("b", "b", {})


def test_a_base_that_changes(tmp_path: Path) -> None:
    url, out = str(tmp_path / "store"), str(tmp_path / "view")
    lengths = [4 + n % 5 for n in range(20)]
    latents = [latent_of(n, length) for n, length in enumerate(lengths)]
    write_latents(url, lengths, latents=latents)
    lm.select(url, out, where="number < 12")
    opened, model = lm.open(out), model_of(lm.open(out))
    dataset = lm.LatentDataset(lm.open(out))
    write_again(url, [0, 1, 2], latents)  # equal latents in other shards; the old ones are removed
    for store in (opened, lm.open(out)):
        assert model_of(store) == model
        assert verify(store).faults == []
    assert {sample.key for sample in (dataset[n] for n in range(12))} == set(model)
    latents[15] = latents[15] + 1
    write_again(url, [1], latents)  # not in the view
    assert model_of(lm.open(out)) == model
    latents[3] = latents[3] + 1
    write_again(url, [0], latents)
    expected = rf"{url}, a base store .* 1 of its records, such as item/00003"
    with pytest.raises(StoreError, match=expected):
        len(lm.open(out))
    assert "item/00003" in verify(lm.open(out)).faults[0]
    write_again(url, [0], latents, failed=[3])
    with pytest.raises(StoreError, match="no longer has the latents of 1 of its records"):
        model_of(lm.open(out))
    shutil.rmtree(url)
    with pytest.raises(StoreError, match=rf"{url}, a base store of the view {out}, is missing"):
        lm.open(out)


def edited(view: str, out: Path, **changes: Any) -> str:
    shutil.copytree(view, out)
    document = json.loads((out / DATASET_PATH).read_text())
    for name, value in changes.items():
        document[name] = value
    (out / DATASET_PATH).write_text(json.dumps(document))
    return str(out)


def test_hostile_views(
    bases: tuple[str, str], tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    view = lm.select(bases[0], tmp_path / "view", sample=5).dest
    info = lm.open(view).info.model_dump(mode="json")
    (base,) = info["bases"]

    def refused(name: str, expected: str, **changes: Any) -> None:
        with pytest.raises(LatentmillError, match=expected) as caught:
            store = lm.open(edited(view, tmp_path / name, **changes))
            list(store)
        one_sentence(caught.value)

    refused("itself", "is a view", bases=[base | {"url": str(tmp_path / "itself")}])
    refused("nowhere", "is missing", bases=[base | {"url": "/nowhere/store"}])
    refused("other", "other settings", bases=[base | {"fingerprint": "0"}])
    refused("plain", "damaged", bases=[])
    refused("version", "damaged", format_version=2)
    refused("future", "version 4, but .* reads 1 to 3", format_version=4)
    refused("outside", "damaged", index="../view/index.arrow")
    refused("none", "damaged", index="index.00.arrow")
    refused("number", "settings", bases=[base | {"url": bases[1], "fingerprint": "x"}])
    for number, url in enumerate(["a", "", "\0", "data://a", "reference://a", "jupyter://a"]):
        refused(f"url{number}", "invalid base store", bases=[base | {"url": url}])
    refused("file", "outside", origin="../../etc/passwd")


def test_a_view_in_a_bucket_does_not_read_this_machine(
    bases: tuple[str, str], s3_bucket: str
) -> None:
    with pytest.raises(ConfigError, match=r"is a local path, so a view in .* could not be read"):
        lm.select(bases[0], f"{s3_bucket}/view", sample=5)
    write_latents(f"{s3_bucket}/store", [6] * 9)
    view = lm.select(f"{s3_bucket}/store", f"{s3_bucket}/view", sample=5).dest
    storage = Storage(view)
    document = json.loads(storage.read(DATASET_PATH))
    for url, expected in ((bases[0], "is a local path"), ("http://10.0.0.1/a", "another server")):
        document["bases"][0]["url"] = url
        storage.write(DATASET_PATH, json.dumps(document).encode())
        with pytest.raises(StoreError, match=expected):
            lm.open(view)


def test_bases_on_disk_and_in_a_bucket(
    bases: tuple[str, str], tmp_path: Path, s3_bucket: str
) -> None:
    write_latents(f"{s3_bucket}/three", [6] * 9, prefix="three", per_unit=4)
    stores = [bases[0], f"{s3_bucket}/three"]
    wanted = model_of(lm.open(stores[0])) | model_of(lm.open(stores[1]))
    for out in (str(tmp_path / "view"), str(tmp_path / "copy")):
        lm.merge(stores, out, copy=out.endswith("copy"))
        assert model_of(lm.open(out)) == wanted
        assert verify(lm.open(out)).faults == []
        found = {sample.key for sample in lm.LatentStream(out, crop=2)}
        assert found == set(wanted)
    lm.merge([f"{s3_bucket}/three"], f"{s3_bucket}/view")
    assert model_of(lm.open(f"{s3_bucket}/view")) == model_of(lm.open(stores[1]))


def test_tars_and_parquet(bases: tuple[str, str], tmp_path: Path) -> None:
    tar = str(tmp_path / "tar")
    write_latents(tar, [5] * 9, format_name="webdataset", prefix="tar")
    view = lm.select(tar, tmp_path / "view", sample=4).dest
    assert len(model_of(lm.open(view))) == 4
    assert {s.key for s in lm.LatentStream(view, crop=2)} == set(keys_of(lm.open(view)))
    with pytest.raises(ConfigError, match="different shard formats"):
        lm.merge([tar, bases[0]], tmp_path / "both")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda s, o: lm.select(s, o, where="number > 1000"), "No record of"),
        (lambda s, o: lm.select(s, o, where="nummer > 1"), "did you mean number"),
        (lambda s, o: lm.select(s, o, keys=["item/1"]), "no records with 1 of the 1 keys"),
        (lambda s, o: lm.select(s, o, sample=-1), "sample is -1"),
        (lambda s, o: lm.select(s, o, stratify="genre"), "has no effect"),
        (
            lambda s, o: lm.select(s, o, sample=3, stratify="gender"),
            "no record .* has such",
        ),
        (lambda s, o: lm.select(s, o, min_loudness=0.0), "No records match"),
        (lambda s, o: lm.select(s, o, keys=[]), "No records match"),
        (lambda s, o: lm.select(s, o, keys=[], copy=True), "No records match"),
        (lambda s, o: lm.select(s, s), "overlap"),
        (lambda s, o: lm.select(s, f"{s}/inside"), "overlap"),
        (lambda s, o: lm.select(s, o, min_loudness=7000), "No records match"),
        (lambda s, o: lm.merge([s, s], o), "20 keys are in more than one store"),
        (lambda s, o: lm.merge([s, s], o, copy=True), "20 keys are in more than one store"),
        (lambda s, o: lm.merge([s, s], o, prefix=True), "Two stores have the folder name 'one'"),
        (lambda s, o: lm.merge([], o), "needs at least one store"),
        (lambda s, o: lm.split(s, o, {"a": 0.7, "b": 0.7}), "add up to 1.4"),
        (lambda s, o: lm.split(s, o, {"../a": 0.7}), "invalid part"),
        (lambda s, o: lm.split(s, o, {"a": float("nan")}), "invalid part"),
        (lambda s, o: lm.split(s, o, {}), "add up to 0"),
    ],
)
def test_bad_input(
    bases: tuple[str, str],
    tmp_path: Path,
    call: Callable[[str, str], Any],
    expected: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        call(bases[0], str(tmp_path / "out"))
    one_sentence(caught.value)
    assert not (tmp_path / "out").exists()


def test_only_views_are_replaced(bases: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.select(bases[0], out, sample=5)
    reader = lm.open(out)
    model = model_of(reader)
    lm.select(bases[0], out, sample=5)  # the same, which may follow a call that was killed
    with pytest.raises(ConfigError, match="is a view already"):
        lm.select(bases[0], out, sample=5, seed=1)
    with pytest.raises(ConfigError, match=r"is another store|is not empty"):
        lm.select(bases[0], out, sample=5, copy=True)
    lm.select(bases[0], out, sample=5, seed=1, overwrite=True)
    assert model_of(reader) == model  # read before it was replaced
    assert model_of(lm.open(out)) != model
    assert len(list(out.glob("index.*"))) == len(list(out.glob("metadata.*"))) == 1
    for store in (bases[0], str(tmp_path / "copy")):
        lm.select(bases[0], tmp_path / "copy", sample=5, copy=True)
        with pytest.raises(ConfigError, match=r"not empty|overlap"):
            lm.select(bases[1], store, sample=5, overwrite=True)


WRITERS: dict[str, Callable[[str, str], object]] = {
    "select": lm.select,
    "copy": lambda store, out: lm.select(store, out, copy=True),
    "merge": lambda store, out: lm.merge([store], out),
    "split": lambda store, out: lm.split(store, out, {"train": 1.0}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("name", ["a.wav", "tmp/a.wav", "tmp/letters/a.txt"])
def test_a_folder_with_other_files_is_left_alone(
    bases: tuple[str, str], tmp_path: Path, name: str, write: Callable[[str, str], object]
) -> None:
    home = tmp_path / "home"
    (home / name).parent.mkdir(parents=True)
    (home / name).write_text("mine")
    before = sorted(home.rglob("*"))
    with pytest.raises(ConfigError, match="is not empty"):
        write(bases[0], str(home))
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_what_a_killed_call_left_is_no_other_file(
    bases: tuple[str, str], tmp_path: Path, write: Callable[[str, str], object]
) -> None:
    out = tmp_path / "home"
    (out / "tmp").mkdir(parents=True)
    (out / "tmp" / f"{'0f' * 16}.index.arrow").write_bytes(b"half")
    (out / ".lock").touch()
    write(bases[0], str(out))
    assert not (out / "tmp").exists()


def replaced(out: Path, name: str, data: bytes) -> dict[str, str]:
    """Write a file under the name that its contents have, and return the entries for it."""
    digest = xxhash.xxh3_128_hexdigest(data)
    path = f"{name}.{digest[:16]}.parquet"
    (out / path).write_bytes(data)
    return (
        {"metadata": path, "metadata_hash": digest}
        if name == "metadata"
        else {"left_out_file": path}
    )


def test_files_of_a_view_that_no_call_writes(bases: tuple[str, str], tmp_path: Path) -> None:
    view = lm.select(bases[0], tmp_path / "view", sample=5).dest
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"other": [1] * 5}), sink)
    without_key = sink.getvalue().to_pybytes()
    for number, data in enumerate((without_key, b"PAR1")):
        for name in ("metadata", "left_out"):
            changes = replaced(Path(view), name, data)
            (fault,) = verify(lm.open(edited(view, tmp_path / f"{name}{number}", **changes))).faults
            assert f"/{name}." in fault
    for number, origin in enumerate((np.float32(1), np.zeros(4, np.float32))):
        out = edited(view, tmp_path / f"origin{number}")
        np.save(f"{out}/origin.npy", origin)
        (fault,) = verify(lm.open(out)).faults
        assert "origin.npy is damaged: restore it" in fault


def test_a_store_without_records_has_no_repeated_keys() -> None:
    """`select --copy` copies it."""
    refuse_repeated(pa.chunked_array([], pa.string()))
