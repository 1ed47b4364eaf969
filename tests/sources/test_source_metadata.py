"""Sidecars become metadata, or fail their item with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latentmill.errors import ItemError, SourceError
from latentmill.sources.base import Item
from latentmill.sources.metadata import parse_sidecar, read_metadata
from latentmill.sources.webdataset import WebDatasetSource
from support.sources import put


def item(folder: Path, **sidecars: bytes) -> Item:
    paths = []
    for number, (extension, data) in enumerate(sidecars.items()):
        path = folder / f"s{number}.{extension.rstrip('_')}"
        path.write_bytes(data)
        paths.append(str(path))
    return Item("s", str(folder / "s.wav"), 0, "", tuple(paths))


def test_sidecars_are_merged(tmp_path: Path) -> None:
    first = '\ufeff{"title": "Größe", "n": 1, "nested": {"a": [null, true, 1.5]}}'.encode()
    found = read_metadata(
        item(tmp_path, json=first, txt=b" two\nlines \n", JSON=b'{"n": 1, "m": 2}')
    )
    assert found == {
        "title": "Größe",
        "n": 1,
        "m": 2,
        "nested": {"a": [None, True, 1.5]},
        "text": "two\nlines",
    }
    assert read_metadata(item(tmp_path)) == {}
    assert read_metadata(item(tmp_path, json=b"[1, 2]")) == {"json": [1, 2]}


@pytest.mark.parametrize(
    ("sidecars", "says"),
    [
        (
            {"json": b'{"text": "one"}', "txt": b"two"},
            "s0.json and s1.txt give different values of text",
        ),
        (
            {"txt": b"two", "json": b'{"text": null}'},
            "s0.txt and s1.json give different values of text",
        ),
        (
            {"json": b'{"n": 1}', "JSON": b'{"m": 1, "n": 2}'},
            "s0.json and s1.JSON give different values of n",
        ),
        ({"json": b"[1]", "JSON": b"[2]"}, "s0.json and s1.JSON give different values of json"),
    ],
)
def test_sidecars_that_contradict_each_other_fail_the_item(
    tmp_path: Path, sidecars: dict[str, bytes], says: str
) -> None:
    with pytest.raises(ItemError) as caught:
        read_metadata(item(tmp_path, **sidecars))
    assert str(caught.value) == f"{says}: remove one"


BAD = {
    "cut": b'{"title": ',
    "empty": b"",
    "latin-1": b'{"title": "Gr\xf6\xdfe"}',
    "NaN": b'{"loudness": NaN}',  # which Python would take and write into the store
    "beyond a float": b'{"loudness": 1e999}',  # as is Infinity
    "beyond a float, negative": b'[{"loudness": -2.5E+400}]',
    "a number of 5,000 digits": b'{"id": ' + b"7" * 5000 + b"}",
    "half a character": rb'{"title": "\ud800"}',
    "bottomless": b"[" * 200_000,
    "another kind": b"title: yaml",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_sidecar_that_is_no_json_fails_the_item(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ItemError, match=r"^sidecar s0\.json (is|contains) ") as caught:
        read_metadata(item(tmp_path, json=BAD[kind]))
    assert "\n" not in str(caught.value)


def test_any_json_text_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"quotes": '"\\', "null": None, "emoji": "🎵", "large": 2**70, "float": 0.1}
    assert read_metadata(item(tmp_path, json=json.dumps(value).encode())) == value


def test_metadata_that_is_nested_too_deep_fails_the_item(tmp_path: Path) -> None:
    def nested(levels: int) -> bytes:
        lists = levels // 2
        return b'{"a": [' * lists + b"[" * (levels % 2) + b"]" * (levels % 2) + b"]}" * lists

    for levels in (2, 499, 500):
        found = read_metadata(item(tmp_path, json=nested(levels)))
        assert json.dumps(found).encode() == nested(levels)
    for levels in (502, 931, 960, 990):  # Python's own limit depends on the calls around it
        with pytest.raises(ItemError, match=r"nested more than 500 levels|maximum recursion depth"):
            read_metadata(item(tmp_path, json=nested(levels)))
    source_says = Item("s", "s.wav", 0, "", metadata=nested(700).decode())
    with pytest.raises(ItemError, match="nested more than 500 levels deep"):
        read_metadata(source_says)


def test_a_sidecar_that_is_gone_fails_the_item(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "gone.json"), "memory://nothing/gone.json"):
        with pytest.raises(ItemError, match=r"^sidecar gone\.json cannot be read: [Nn]o such file"):
            read_metadata(Item("s", "s.wav", 0, "", (uri,)))


def test_of_a_sidecar_that_is_none_little_is_read(tmp_path: Path) -> None:
    one = item(tmp_path, json=b"{}")
    with Path(one.sidecars[0]).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ItemError, match=r"^sidecar s0\.json exceeds 16 MiB: shorten or remove it$"):
        read_metadata(one)


def test_nobody_waits_for_the_writer_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.txt")
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(ItemError, match=r"^sidecar s\.txt cannot be read: It is not a regular"):
        read_metadata(Item("s", "s.wav", 0, "", (str(tmp_path / "s.txt"),)))
    with pytest.raises(SourceError, match=r"s\.tar is not a regular file: exclude it\.$"):
        list(WebDatasetSource(str(tmp_path), ("wav",)).items())


def test_an_empty_sidecar_in_a_bucket(s3_bucket: str) -> None:
    uri = put(f"{s3_bucket}/s.txt", b"")
    assert read_metadata(Item("s", f"{s3_bucket}/s.wav", 0, "", (uri,))) == {"text": ""}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Café".encode(), "Café"),
        ("\ufeffCafé".encode(), "Café"),
        ("Café \u2013 \u201cx\u201d".encode("cp1252"), "Café \u2013 \u201cx\u201d"),
        ("Café".encode("latin-1"), "Café"),
        (b"\x81\xe9", "\x81é"),
        ("Café".encode("utf-16"), "Café"),
    ],
)
def test_a_text_costs_no_song_whatever_its_encoding(data: bytes, text: str) -> None:
    assert parse_sidecar("a.txt", data) == {"text": text}
    assert parse_sidecar("a.cls", data) == {"cls": text}


def test_a_text_that_is_none_is_refused() -> None:
    with pytest.raises(ItemError, match=r"^sidecar a.txt is not a text file"):
        parse_sidecar("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\x0d")
    with pytest.raises(ItemError, match=r"^sidecar a\.json is not UTF-8: convert it$"):
        parse_sidecar("a.json", '{"a": "é"}'.encode("latin-1"))
