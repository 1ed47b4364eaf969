"""Views while their bases, annotations or settings change, and what stores have in common."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

import latentmill as lm
from latentmill.curation.selecting import Selector
from latentmill.curation.split import _clusters
from latentmill.errors import ConfigError, StoreError
from latentmill.reader.crops import CropReader
from latentmill.reader.stems import stem_groups
from latentmill.storage.storage import Storage
from latentmill.store.bases import fault_of_base
from latentmill.store.verify import verify
from support.field_stores import NAMES, write_fields, write_tokens
from support.in_process import encode, in_process
from support.latent_store import latent_of, write_again, write_latents


def keys_of(url: str) -> list[str]:
    return list(lm.open(url).keys())


def stores(folder: Path, *metadata: list[dict[str, Any]]) -> list[str]:
    """Stores a, b, ... with a record for each metadata, and latents that tell them apart."""
    urls = []
    for number, some in enumerate(metadata):
        name = "abcd"[number]
        latents = [latent_of(10 * number + n, 6) for n in range(len(some))]
        url = str(folder / name)
        write_latents(url, [6] * len(some), latents=latents, prefix=name, metadata=some)
        urls.append(url)
    return urls


def annotate(url: str, values: dict[str, dict[str, Any]]) -> None:
    file = Path(f"{url}.jsonl")
    file.write_text("\n".join(json.dumps({"key": key, **own}) for key, own in values.items()))
    lm.annotate(url, file)


def test_a_reader_follows_a_view_whose_bases_have_other_numbers(tmp_path: Path) -> None:
    a, b = stores(tmp_path, [{"n": n} for n in range(8)], [{"n": n} for n in range(8)])
    view = lm.merge([a, b], tmp_path / "view").dest
    store = lm.open(view)
    reader, expected = CropReader(store), lm.open(a)["a/00000"].latent
    lm.merge([b, a], view, overwrite=True)
    latents = [latent_of(n, 6) for n in range(8)]
    write_again(a, [0], latents)  # removes the shard that the reader knows
    block, _ = reader.read_block(np.array([reader.row("a/00000")]), np.array([0]), 6)
    assert block[0].T.astype(np.float16).tobytes() == expected.tobytes()
    assert store["a/00000"].latent.tobytes() == expected.tobytes()
    assert store["b/00003"].metadata == {"n": 3}


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket"))
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path)


def test_a_base_that_is_sealed_twice_after_its_view_was_written(folder: str) -> None:
    """Once before the view is opened, once before its records are looked for."""
    url, latents = f"{folder}/store", [latent_of(n, 6) for n in range(16)]
    write_latents(url, [6] * 16)
    lm.select(url, f"{folder}/view", keys=["item/00001", "item/00009"])
    write_again(url, [0], latents)
    view, readable = lm.open(f"{folder}/view"), lm.open(f"{folder}/view")
    assert view.shard_sizes() == readable.shard_sizes()
    write_again(url, [1], latents)
    for key, record in zip(("item/00001", "item/00009"), view, strict=True):
        assert record.key == key
        assert record.latent.tobytes() == latents[int(key[-5:])].tobytes()
    block, _ = CropReader(readable).read_block(np.arange(2), np.zeros(2, np.int64), 6)
    assert block[1].T.astype(np.float16).tobytes() == latents[9].tobytes()


def test_a_base_whose_index_is_missing(folder: str) -> None:
    url = f"{folder}/store"
    write_latents(url, [6] * 8)
    lm.select(url, f"{folder}/view", keys=["item/00001"])
    now = write_again(url, [0], [latent_of(n, 6) for n in range(8)])
    Storage(url).delete(now.info.index)
    with pytest.raises(StoreError, match=r"index.* is missing or damaged: run the same encode"):
        len(lm.open(f"{folder}/view"))


def test_conditions_see_the_values_that_have_no_column_in_one_store(tmp_path: Path) -> None:
    mixed: list[dict[str, Any]] = [{"tag": "x"}, {"tag": 1}, {"tag": "x"}]
    urls = stores(tmp_path, mixed, [{"tag": "x"}, {"tag": "y"}], [{"other": 1.5}])
    view = lm.merge(urls, tmp_path / "view").dest
    assert keys_of(lm.select(view, tmp_path / "x", where="tag == 'x'").dest) == [
        *("a/00000", "a/00002", "b/00000")
    ]
    assert "metadata_other" in lm.open(view).table().column_names
    huge = stores(tmp_path / "huge", [{"n": 2**60}], [{"n": 0.5}])
    both = lm.merge(huge, tmp_path / "both").dest
    assert keys_of(lm.select(both, tmp_path / "large", where="n > 1").dest) == ["a/00000"]


def test_names_whose_columns_have_other_types_in_the_stores_of_a_view(tmp_path: Path) -> None:
    a, b, c = stores(tmp_path, [{"n": 0}, {"n": 1}], [{"n": 0.5}, {"m": ["x"]}], [{"bpm": "fast"}])
    annotate(a, {"a/00000": {"bpm": 120, "big": 2**60, "tag": "x", "flag": True, "m": 1}})
    annotate(b, {"b/00000": {"bpm": 120.5, "big": 0.5, "tag": ["y"], "flag": 7}})
    view = lm.open(lm.merge([b, a], tmp_path / "ab").dest)
    table, names = view.table(), ("bpm", "n", "big", "tag", "flag", "m")
    assert table["metadata_bpm"].type == table["metadata_n"].type == pa.float64()
    assert {name: table[f"metadata_{name}"].to_pylist() for name in names} == {
        "bpm": [120.0, None, 120.5, None],
        "n": [0.0, 1.0, 0.5, None],
        "big": [str(2**60), None, "0.5", None],
        "tag": ["x", None, '["y"]', None],
        "flag": ["true", None, "7", None],
        "m": ["1", None, None, '["x"]'],  # a column in one store, in the JSON of the other only
    }
    assert keys_of(lm.select(view, tmp_path / "fast", where="bpm > 120").dest) == ["b/00000"]
    every = lm.open(lm.merge([view.url, c], tmp_path / "abc").dest)
    found = every.table(["metadata_bpm", "metadata_n"]).to_pydict()
    assert found["metadata_bpm"] == ["120", None, "120.5", None, "fast"]
    assert found["metadata_n"] == [0.0, 1.0, 0.5, None, None]
    assert keys_of(lm.select(every, tmp_path / "120", where="bpm == 120").dest) == ["a/00000"]
    assert verify(view).faults == verify(every).faults == []


def test_a_base_that_is_sealed_again_while_records_are_chosen(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(8)])
    store = lm.open(a)
    selector = Selector(store)
    selector.where("n > 2")
    write_again(a, [0], [latent_of(n, 6) for n in range(8)], failed=[0])
    store.reload()
    with pytest.raises(StoreError, match="was changed while it was read"):
        selector.chosen()


STEPS: dict[str, Callable[[Selector], object]] = {
    "text": lambda selector: selector.where("number > 2"),
    "function": lambda selector: selector.where(lambda fields: fields["metadata"]["number"] > 2),
    "loudness": lambda selector: selector.min_loudness(-10),
    "duplicates": lambda selector: selector.drop_duplicates("exact"),
    "stratify": lambda selector: selector.sample(4, "number", 0),
    "stratify by role": lambda selector: selector.sample(4, "role", 0),
    "split": lambda selector: _clusters(selector, "number"),
}


@pytest.mark.parametrize("later", [8, 4])
@pytest.mark.parametrize("step", STEPS)
def test_records_are_not_chosen_by_rows_of_another_seal(
    tmp_path: Path, step: str, later: int
) -> None:
    """Of a store that was opened before it was sealed with more items, or with fewer."""
    url = str(tmp_path / "store")
    write_latents(url, [6] * 8, failed=range(12 - later, 8))
    store = lm.open(url)
    assert len(store) == 12 - later
    write_again(url, [0], [latent_of(n, 6) for n in range(8)], failed=range(later, 8))
    selector = Selector(store)
    with pytest.raises(StoreError, match="was changed while it was read"):
        STEPS[step](selector)


def test_annotations_of_a_view_stay_when_it_is_written_again(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(6)])
    view = lm.select(a, tmp_path / "view", where="n < 4").dest
    annotate(view, {"a/00001": {"mood": "calm"}, "a/00002": {"mood": "wild"}})
    lm.select(a, view, where="n < 4")
    assert lm.open(view)["a/00001"].metadata == {"n": 1, "mood": "calm"}
    annotate(a, {"a/00002": {"mood": "sad"}, "a/00003": {"key_of": "C"}})
    lm.select(a, view, where="n < 3", overwrite=True)
    found = {record.key: record.metadata for record in lm.open(view)}
    assert found == {
        "a/00000": {"n": 0},
        "a/00001": {"n": 1, "mood": "calm"},
        "a/00002": {"n": 2, "mood": "sad"},
    }
    assert verify(lm.open(view)).faults == []
    assert keys_of(lm.select(view, tmp_path / "calm", where="mood == 'calm'").dest) == ["a/00001"]


def test_a_view_that_is_written_again_has_the_metadata_of_its_bases(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(4)])
    annotate(a, {"a/00000": {"mood": "old"}})
    view = lm.select(a, tmp_path / "view").dest
    annotate(a, {"a/00001": {"mood": "more"}})
    lm.select(a, view)
    assert lm.open(view)["a/00001"].metadata == {"n": 1, "mood": "more"}
    annotate(a, {"a/00000": {"mood": "new"}})
    with pytest.raises(ConfigError, match="other metadata for some of its records: use --over"):
        lm.select(a, view)
    lm.select(a, view, overwrite=True)
    assert lm.open(view)["a/00000"].metadata == {"n": 0, "mood": "new"}


def test_a_view_that_could_not_be_opened_is_not_written(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    write_latents(f"{url}/store", [4, 5])
    assert len(lm.open(lm.select(f"{url}/store", f"{url}/view").dest)) == 2
    with pytest.raises(ConfigError, match=r"is on another server.*--copy"):
        lm.select(f"{url}/store", f"s3://{tmp_path.name}/view")
    for bad in ("a", "ftp://host/a"):
        assert fault_of_base(Storage(str(tmp_path)), bad) == "is not valid"
    web = Storage("http://127.0.0.1:1/view")
    assert fault_of_base(web, "http://127.0.0.1:1/a") is None
    assert fault_of_base(web, "http://127.0.0.1:2/a") == "is on another server"


def test_a_copy_of_a_field_is_a_field(tmp_path: Path) -> None:
    base = write_latents(str(tmp_path / "base"), [4, 5, 6])
    write_fields(base, [4, 5, 6])
    write_tokens(base, "caption", dict.fromkeys(base.keys(), np.ones((5, 2), np.float16)))
    for name in (*NAMES, "caption"):
        field = base.field(name)
        copy = lm.open(lm.select(field.url, tmp_path / name, copy=True).dest)
        assert copy.info.field == field.info.field
        assert [one.latent.tobytes() for one in copy] == [one.latent.tobytes() for one in field]
        assert verify(copy).faults == verify(field).faults
    assert verify(copy).faults == []


def test_a_copy_is_not_that_of_other_annotations(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(6)])
    copy = lm.select(a, tmp_path / "copy", copy=True).dest
    annotate(a, {"a/00002": {"mood": "sad"}})
    with pytest.raises(ConfigError, match=r"is another store.* of a store that has changed since"):
        lm.select(a, copy, copy=True)


def test_a_number_has_one_part_whatever_the_type_of_its_column(tmp_path: Path) -> None:
    whole: list[dict[str, Any]] = [{"y": n} for n in range(40)]
    first, second = stores(tmp_path, whole, [*whole, {"y": 2.5}])
    sides = []
    for url in (first, second):
        parts = lm.split(url, f"{url} split", {"t": 0.5, "v": 0.5}, by="y")
        found = {}
        for part in parts:
            assert part.store is not None
            found |= {key[-5:]: part.name for key in keys_of(part.store.dest)}
        sides.append(found)
    assert sides[1].items() > sides[0].items()


@pytest.mark.parametrize("name", ["whole", "flag", "word"])
def test_a_part_stays_when_values_of_another_type_are_annotated(tmp_path: Path, name: str) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(25)])
    values = [{"whole": n, "flag": n % 2 == 0, "word": f"w{n}"} for n in range(23)]
    annotate(a, {f"a/{n:05d}": own for n, own in enumerate(values)})
    out, shares = str(tmp_path / "split"), {"t": 0.5, "v": 0.5}
    lm.split(a, out, shares, by=name)
    before = {part: set(keys_of(f"{out}/{part}")) for part in shares}
    more = {"a/00023": {"whole": "x", "flag": 7, "word": 1.5}, "a/00024": {name: ["x"]}}
    annotate(a, more)  # the column of the metadata file is text now
    lm.split(a, out, shares, by=name, overwrite=True)
    for part, keys in before.items():
        assert set(keys_of(f"{out}/{part}")) - set(more) == keys - set(more)
    view = lm.select(a, tmp_path / "view", where="n < 23").dest  # without the other values
    lm.split(view, f"{view} split", shares, by=name)
    for part, keys in before.items():
        assert set(keys_of(f"{view} split/{part}")) == keys - set(more)


@pytest.mark.parametrize("own", [False, True])
def test_a_condition_finds_in_a_view_what_it_finds_in_the_base(tmp_path: Path, own: bool) -> None:
    """The base has numbers and a text under one name, the view has only the numbers."""
    metadata = [{"n": n, **({"fold": n} if own and n < 8 else {})} for n in range(9)]
    (a,) = stores(tmp_path, metadata)
    numbers = {} if own else {f"a/{n:05d}": {"fold": n} for n in range(8)}
    annotate(a, {**numbers, "a/00008": {"fold": "x"}})
    view = lm.select(a, tmp_path / "view", where="n < 8").dest
    for store in (a, view):
        out = lm.select(store, f"{store} five", where="fold == 5").dest
        assert keys_of(out) == ["a/00005"]


def test_a_repeated_select_goes_by_values_and_not_by_types(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(5)])
    annotate(a, {f"a/{n:05d}": {"x": n} for n in range(3)})
    view = lm.select(a, tmp_path / "view", where="n < 3").dest
    annotate(a, {"a/00004": {"x": 2.5}})  # of a record that is not in the view
    assert lm.select(a, view, where="n < 3").records == 3


def test_a_split_keeps_its_settings_and_its_folder(tmp_path: Path) -> None:
    a, b = stores(tmp_path, [{"n": n} for n in range(30)], [{"n": n} for n in range(3)])
    out = str(tmp_path / "split")
    lm.split(a, out, {"t": 0.6, "v": 0.2, "w": 0.2})
    with pytest.raises(ConfigError, match="different --into"):
        lm.split(a, out, {"t": 0.5, "v": 0.5}, overwrite=True)
    only = lm.select(a, tmp_path / "one", keys=[keys_of(f"{out}/t")[0]]).dest
    with pytest.raises(ConfigError, match="would have no records now"):
        lm.split(only, out, {"t": 0.6, "v": 0.2, "w": 0.2}, overwrite=True)
    for folder in (b, str(tmp_path)):
        before = sorted(Path(folder).iterdir())
        with pytest.raises(ConfigError, match=r"is not empty|overlap"):
            lm.split(a, folder, {"t": 1.0}, duplicates_together=True)
        assert sorted(Path(folder).iterdir()) == before


def test_the_order_of_the_shares_moves_no_record(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(40)])
    out, shares = str(tmp_path / "split"), {"train": 0.7, "valid": 0.3}
    lm.split(a, out, shares, by="key")
    train = keys_of(f"{out}/train")
    for _ in range(2):  # what the second call records, too
        parts = lm.split(a, out, dict(reversed(shares.items())), by="key", overwrite=True)
        assert keys_of(f"{out}/train") == train
        assert {part.name: part.wanted for part in parts} == shares


def test_stems_and_segments_of_a_recording_stay_together(tmp_path: Path) -> None:
    """Numbers as groups; segments without a group."""
    random, rows, cuts = np.random.default_rng(0), ["path,group,role"], ["path,start,duration"]
    for song in range(8):
        for role in (1, 2):
            name = f"{song}-{role}.wav"
            soundfile.write(tmp_path / name, random.uniform(-0.3, 0.3, 8000), 22050)
            rows.append(f"{name},{song},{role}")
        cuts += [f"{name},{start},0.1" for start in (0, 0.1, 0.2)]
    options = {"model": "mdct", "model_options": {"hop": 64, "sample_rate": 22050}}
    shares = {"t": 0.5, "v": 0.5}
    for kind, lines in (("stems", rows), ("cuts", cuts)):
        (tmp_path / f"{kind}.csv").write_text("\n".join(lines))
        with in_process():
            encode(tmp_path / f"{kind}.csv", tmp_path / kind, **options)
    for record in lm.open(tmp_path / "stems"):
        assert f"{record.group}-{record.role}" == record.key
    for kind, by in (("stems", None), ("cuts", "content_hash")):
        lm.split(tmp_path / kind, tmp_path / f"{kind} split", shares, by=by)
        parts = [keys_of(str(tmp_path / f"{kind} split" / name)) for name in shares]
        assert sum(map(len, parts)) == {"stems": 16, "cuts": 24}[kind] and all(parts)
        songs = [{key[0] for key in part} for part in parts]
        assert not songs[0] & songs[1]
    for by in ("group", "role"):
        with pytest.raises(ConfigError, match=f"by uses '{by}', but no record of .* has a value"):
            lm.split(tmp_path / "cuts", tmp_path / "other", shares, by=by)


def test_a_name_that_no_record_of_a_view_has_is_refused(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n, **({"fold": n} if n else {})} for n in range(4)])
    view = lm.select(a, tmp_path / "view", where="n == 0").dest  # has the column
    with pytest.raises(ConfigError, match=r"by uses 'fold', but no record of .* has such a field"):
        lm.split(view, tmp_path / "split", {"t": 1.0}, by="fold")


def test_a_prefix_keeps_groups_apart(tmp_path: Path) -> None:
    a, b = stores(tmp_path, [{"n": n} for n in range(4)], [{"n": n} for n in range(4)])
    view = lm.merge([a, b], tmp_path / "view", prefix=True).dest
    copy = lm.merge([a, b], tmp_path / "copy", prefix=True, copy=True).dest
    for url in (view, copy):
        groups = {record.key: record.group for record in lm.open(url)}
        assert groups == {f"{s}/{s}/0000{n}": f"{s}/group 0" for s in "ab" for n in range(4)}
        songs = {song.name: len(song.rows) for song in stem_groups(lm.open(url))}
        assert songs == {"a/group 0": 4, "b/group 0": 4}
        assert set(lm.open(url).table(["group"])["group"].to_pylist()) == set(groups.values())
    again = lm.merge([view], tmp_path / "again", prefix=True).dest
    assert lm.open(again)["view/a/a/00000"].group == "view/a/group 0"


def test_a_base_without_records_is_not_needed(tmp_path: Path) -> None:
    a, b = stores(tmp_path, [{"n": n} for n in range(4)], [{"n": n + 10} for n in range(4)])
    both = lm.merge([a, b], tmp_path / "both").dest
    view = lm.open(lm.select(both, tmp_path / "view", where="n >= 10").dest)
    assert [entry.url for entry in view.info.bases] == [b]
    assert [record.metadata["n"] for record in view] == [10, 11, 12, 13]


def test_an_output_inside_a_store_through_a_link(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(4)])
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(ConfigError, match="overlap"):
        lm.select(a, tmp_path / "link" / "view")


def test_settings_without_effect(tmp_path: Path) -> None:
    (a,) = stores(tmp_path, [{"n": n} for n in range(4)])
    with pytest.raises(ConfigError, match="overwrite replaces views only"):
        lm.select(a, tmp_path / "out", copy=True, overwrite=True)
    with pytest.raises(ConfigError, match="seed has no effect"):
        lm.select(a, tmp_path / "out", seed=1)
