"""Annotations: metadata that is added to a sealed store from a file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import latentmill as lm
from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError, LatentmillError, SourceError, StoreError
from latentmill.export.export import Target, export_store
from latentmill.reader.fields import FieldReader, select
from latentmill.storage.storage import Storage
from latentmill.store.annotations import annotation_path
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore
from latentmill.store.tidy import tidy
from latentmill.store.verify import verify
from latentmill.view.catalog import Catalog
from support.in_process import in_process
from support.latent_store import write_again, write_latents
from support.runs import call, write_songs

ROWS = [
    {"key": "item/00001", "bpm": 120, "genre": "rock", "live": True, "tags": ["a", "b"]},
    {"key": "item/00003", "bpm": 90.5, "genre": None, "live": None, "tags": None},
    {"key": "item/00002", "bpm": None, "genre": "été", "live": False, "tags": ["c"]},
    {"key": "elsewhere", "bpm": 1, "genre": "x", "live": True, "tags": []},
]
# What the store then has, by key; a CSV has neither booleans nor lists.
ANNOTATED = {
    "item/00001": {"bpm": 120.0, "genre": "rock", "live": True, "tags": ["a", "b"]},
    "item/00002": {"genre": "été", "live": False, "tags": ["c"]},
    "item/00003": {"bpm": 90.5},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a table in the format of the file's extension."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" * (path.suffix == ".tsv") or ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def store_of(folder: Path, count: int = 5, **options: Any) -> LatentStore:
    return write_latents(str(folder), [3] * count, per_unit=2, **options)


def metadata_of(store: LatentStore | str) -> dict[str, Mapping[str, Any]]:
    """The metadata of all records, after checking that every way to read it gives the same."""
    opened = LatentStore(store.url if isinstance(store, LatentStore) else store, device="cpu")
    found = {record.key: dict(record.metadata) for record in opened}
    assert {key: dict(opened[key].metadata) for key in found} == found
    assert {key: dict(opened.without_latent(key).metadata) for key in found} == found
    reader = FieldReader(opened, ["metadata", "key"])
    rows = reader.read(np.arange(len(opened)))
    assert {row["key"]: json.loads(row["metadata"]) for row in rows} == found
    for table in (reader.gather(), FieldReader(opened, ["metadata", "key", "levels"]).gather()):
        assert {r["key"]: json.loads(r["metadata"]) for r in table.to_pylist()} == found
    samples = lm.LatentDataset(opened)
    own = [{n: v for n, v in s.metadata.items() if n[:8] != "seconds_"} for s in samples]
    assert {s.key: values for s, values in zip(samples, own, strict=True)} == found
    return found


@pytest.mark.parametrize(
    ("extension", "format_name"),
    [("csv", "parquet"), ("tsv", "webdataset"), ("jsonl", "webdataset"), ("parquet", "parquet")],
)
def test_annotated_values_are_seen_everywhere(
    tmp_path: Path, extension: str, format_name: str
) -> None:
    store = store_of(tmp_path / "s", format_name=format_name)
    before = (tmp_path / "s" / DATASET_PATH).read_bytes()
    assert b"annotation" not in before
    text = extension in ("csv", "tsv")
    rows = [
        {n: v for n, v in row.items() if not text or n in ("key", "bpm", "genre")} for row in ROWS
    ]
    summary = lm.annotate(store, write_rows(tmp_path / f"f.{extension}", rows))
    names = ["bpm", "genre"] if text else ["bpm", "genre", "live", "tags"]
    assert (summary.version, summary.changed, summary.records) == (1, True, 3)
    assert b'"format_version": 2' in before
    assert lm.open(store.url).info.format_version == 3  # refused by versions without annotations
    assert list(summary.names) == names
    assert (summary.matched, summary.unknown, summary.unknown_keys) == (3, 1, ("elsewhere",))
    expected = {
        key: {"number": number} | {n: v for n, v in ANNOTATED.get(key, {}).items() if n in names}
        for number, key in enumerate(store.keys())
    }
    assert metadata_of(store) == expected
    found = LatentStore(store.url)
    assert found.info.model_copy(update={"annotation": None}).seal == store.info.seal
    assert select([found], "bpm > 100")[0].tolist() == [1]
    assert select([found], "genre == 'été'")[0].tolist() == [2]
    assert select([found], lambda r: r["metadata"].get("bpm") == 90.5)[0].tolist() == [3]
    assert found.info.metadata is not None
    table = pq.read_table(tmp_path / "s" / found.info.metadata)
    assert table["metadata_bpm"].to_pylist() == [None, 120, None, 90.5, None]
    assert table["metadata_genre"].to_pylist() == [None, "rock", "été", None, None]
    if not text:
        assert table["metadata_live"].to_pylist() == [None, True, False, None, None]
        assert table["metadata_tags"].to_pylist() == [None, '["a", "b"]', '["c"]', None, None]
    assert {f"metadata_{name}" for name in names} <= set(Catalog(found).fields)
    assert verify(found).faults == []
    assert found.complete
    # Version 2 is without annotations, and version 3 has them again.
    assert lm.revert_annotations(store.url).version == 2
    assert metadata_of(store) == {k: {"number": n} for n, k in enumerate(store.keys())}
    assert lm.revert_annotations(store).version == 3
    assert metadata_of(store) == expected
    assert [path.name for path in sorted((tmp_path / "s/annotations").iterdir())] == [
        "0001.parquet",
        "0002.parquet",
        "0003.parquet",
    ]
    assert verify(LatentStore(store.url)).faults == []


KINDS: list[tuple[list[Any], str, list[Any], list[Any]]] = [
    # values of a JSONL file; type of the column; its values; the values in the metadata
    ([1, None, 3], "int64", [1, None, 3], [1, None, 3]),
    ([1, 2.5], "double", [1.0, 2.5], [1, 2.5]),
    ([2**62, 1], "int64", [2**62, 1], [2**62, 1]),
    ([2**62, 1.5], "string", [str(2**62), "1.5"], [2**62, 1.5]),
    ([2**70], "string", [str(2**70)], [2**70]),
    ([True, False], "bool", [True, False], [True, False]),
    ([True, 1], "string", ["true", "1"], [True, 1]),
    (["a", 1], "string", ["a", "1"], ["a", 1]),
    ([{"x": [1]}], "string", ['{"x": [1]}'], [{"x": [1]}]),
    (["\ud800", "a"], "string", ['"\\ud800"', "a"], ["\ud800", "a"]),
    (["", "a"], "string", ["", "a"], ["", "a"]),
]


@pytest.mark.parametrize(("values", "type_", "column", "own"), KINDS)
def test_the_types_of_annotated_values(
    tmp_path: Path, values: list[Any], type_: str, column: list[Any], own: list[Any]
) -> None:
    """Each annotated name has a column, and the records have the exact values."""
    store = store_of(tmp_path / "s", len(values), metadata=[{"name": 1, "s": "x"}] * len(values))
    keys = list(store.keys())
    rows = [{"id": key, "v": value} for key, value in zip(keys, values, strict=True)]
    lm.annotate(store, write_rows(tmp_path / "f.jsonl", rows))
    assert store.info.metadata is not None
    table = pq.read_table(tmp_path / "s" / store.info.metadata)
    assert str(table["metadata_v"].type) == type_
    assert table["metadata_v"].to_pylist() == column
    assert [store[key].metadata.get("v") for key in keys] == own
    assert verify(store).faults == []


def test_cells_of_a_csv_column_have_one_type(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    text = "key,n,code\nitem/00000,1,007\nitem/00001,2.5e1,12\nitem/00002,,1e999\n"
    (tmp_path / "f.csv").write_text(text)
    lm.annotate(store, tmp_path / "f.csv")
    found = list(metadata_of(store).values())
    assert [one.get("n") for one in found] == [1, 25, None, None, None]
    # 007 is not a number, so 12 in the same column is text, too.
    assert [one.get("code") for one in found] == ["007", "12", "1e999", None, None]


def test_stored_and_annotated_values_of_one_name(tmp_path: Path) -> None:
    """Of several types: the column is text, and a removed annotation shows the stored value."""
    store = store_of(tmp_path / "s", 3, metadata=[{"v": 1}, {"v": 2}, {"v": 3}])
    (tmp_path / "f.csv").write_text("key,v\nitem/00001,two\n")
    lm.annotate(store, tmp_path / "f.csv")
    assert [own["v"] for own in metadata_of(store).values()] == [1, "two", 3]
    assert store.info.metadata is not None
    column = pq.read_table(tmp_path / "s" / store.info.metadata)["metadata_v"]
    assert column.to_pylist() == ["1", "two", "3"]
    assert lm.annotate(store, remove=["v"]).names == ()
    assert [own["v"] for own in metadata_of(store).values()] == [1, 2, 3]


def test_more_names_than_the_columns_of_stored_metadata(tmp_path: Path) -> None:
    """An annotated name has a column, however many stored names occur more often."""
    store = store_of(tmp_path / "s", 3, metadata=[{f"n{i:02d}": i for i in range(70)}] * 3)
    (tmp_path / "f.csv").write_text("key,rare\nitem/00001,x\n")
    lm.annotate(store, tmp_path / "f.csv")
    assert store.info.metadata is not None
    names = pq.read_schema(tmp_path / "s" / store.info.metadata).names
    assert "metadata_rare" in names
    assert sum(name.startswith("metadata_n") for name in names) == 64


def test_a_second_file_adds_and_replaces(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    lm.annotate(store, write_rows(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "b.csv").write_text("id,key,bpm,mood\nitem/00001,zzz,,calm\nitem/00004,y,60,\n")
    summary = lm.annotate(store, tmp_path / "b.csv", key_column="id")
    assert summary.names == ("bpm", "genre", "live", "mood", "tags")
    assert summary.ignored == ("key",)  # a stored field
    found = metadata_of(store)
    assert found["item/00001"] == {"number": 1, **ANNOTATED["item/00001"], "mood": "calm"}
    assert found["item/00004"] == {"number": 4, "bpm": 60}
    assert found["item/00002"] == {"number": 2, **ANNOTATED["item/00002"]}
    again = lm.annotate(store, tmp_path / "b.csv", key_column="id")
    assert (again.version, again.changed) == (2, False)
    lm.revert_annotations(store, 1)
    assert metadata_of(store)["item/00001"] == {"number": 1, **ANNOTATED["item/00001"]}
    lm.revert_annotations(store, 2)
    assert metadata_of(store) == found


def test_secrets_in_urls_are_masked(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    (tmp_path / "f.csv").write_text("key,link\nitem/00001,https://x.org/a?token=abcdefgh12345678\n")
    lm.annotate(store, tmp_path / "f.csv")
    assert "abcdefgh" not in store["item/00001"].metadata["link"]
    for path in (tmp_path / "s").rglob("*"):
        assert not path.is_file() or b"abcdefgh12345678" not in path.read_bytes()


NAMES = st.sampled_from(["a", "b", "number"])
VALUES = st.one_of(st.none(), st.integers(-9, 9), st.sampled_from([0.5, 2**60, "x", True, [1]]))
FILES = st.dictionaries(st.integers(0, 5), st.dictionaries(NAMES, VALUES, max_size=3), min_size=1)
STEPS = st.one_of(
    st.tuples(st.just("annotate"), FILES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("revert"), st.none() | st.integers(0, 6)),
    st.tuples(st.just("retry"), st.integers(0, 2)),
)
State = dict[str, dict[str, Any]]  # annotated values by key and name


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=5))
def test_any_sequence_of_changes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]]
) -> None:
    """Against a list of versions, each a dict."""
    folder = tmp_path_factory.mktemp("sequence")
    store = store_of(folder / "s")
    keys = [f"item/{number:05d}" for number in range(5)]
    versions: list[State] = [{}]
    for action, argument in steps:
        state = {key: dict(values) for key, values in versions[-1].items()}
        if action == "retry":
            write_again(store.url, [argument], [record.latent for record in store])
            continue
        if action == "annotate":
            rows = [{"key": f"item/{number:05d}", **own} for number, own in argument.items()]
            file = write_rows(folder / "f.jsonl", rows)
            if not argument.keys() & set(range(5)):
                with pytest.raises(SourceError, match="has no key of"):
                    lm.annotate(store.url, file)
                continue
            lm.annotate(store.url, file)
            for row in rows:
                own = {n: v for n, v in row.items() if n != "key" and v is not None}
                if row["key"] in keys and own:
                    state.setdefault(row["key"], {}).update(own)
        elif action == "remove":
            if not any(argument in own for own in state.values()):
                with pytest.raises(ConfigError, match="no annotated values named"):
                    lm.annotate(store.url, remove=[argument])
                continue
            lm.annotate(store.url, remove=[argument])
            for own in state.values():
                own.pop(argument, None)
        else:
            wanted = len(versions) - 2 if argument is None else argument
            if len(versions) == 1 or not 0 <= wanted < len(versions):
                with pytest.raises(LatentmillError, match=r"nothing to revert|has no version"):
                    lm.revert_annotations(store.url, argument)
                continue
            lm.revert_annotations(store.url, argument)
            state = versions[wanted]
        state = {key: own for key, own in state.items() if own}
        if state != versions[-1]:
            versions.append(state)
        found = LatentStore(store.url)
        assert (found.info.annotation.version if found.info.annotation else 0) == len(versions) - 1
    expected = {key: {"number": n, **versions[-1].get(key, {})} for n, key in enumerate(keys)}
    assert metadata_of(store) == expected
    assert verify(LatentStore(store.url)).faults == []


def test_annotations_survive_a_seal_without_dataset_json(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    lm.annotate(store, write_rows(tmp_path / "a.jsonl", ROWS))
    lm.revert_annotations(store, 0)
    lm.revert_annotations(store)
    expected, entry = metadata_of(store), store.info.annotation
    (tmp_path / "s" / DATASET_PATH).unlink()
    write_again(store.url, [0], [record.latent for record in store])
    assert LatentStore(store.url).info.annotation == entry
    assert metadata_of(store) == expected


def test_superseded_metadata_files_are_removed(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s")
    for number in range(3):
        (tmp_path / "f.csv").write_text(f"key,n\nitem/00001,{number}\n")
        lm.annotate(store, tmp_path / "f.csv")
    assert len(list((tmp_path / "s").glob("metadata.*"))) == 2  # readers may still use the last one
    tidy(Storage(store.url))
    assert [p.name for p in (tmp_path / "s").glob("metadata.*")] == [store.info.metadata]
    assert not (tmp_path / "s/tmp").exists()


def test_an_export_has_the_annotated_values(tmp_path: Path) -> None:
    """Also an export that is updated after a change of the annotations only."""
    store = store_of(tmp_path / "s")
    dest = str(tmp_path / "export")
    export_store(store, dest, Target.WEBDATASET)
    lm.annotate(store, write_rows(tmp_path / "a.jsonl", ROWS))
    export_store(store, dest, Target.WEBDATASET)
    assert metadata_of(dest) == metadata_of(store)
    assert LatentStore(dest).info.annotation is None
    lm.revert_annotations(store)
    export_store(store, dest, Target.WEBDATASET)
    assert metadata_of(dest) == metadata_of(store)
    assert verify(LatentStore(dest)).faults == []


BAD_FILES = [
    ("f.csv", "name,bpm\nx,1\n", "has no column key or id: set --key-column to one of name, bpm"),
    ("f.csv", "key,bpm\n", "has no rows: check the file"),
    ("f.csv", "key,bpm\nzzz,1\n", r"has no key of .*s \(its first key is zzz\): check its keys"),
    ("f.csv", "key,b\nitem/00001,1\nitem/00001,2\n", "has the key item/00001 more than once"),
    ("f.csv", "key,b\n,1\n", "has no key in line 2: add it"),
    ("f.csv", "key,a.b\nitem/00001,1\n", r"the column 'a\.b' cannot be annotated: use a name"),
    ("f.csv", "key,\nitem/00001,1\n", "the column '' cannot be annotated"),
    ("f.csv", f"key,{'n' * 65}\nitem/00001,1\n", "cannot be annotated"),
    ("f.csv", "key,a\nitem/00001,1,2\n", "is not valid CSV in line 2"),
    ("f.jsonl", '{"key": "item/00001", "a": \n', "is not valid JSON in line 1"),
    ("f.parquet", "no parquet", "f.parquet"),
    ("none.csv", None, "^File .*none.csv does not exist or is not a file"),
    (
        "f.jsonl",
        json.dumps({"key": "item/00001", **{f"n{i}": i for i in range(257)}}),
        "has more than 256 columns",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES)
def test_a_bad_file_is_one_sentence_and_changes_nothing(
    tmp_path: Path,
    name: str,
    text: str | None,
    message: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    store = store_of(tmp_path / "s")
    before = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(LatentmillError, match=message) as error:
        lm.annotate(store, tmp_path / name)
    one_sentence(error.value)
    after = {p: p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert {p: d for p, d in after.items() if p.name != ".lock"} == before


def test_only_a_complete_store_is_annotated(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    store = store_of(tmp_path / "s", sealed=False)
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(StoreError, match="not complete: finish the run that encodes it") as error:
        lm.annotate(store.url, file)
    one_sentence(error.value)
    assert not (tmp_path / "s/.lock").exists()
    with pytest.raises(StoreError, match="is not a latentmill store"):
        lm.annotate(tmp_path / "nothing", file)
    assert not (tmp_path / "nothing").exists()


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "s")
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr("latentmill.engine.lock.WAIT_SECONDS", 0.1)
    with only_run(store.storage), pytest.raises(StoreError, match="Another run is writing to"):
        lm.annotate(store.url, file)
    assert lm.annotate(store.url, file).version == 1


def hostile(table: pa.Table) -> Callable[[bytes], bytes]:
    def change(_: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()

    return change


_KEYS = pa.array(["item/00001", "item/00002"])
_MARKED = pa.schema([("key", pa.string()), pa.field("v", pa.string(), metadata={b"json": b"1"})])
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-20],
    "empty": lambda data: b"",
    "not sorted": hostile(pa.table({"key": _KEYS[::-1], "v": [1, 2]})),
    "a key twice": hostile(pa.table({"key": ["a", "a"], "v": [1, 2]})),
    "no keys": hostile(pa.table({"v": [1, 2]})),
    "a missing key": hostile(pa.table({"key": ["a", None], "v": [1, 2]})),
    "keys of a wrong type": hostile(pa.table({"key": [1, 2], "v": [1, 2]})),
    "a list": hostile(pa.table({"key": _KEYS, "v": [[1], [2]]})),
    "a name with a dot": hostile(pa.table({"key": _KEYS, "v.w": [1, 2]})),
    "values that are not JSON": hostile(pa.table({"key": _KEYS, "v": ["{", "1"]}, _MARKED)),
    "deep JSON": hostile(pa.table({"key": _KEYS, "v": ["[" * 100_000, "1"]}, _MARKED)),
}


@pytest.mark.parametrize(("damage", "fits"), [("truncated", False), *((d, True) for d in DAMAGE)])
def test_damaged_annotations_are_one_sentence(
    tmp_path: Path, damage: str, fits: bool, one_sentence: Callable[[BaseException], str]
) -> None:
    """Whether or not dataset.json has the hash of the damaged file: a store may be hostile."""
    store = store_of(tmp_path / "s")
    lm.annotate(store, write_rows(tmp_path / "a.jsonl", ROWS))
    path = tmp_path / "s" / annotation_path(1)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if fits:
        document = json.loads((tmp_path / "s" / DATASET_PATH).read_text())
        document["annotation"]["hashes"] = [xxhash.xxh3_128_hexdigest(path.read_bytes())]
        (tmp_path / "s" / DATASET_PATH).write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"annotations/0001\.parquet is missing or damaged") as one:
        list(LatentStore(store.url))
    one_sentence(one.value)
    faults = verify(LatentStore(store.url)).faults
    assert len(faults) == 1
    assert "annotations/0001.parquet is missing or damaged" in faults[0]
    lm.revert_annotations(store.url, 0)
    assert metadata_of(store) == {k: {"number": n} for n, k in enumerate(store.keys())}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(tmp_path / "s")
    rows = [*ROWS, {"key": "\x1b[31mred", "duration": 3}]
    file = write_rows(tmp_path / "f.jsonl", rows)
    done = call(capsys, "annotate", store.url, "--from", file)
    assert done.code == 0
    assert done.out.splitlines() == [
        f"{store.url}: version 1 of the annotations, 3 records; names: bpm, genre, live, tags",
        "  keys that the store does not have: 2 of 5 (\\x1b[31mred, elsewhere)",
        "  ignored (names of stored fields): duration",
    ]
    shown = call(capsys, "info", store.url).out
    assert "annotations version 1: bpm, genre, live, tags (3 records)" in shown
    assert json.loads(call(capsys, "info", store.url, "--json").out)["annotation"]["version"] == 1
    done = call(capsys, "annotate", store.url, "--revert", "--json")
    assert json.loads(done.out) == {
        "store": store.url,
        "version": 2,
        "changed": True,
        "names": [],
        "records": 0,
        "matched": 0,
        "unknown": 0,
        "unknown_keys": [],
        "ignored": [],
    }
    assert call(capsys, "annotate", store.url, "--revert", "--to", 1).code == 0
    assert call(capsys, "annotate", store.url, "--remove", "tags", "--remove", "bpm").code == 0
    assert metadata_of(store)["item/00001"] == {"number": 1, "genre": "rock", "live": True}
    for options, message in (
        ([], "annotate needs --from FILE, --remove NAME or --revert."),
        (["--to", 1], "--to has no effect without --revert: add --revert, or leave it out."),
        (
            ["--revert", "--from", file],
            "--revert cannot be combined with --from, --remove or --key-column: run two commands.",
        ),
        (
            ["--remove", "x", "--key-column", "k"],
            "--key-column has no effect without --from: leave it out.",
        ),
        (["--revert", "--to", 9], f"{store.url} has no version 9 of its annotations: use 0 to 4."),
    ):
        refused = call(capsys, "annotate", store.url, *options)
        assert (refused.code, refused.err) == (2, f"latentmill: {message}\n")


def encode(source: Path, url: str, **options: Any) -> None:
    with in_process():
        lm.encode(source, url, unit_seconds=0.2, device="cpu", **options)


def test_runs_keep_the_annotations(tmp_path: Path) -> None:
    """Of a store that `encode` extends, and encodes again in part."""
    songs = write_songs(tmp_path / "songs", 4, 0.1)
    broken = songs / "album 0/broken.wav"
    broken.write_bytes(b"this is not audio")
    url = str(tmp_path / "s")
    encode(songs, url)
    keys = list(LatentStore(url).keys())
    rows = [{"key": key, "n": n} for n, key in enumerate(keys)]
    lm.annotate(url, write_rows(tmp_path / "f.jsonl", rows))
    expected = {key: {"n": n} for n, key in enumerate(keys)}
    shutil.copy(songs / "album 1/song 01.wav", broken)
    encode(songs, url, retry_failed=True, extend=True, retry_changed=True)
    assert metadata_of(url) == {**expected, "album 0/broken": {}}
    write_songs(tmp_path / "songs", 2, 0.1, first=7)
    encode(songs, url, extend=True)
    found = metadata_of(url)
    assert found == {**{key: {} for key in found}, **expected}
    assert len(found) == 7
    (songs / "album 1/song 01.wav").write_bytes((songs / "album 2/song 02.wav").read_bytes())
    encode(songs, url, extend=True, retry_changed=True)
    assert metadata_of(url) == found
    assert select([LatentStore(url)], "n == 2")[0].tolist() == [sorted(found).index(keys[2])]
    assert verify(LatentStore(url)).faults == []


def test_a_store_in_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    store = write_latents(f"{s3_bucket}/s", [3] * 3)
    summary = lm.annotate(store, write_rows(tmp_path / "a.parquet", ROWS[:2]))
    assert (summary.version, summary.matched, summary.unknown) == (1, 1, 1)
    assert metadata_of(store)["item/00001"] == {"number": 1, **ANNOTATED["item/00001"]}
    assert verify(LatentStore(store.url)).faults == []
    lm.revert_annotations(store)
    assert metadata_of(store)["item/00001"] == {"number": 1}


def test_a_link_in_the_place_of_temporary_files_is_not_followed(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    store = write_latents(str(tmp_path / "store"), [5] * 4)
    mine = tmp_path / "home" / "letters" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "home" / "a.txt").write_text("mine")
    (tmp_path / "store" / "tmp").symlink_to(tmp_path / "home")
    before = sorted((tmp_path / "home").rglob("*"))
    with pytest.raises(StoreError, match="tmp is a link: remove it") as caught:
        lm.annotate(store, write_rows(tmp_path / "rows.jsonl", ROWS))
    one_sentence(caught.value)
    assert sorted((tmp_path / "home").rglob("*")) == before
