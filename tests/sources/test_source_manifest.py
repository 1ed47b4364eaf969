"""Manifests: paths, segments, keys, Lhotse and NeMo as they are, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import posixpath
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import SourceError
from latentmill.plan import UnitLimits, draft
from latentmill.sources.address import address_of, item_at, starts_at
from latentmill.sources.base import ByteRange, Item, Segment, TableCell
from latentmill.sources.group import GroupedSource
from latentmill.sources.manifest import ManifestColumns, ManifestSource, manifest_format
from latentmill.sources.reading import UnitReader
from support.sources import put


def manifest(path: Path, text: str | bytes) -> ManifestSource:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ManifestSource(str(path))


def jsonl(path: Path, *rows: dict[str, Any]) -> ManifestSource:
    return manifest(path, "\n".join(json.dumps(row) for row in rows))


def keys(source: ManifestSource) -> list[str]:
    return [item.key for item in source.items()]


def test_where_paths_lead_and_what_they_are_called(tmp_path: Path) -> None:
    rows = {
        "a/b.wav": (f"{tmp_path}/a/b.wav", "a/b"),
        "./a/../c.flac": (f"{tmp_path}/c.flac", "c"),
        f"{tmp_path}/in/d.v2.ogg": (f"{tmp_path}/in/d.v2.ogg", "in/d.v2"),
        "/elsewhere/e.wav": ("/elsewhere/e.wav", "elsewhere/e"),
        "x//y.wav": (f"{tmp_path}/x//y.wav", "x/y"),  # objects of buckets may be called so
        "../up.wav": (f"{tmp_path.parent}/up.wav", f"{tmp_path.parent}/up".lstrip("/")),
        "file:///elsewhere/f.wav": ("/elsewhere/f.wav", "elsewhere/f"),
        "https://host/g.mp3": ("https://host/g.mp3", "host/g"),
        "s3://bucket/x/h.mp3?": ("s3://bucket/x/h.mp3?", "bucket/x/h"),
        "ch. 1, take two": (f"{tmp_path}/ch. 1, take two", "ch. 1, take two"),
        "a :: b.wav": (f"{tmp_path}/a :: b.wav", "a :: b"),
    }
    source = jsonl(tmp_path / "m.jsonl", *({"path": path} for path in rows))
    found = list(source.items())
    assert [item.uri for item in found] == [uri for uri, _ in rows.values()]
    assert [item.key for item in found] == [key for _, key in rows.values()]


@pytest.mark.parametrize(
    "name",
    [
        "a.flac",
        "a.b/c",
        "a.b/c.wav",
        ".hidden",
        "d/.hidden",
        "d/..x.flac",
        "d/...flac",
        "a.",
        "d/.a.b",
        "a.longext",
        "a.flacs",
        "Übung.mp3",
        "/abs/a.b.wav",
        "s3://bucket/d.e/f",
        "s3://bucket/x.opus",
    ],
)
def test_a_key_is_the_path_without_a_short_extension(name: str, tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"path": name}) + "\n")
    (item,) = ManifestSource(str(manifest)).items()
    path = name.partition("://")[2] or name.lstrip("/")
    stem, extension = posixpath.splitext(path)
    assert item.key == (stem if len(extension) <= 6 else path)


def test_every_other_column_is_metadata(tmp_path: Path) -> None:
    text = 'file,start,dur,title,year,plate,gain,gap\na.wav,1.5,2,"One, two",1999,007,-3.5e0,\n'
    (item,) = manifest(tmp_path / "m.csv", "\ufeff" + text).items()
    assert json.loads(item.metadata) == {
        "title": "One, two",
        "year": 1999,
        "plate": "007",
        "gain": -3.5,
    }
    assert item.segment == Segment(1.5, 2.0)
    assert (item.key, item.seconds) == ("a#1.5-3.5", 2.0)
    (item,) = manifest(tmp_path / "m.tsv", text.replace(",", "\t").replace("One\t", "One,")).items()
    assert json.loads(item.metadata)["title"] == "One, two"


def test_keys_and_paths_of_a_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    text = "id,path,num_bytes\n4e10,1.10,7\n1.10,2e3,1.2 MB\n1.1,07,\n"
    items = list(manifest(tmp_path / "m.csv", text).items())
    assert [item.key for item in items] == ["4e10", "1.10", "1.1"]
    assert [item.uri for item in items] == [f"{tmp_path}/{name}" for name in ("1.10", "2e3", "07")]
    assert json.loads(items[1].metadata) == {"id": 1.1, "num_bytes": "1.2 MB"}
    assert {item.size for item in items} == {0}  # what a manifest says of bytes promises nothing


def test_a_line_of_a_tsv_is_a_row(tmp_path: Path) -> None:
    lines = ['"path"\tsentence', 'a.wav\t"Well', "b.wav\t", 'c.wav\t"a ""b"" c"', 'd.wav\tno."']
    items = list(manifest(tmp_path / "m.tsv", "\r\n".join(lines)).items())
    assert [item.key for item in items] == ["a", "b", "c", "d"]
    said = [json.loads(item.metadata).get("sentence") for item in items]
    assert said == ['"Well', None, 'a "b" c', 'no."']


def test_half_a_character_is_kept_as_an_escape(tmp_path: Path) -> None:
    source = manifest(tmp_path / "m.jsonl", r'{"path": "a.wav", "id": "a\ud83d", "text": "\ud83d"}')
    (item,) = source.items()
    assert item.key == r"a\ud83d"
    assert json.loads(item.metadata)["text"] == "\ud83d"
    (grouped,) = GroupedSource(source, "metadata:text").items()
    assert grouped.group == r"\ud83d"
    with draft([item, replace(grouped, key="b")], UnitLimits()) as drafted:  # Arrow holds text
        assert drafted.totals.items == 2


def test_a_cell_may_hold_a_book(tmp_path: Path) -> None:
    (item,) = manifest(tmp_path / "m.csv", f"path,text\na.wav,{'x' * 500_000}\n").items()
    assert len(json.loads(item.metadata)["text"]) == 500_000


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path,rec,from,for,id\nx,one.wav,2,3,7\n")
    columns = ManifestColumns(path="rec", start="from", duration="for", key="path")
    (item,) = ManifestSource(str(path), columns).items()
    assert (item.key, item.uri, item.segment) == ("x", f"{tmp_path}/one.wav", Segment(2, 3))
    (item,) = ManifestSource(str(path), ManifestColumns(path="rec")).items()
    assert (item.key, item.segment) == ("7", None)  # a column `id` is taken by itself
    (item,) = ManifestSource(str(path), ManifestColumns(path="rec", key="rec")).items()
    assert item.key == "one"


def test_a_later_row_may_lack_a_named_column(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"rec": "one.wav", "at": 2}\n{"rec": "two.wav"}\n')
    source = ManifestSource(str(path), ManifestColumns(path="rec", start="at"))
    segments = {Path(item.uri).name: item.segment for item in source.items()}
    assert segments == {"one.wav": Segment(2, None), "two.wav": None}
    assert not source.ignored


def test_a_duration_without_a_start_is_a_length(tmp_path: Path) -> None:
    rows = [
        {"audio_filepath": "a.wav", "duration": 3.25, "text": "nemo"},
        {"audio_filepath": "b.wav", "duration": 3.25, "offset": 0.0, "text": "part"},
        {"audio_filepath": "c.wav", "offset": 2, "text": "rest"},
    ]
    whole, first, rest = jsonl(tmp_path / "m.json", *rows).items()
    assert (whole.segment, whole.seconds) == (None, 3.25)
    assert (first.segment, first.key) == (Segment(0, 3.25), "b#0-3.25")
    assert (rest.segment, rest.key, rest.seconds) == (Segment(2.0), "c#2-", None)
    assert json.loads(rest.metadata) == {"text": "rest"}


def cut(**changes: Any) -> dict[str, Any]:
    """A cut as `lhotse.CutSet.to_jsonl` writes it."""
    recording = {
        "id": "rec",
        "sources": [{"type": "file", "channels": [0], "source": "rec.flac"}],
        "sampling_rate": 16000,
        "num_samples": 160000,
        "duration": 10.0,
        "channel_ids": [0],
    }
    supervision = {"id": "s1", "recording_id": "rec", "start": 0, "duration": 2.5, "text": "hello"}
    return {
        "id": "rec-1",
        "start": 4.0,
        "duration": 2.5,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording | changes.pop("recording", {}),
        "custom": {"snr": 30},
        "type": "MonoCut",
    } | changes


def test_lhotse_cuts(tmp_path: Path) -> None:
    two = {"channel_ids": [0, 1], "sources": [{"type": "file", "channels": [0, 1], "source": "x"}]}
    command = {"sources": [{"type": "command", "channels": [0], "source": "touch /tmp/pwned"}]}
    rows = [
        cut(),
        cut(id="whole", start=0, duration=10.0),
        cut(id="both", type="MultiCut", channel=[0, 1], recording=two),
        cut(id="one of two", recording=two),
        cut(id="shell", recording=command),
        cut(id="faster", recording={"transforms": [{"name": "Speed"}]}),
        {"id": "mix", "tracks": [], "type": "MixedCut"},
    ]
    path = tmp_path / "cuts.jsonl.gz"
    source = manifest(path, gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    part, whole, both = source.items()
    assert (part.key, part.uri) == ("rec-1", f"{tmp_path}/rec.flac")
    assert (part.segment, part.seconds) == (Segment(4.0, 2.5), 2.5)
    assert json.loads(part.metadata)["supervisions"][0]["text"] == "hello"
    assert json.loads(part.metadata)["custom"] == {"snr": 30}
    assert (whole.segment, both.segment) == (None, Segment(4.0, 2.5))
    assert source.ignored == {
        "cuts of some channels of their recording": 1,
        "cuts whose recording is not one file or URL": 1,
        "cuts that transform their recording": 1,
        "MixedCut without a recording": 1,
    }
    source = {"type": "file", "channels": [0], "source": ["a.flac"]}
    for wrong in (
        cut(duration="long"),
        cut(recording={"sources": [source]}),
        cut() | {"recording": [1]},
    ):
        with pytest.raises(SourceError, match="invalid Lhotse cut in line 2"):
            keys(jsonl(tmp_path / "m.jsonl", cut(), wrong))


def test_types_of_a_table_become_json(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": ["a.wav", "b.wav", None],
            "loudness": pa.array([1.5, float("nan"), 0], pa.float32()),
            "day": pa.array([0, 1, 2], pa.date32()),
            "tags": [["x", None], [], None],
            "embedding": [b"\xff", b"", None],
            "nested": [{"n": 1, "raw": b"\xfe"}, {"n": None, "raw": None}, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    source = ManifestSource(str(tmp_path / "m.parquet"))
    one, two = (json.loads(item.metadata) for item in source.items())
    assert one == {"loudness": 1.5, "day": "1970-01-01", "tags": ["x", None], "nested": {"n": 1}}
    assert two == {"day": "1970-01-02", "tags": [], "nested": {"n": None}}
    assert source.ignored == {"rows without a path": 1}


WRONG = {
    "no paths": ("m.csv", "title\nx\n", "has no path column"),
    "no rows": ("m.csv", "path\n", "has no rows with a path"),
    "a quote": ("m.csv", 'path,x\na.wav,"one\n', "not valid CSV in line 2"),
    "too many fields": ("m.csv", "path\na.wav,b\n", "line 2: 2 fields, but the header has 1"),
    "no seconds": (
        "m.csv",
        "path,start\na.wav,1:30\n",
        "invalid start in line 2: '1:30' is not a number",
    ),
    "before the start": ("m.csv", "path,start\na.wav,-1\n", "in line 2"),
    "an array": ("m.json", '[{"path": "a.wav"}]', "line 1 is not a JSON object"),
    "an array, indented": ("m.json", '[\n{"path": "a.wav"}\n]', "not valid JSON in line 1"),
    "cut off": ("m.jsonl", '{"path": "a.wav"}\n{"pa', "not valid JSON in line 2"),
    "nested too deep": (
        "m.jsonl",
        '{"path": "a.wav", "x": ' + "[" * 700 + "NaN" + "]" * 700 + "}",
        "the object in line 1 is nested more than 500 levels deep",
    ),
    "no text": ("m.jsonl", b'{"path": "\xff"}', "is not UTF-8 text"),
    "no gzip": ("m.jsonl.gz", b"\x1f\x8b\x08\x00 no", "cannot be read"),
    "half a gzip": (
        "m.jsonl.gz",
        gzip.compress(b'{"path": "a.wav"}\n' * 99)[:-9],
        "cannot be read",
    ),
    "no zstd": ("m.jsonl.zst", '{"path": "a.wav"}', "cannot be read"),
    "half a zstd": (
        "m.jsonl.zst",
        pa.compress(b'{"path": "a.wav"}\n' * 99, codec="zstd", asbytes=True)[:-9],
        "cannot be read",
    ),
    "an empty zstd": ("m.jsonl.zst", b"", "has no rows with a path"),
    "an end": ("m.csv", "path,start,end\na.wav,1,2\n", "gives the ends of segments in column end"),
    "half a character": (
        "m.jsonl",
        r'{"path": "a\ud83d.wav"}',
        "has an invalid path in line 1:",
    ),
    "a chain": ("m.jsonl", '{"path": "zip://a::b.zip"}', "has an invalid path in line 1:"),
    "a secret": ("m.jsonl", '{"url": "https://h/a.wav?X-Sig=deadbeef"}', "carries credentials"),
    "no key": ("m.jsonl", '{"id": "", "path": "a.wav"}', "has no id in line 1"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(
    kind: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    name, text, says = WRONG[kind]
    with pytest.raises(SourceError) as caught:
        keys(manifest(tmp_path / name, text))
    assert says in one_sentence(caught.value)
    assert "deadbeef" not in str(caught.value)


def test_a_manifest_whose_name_is_not_utf8_is_refused(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    try:
        source = manifest(tmp_path / "caf\udce9.jsonl", '{"path": "/a.wav"}')
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError) as caught:
        keys(source)
    assert r"caf\xe9.jsonl" in one_sentence(caught.value)


def zstd(*parts: bytes) -> bytes:
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)


def test_manifests_compressed_with_zstandard(tmp_path: Path) -> None:
    lines = [b'{"path": "%d.wav"}\n' % n for n in range(3000)]
    wanted = [str(n) for n in range(3000)]
    assert keys(manifest(tmp_path / "m.jsonl.zst", zstd(b"".join(lines)))) == wanted
    # `pzstd` and `cat a.zst b.zst` write several frames
    assert keys(manifest(tmp_path / "n.JSONL.ZST", zstd(*lines))) == wanted
    assert keys(manifest(tmp_path / "m.csv.zst", zstd(b"\xef\xbb\xbfpath\r\na.wav\r\n"))) == ["a"]
    memory = f"memory://{uuid.uuid4().hex}/m.csv.zst"
    assert keys(ManifestSource(put(memory, zstd(b"path\nb.wav\n")))) == ["b"]


def test_names_of_manifests() -> None:
    for name in ("a.csv", "s3://b/a.CSV.gz", "a.tsv", "a.jsonl", "cuts.jsonl.gz", "a.parquet"):
        assert manifest_format(name) is not None
    for name in ("a.wav", "music", "a.json.d", "a.tar", "a.gz"):
        assert manifest_format(name) is None


PLACES = st.one_of(
    st.none(),
    st.builds(ByteRange, st.integers(0, 2**50), st.integers(1, 2**50)),
    st.builds(TableCell, st.integers(0, 9999), st.integers(0, 2**40), st.sampled_from("ab")),
)
SECONDS = st.integers(0, 10**12).map(lambda n: n / 1e6)
SEGMENTS = st.one_of(st.none(), st.builds(Segment, SECONDS, st.one_of(st.none(), SECONDS)))


@given(st.text(min_size=1).filter(lambda t: "#" not in t), PLACES, SEGMENTS)
def test_an_address_finds_its_place_again(uri: str, place: Any, segment: Segment | None) -> None:
    address = address_of(Item("k", uri, 0, "", place=place, segment=segment))
    found = item_at(address)
    assert (found.uri, found.place) == (uri, place)
    assert (found.segment is None) == (segment is None)
    if segment is not None and found.segment is not None:
        assert found.segment == segment
    (start,) = starts_at(pa.array([address]))
    assert start == (segment and pytest.approx(segment.start, abs=0.00051))


def test_an_address_without_a_fragment_is_a_file() -> None:
    for uri in ("/a/b#c.wav", "s3://b/#t=", "/x#bytes=1-", "/x.wav#"):
        assert item_at(uri).uri == uri


def test_a_large_manifest_is_streamed(tmp_path: Path) -> None:
    rows = 30_000
    names = [f"album-{n // 1000:04d}/song-{n:07d}.flac" for n in range(rows)]
    columns = {"path": names, "duration": np.full(rows, 3.5), "title": names}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet", row_group_size=rows)
    del columns
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    found = most = 0
    for item in ManifestSource(str(tmp_path / "m.parquet")).items():
        found += len(item.metadata) > 0
        if found % 2000 == 0:
            arrow = pa.total_allocated_bytes() - before
            most = max(most, tracemalloc.get_traced_memory()[0] + arrow)
    tracemalloc.stop()
    assert found == rows
    assert most < 12e6  # all items would take 24 MB


LINES = {
    "cells over lines": ('path,text,start\na.wav,"one\ntwo\nthree",0\nb.wav,"x\ny",never\n', 5),
    "blank lines": ("path,start\n\n\na.wav,0\n\n\n\nb.wav,never\n", 8),
    "windows lines": ('path,text,start\r\na.wav,"1\r\n2",0\r\n\r\nb.wav,x,never\r\n', 5),
    "comments": ("path,start\n# one,\n# two,\na.wav,0\nb.wav,never\n", 5),
    "too many fields": ('path,text\na.wav,"1\n2"\n\nb.wav,"3\n4",x\n', 5),
    "an open quote": ('path,text\na.wav,"1\n2"\nb.wav,"3\n4\n5\n', 4),
    "text behind a quote": ('path,text\na.wav,"1\n2"\nb.wav,"3\n4"x\n', 4),
}


@pytest.mark.parametrize("name", LINES)
def test_the_line_of_an_error_is_where_its_row_begins(
    tmp_path: Path, name: str, one_sentence: Callable[[BaseException], str]
) -> None:
    text, line = LINES[name]
    with pytest.raises(SourceError) as caught:
        keys(manifest(tmp_path / "m.csv", text))
    assert f"in line {line}:" in one_sentence(caught.value)


def test_an_error_in_jsonl_names_the_line_behind_blank_ones(tmp_path: Path) -> None:
    text = '{"path": "a.wav"}\n\n\n{"path": "b.wav", "start": -1}\n'
    with pytest.raises(SourceError, match="in line 4"):
        keys(manifest(tmp_path / "m.jsonl", text))


@pytest.mark.parametrize("host", ["", "localhost"])
def test_file_urls_are_decoded(tmp_path: Path, host: str) -> None:
    name = "ein Stück #1 100%.wav"
    (tmp_path / name).write_bytes(b"audio")
    url = f"file://{host}{tmp_path}/ein%20St%C3%BCck%20%231%20100%25.wav"
    (item,) = jsonl(tmp_path / "m.jsonl", {"path": url}).items()
    assert (item.uri, item.key) == (f"{tmp_path}/{name}", "ein Stück #1 100%")
    with UnitReader([item]) as reader, reader.open(item) as media:
        assert media.read_at(0, 9) == b"audio"


CUT = {
    "type": "MonoCut",
    "id": "/",
    "start": 0,
    "duration": 1.0,
    "channel": 0,
    "recording": {
        "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
        "duration": 1.0,
    },
}


@pytest.mark.parametrize(
    "row",
    [
        *({"path": "a.wav", "id": key} for key in ("/", ".", "./.", "\0")),
        {"path": "."},
        {"path": "/"},
        CUT,
    ],
)
def test_an_empty_key_is_refused_with_its_line(
    tmp_path: Path, row: dict[str, Any], one_sentence: Callable[[BaseException], str]
) -> None:
    source = jsonl(tmp_path / "m.jsonl", {**CUT, "id": "x"} if row is CUT else {"path": "b"}, row)
    with pytest.raises(SourceError) as caught:
        keys(source)
    assert "empty key in line 2" in one_sentence(caught.value)


@pytest.mark.parametrize("name", ["m.csv", "m.tsv"])
def test_two_columns_of_one_name_are_refused(
    tmp_path: Path, name: str, one_sentence: Callable[[BaseException], str]
) -> None:
    text = "path,text,text\na.wav,one,two\n"
    with pytest.raises(SourceError) as caught:
        keys(manifest(tmp_path / name, text.replace(",", "\t") if name == "m.tsv" else text))
    assert "several columns named text" in one_sentence(caught.value)
    unnamed = manifest(tmp_path / "n.csv", "path,,\na.wav,,\n")
    assert keys(unnamed) == ["a"]


def test_a_tilde_that_is_no_home_folder_is_part_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    rows = {
        "~take.wav": (f"{tmp_path}/~take.wav", "~take"),
        "~no-such-user/b.wav": (f"{tmp_path}/~no-such-user/b.wav", "~no-such-user/b"),
        "~/c.wav": ("/homes/me/c.wav", "homes/me/c"),
    }
    source = jsonl(tmp_path / "m.jsonl", *({"path": path} for path in rows))
    assert [(item.uri, item.key) for item in source.items()] == list(rows.values())
