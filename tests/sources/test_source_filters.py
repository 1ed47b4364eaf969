"""Filters, conditions, groups, and which source a name means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentmill.config import load_config
from latentmill.errors import ConfigError, SourceError
from latentmill.sources.base import Item
from latentmill.sources.filters import Filters
from latentmill.sources.folder import FolderSource
from latentmill.sources.group import GroupedSource, check_rule
from latentmill.sources.open import has_any, is_there, open_source, source_type
from latentmill.sources.where import Condition
from support.sources import put, sorted_items

METADATA = {
    "genre": "rock",
    "bpm": 120,
    "tags": ["live", "loud"],
    "artist": {"name": "Ann"},
    "nothing": None,
    "minus": -3,
}
CONDITIONS = {
    "genre == 'rock' and bpm > 100": True,
    "genre == 'rock' and bpm > 120": False,
    "bpm > 300 or genre in ['jazz', 'rock']": True,
    "'live' in tags and not 'soft' in tags": True,
    "'soft' not in tags": True,
    "artist.name == 'Ann'": True,
    "artist.age == 3": False,
    "genre.name == 'x'": False,
    "60 <= bpm < 130": True,
    "minus == -3": True,
    "missing == 1": False,
    "missing": False,
    "missing is None": True,
    "nothing is not None": False,
    "missing > 3": False,
    "not missing > 3": True,
    "genre > 3": False,
    "bpm == '120'": False,
    "True": True,
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_is_what_it_looks_like(text: str) -> None:
    assert Condition(text).holds(METADATA) is CONDITIONS[text]


FORBIDDEN = (
    "__import__('os').system('touch /tmp/pwned')",
    "open('x')",
    "[x for x in tags]",
    "tags[0] == 'live'",
    "9 ** 9 ** 9 == 1",
    "(lambda: 1)()",
    "genre = 'rock'",
    "genre == ",
    "",
    "(" * 500,
    "a" * 5000,
    "f'{genre}' == 'rock'",
    "(x := 3) == 3",
    "yield",
)


@pytest.mark.parametrize("text", FORBIDDEN)
def test_nothing_else_is_a_condition(
    text: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Condition(text)
    assert "invalid where condition" in str(caught.value)
    assert "\n" not in str(caught.value)


ITEM = Item("k", "/k.wav", 0, "", seconds=5.0)


def test_every_filter_says_its_name() -> None:
    assert Filters(where="bpm < 100").of_source(ITEM, METADATA) == "where: not bpm < 100"
    assert Filters(where="bpm > 100").of_source(ITEM, METADATA) is None
    assert Filters(min_seconds=6).of_source(ITEM, {}) == "min_seconds: 5.000 s"
    assert Filters(max_seconds=4).of_source(ITEM, {}) == "max_seconds: 5.000 s"
    assert Filters(max_seconds=4).of_source(replace(ITEM, seconds=None), {}) is None
    assert Filters(min_sample_rate=44100).of_header(16000, 1) == "min_sample_rate: 16000 Hz"
    assert Filters(max_sample_rate=44100).of_header(48000, 1) == "max_sample_rate: 48000 Hz"
    assert Filters(min_channels=2).of_header(48000, 1) == "min_channels: 1"
    assert Filters(max_channels=2).of_header(48000, 6) == "max_channels: 6"
    assert Filters(min_channels=1, max_channels=2).of_header(48000, 2) is None
    assert Filters(min_rms=-60).of_audio(1e-4) == "min_rms: -80.0 dBFS"
    assert Filters(min_rms=-60).of_audio(0.0) == "min_rms: -inf dBFS"
    assert Filters(min_rms=-60).of_audio(10 ** (-60 / 20)) is None
    assert Filters().of_audio(math.nan) is None


class Listed:
    """A source of some keys."""

    def __init__(self, *keys: str) -> None:
        self.uri, self.keys, self.ignored = "/music", keys, Counter({".jpg": 1})

    def items(self) -> Iterator[Item]:
        yield from (Item(key, f"/music/{key}", 0, "", metadata='{"song": 3}') for key in self.keys)


def groups(rule: str, *keys: str) -> list[tuple[str | None, str | None]]:
    return [(item.group, item.role) for item in GroupedSource(Listed(*keys), rule).items()]


def test_groups_by_key_and_by_metadata() -> None:
    rule = r"^(?P<group>.*)/(?:\d+ )?(?P<role>[^/]+)$"
    assert groups(rule, "a/song/01 drums", "a/song/bass", "loose") == [
        ("a/song", "drums"),
        ("a/song", "bass"),
        (None, None),
    ]
    assert groups(r"(?P<group>\d+)", "x1", "y") == [("1", None), (None, None)]
    assert groups("metadata:song", *map(str, range(200))) == [("3", None)] * 200
    assert groups("metadata:album, song", "a") == [(None, "3")]
    assert GroupedSource(Listed("a"), rule).ignored == {".jpg": 1}


def test_sidecars_are_read_for_groups_and_a_bad_one_fails_later(tmp_path: Path) -> None:
    for name, text in (("a", b'{"song": "x", "stem": "drums"}'), ("b", b"{"), ("c", b"{}")):
        put(f"{tmp_path}/{name}.wav", b"")
        put(f"{tmp_path}/{name}.json", text)
    source = GroupedSource(FolderSource(str(tmp_path), ("wav",)), "metadata:song,stem")
    assert [(item.key, item.group, item.role) for item in sorted_items(source)] == [
        ("a", "x", "drums"),
        ("b", None, None),
        ("c", None, None),
    ]


def test_globs_choose_files_and_rename_none(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac", "in/b.wav", "in/out/c.wav", "in/B.txt"):
        put(f"{tmp_path}/{name}", b"")

    def keys(**globs: tuple[str, ...]) -> tuple[list[str], int]:
        source = FolderSource(str(tmp_path), ("wav", "flac"), **globs)
        return [item.key for item in sorted_items(source)], source.ignored["excluded"]

    assert keys() == (["a.flac", "a.wav", "in/b", "in/out/c"], 0)
    assert keys(include=("*.wav",)) == (["a.wav", "in/b", "in/out/c"], 1)
    assert keys(exclude=("in/out/*", "*.flac")) == (["a.wav", "in/b"], 2)
    assert keys(include=("in/*",), exclude=("*/c.*",)) == (["in/b"], 3)
    with pytest.raises(SourceError, match="skip all of them"):
        keys(include=("*.mp3",))


def test_the_name_decides_the_type(tmp_path: Path) -> None:
    for name in ("songs.json", "shards", "tables.parquet"):
        (tmp_path / name).mkdir()
    put(f"{tmp_path}/list.json", b"{}")
    types = {
        str(tmp_path): "folder",
        f"{tmp_path}/songs.json": "folder",
        f"{tmp_path}/list.json": "manifest",
        f"{tmp_path}/tables.parquet": "parquet",
        "s3://bucket/music": "folder",
        "s3://bucket/shard-{000..123}.tar": "webdataset",
        "x.tar.gz": "webdataset",
        "s3://bucket/train-*.parquet": "parquet",
        "hf://datasets/user/name": "parquet",
    }
    assert {uri: source_type(uri) for uri in types} == types


def test_a_folder_of_something_else_says_how_to_read_it(tmp_path: Path) -> None:
    put(f"{tmp_path}/a.tar", b"")
    with pytest.raises(SourceError, match="use --source-type webdataset for 1 of them"):
        sorted_items(FolderSource(str(tmp_path), ("wav",)))


def config(**settings: Any) -> Any:
    return load_config(None, {"source": "/music", "out": "/out", **settings})


def test_settings_without_effect_are_refused(one_sentence: Callable[..., str]) -> None:
    for settings, says in (
        ({"path_column": "x"}, "--path-column has no effect on a source of type folder"),
        ({"source": "a.tar", "include": ("*",)}, "--include has no effect"),
        ({"source": "a.csv", "extensions": ("wav",)}, "--extensions has no effect"),
        ({"source": "a.tar", "audio_column": "x"}, "only on parquet"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_source(config(**settings))
        assert says in one_sentence(caught.value)


def test_whether_a_source_is_still_there(tmp_path: Path) -> None:
    put(f"{tmp_path}/in/a.tar", b"")
    for uri, there in (
        ("in", True),
        ("in/a.tar", True),
        ("in/*.tar", True),
        ("gone/{a,b}.tar", False),
        ("gone.csv", False),
    ):
        assert is_there(f"{tmp_path}/{uri}") is there


def test_whether_a_source_has_any_of_its_files(tmp_path: Path) -> None:
    put(f"{tmp_path}/in/a.wav", b"")
    put(f"{tmp_path}/list.csv", b"path\ngone.wav\n")
    there, gone = (Item(name, f"{tmp_path}/in/{name}.wav", 0, "") for name in ("a", "gone"))
    for uri, items, found in (
        ("in", [gone, there], True),
        ("in", [gone], False),
        ("in/*.wav", [gone], False),
        ("list.csv", [gone], True),
        ("in", [Item("far", "https://host/far.wav", 0, "")], True),  # which a table refers to
        ("in/*.wav", [Item("far", f"{tmp_path}/elsewhere/far.wav", 0, "")], True),
    ):
        assert has_any(f"{tmp_path}/{uri}", items) is found
    assert has_any("memory://in", [Item("a", "memory://in/a.wav", 0, "")])


@pytest.mark.parametrize("rule", [r"no/(?P<group>such)", "metadata:title", "metadata:album,stem"])
def test_a_rule_that_matches_nothing_is_refused(
    rule: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        groups(rule, "a/drums", "a/bass")
    assert "matches no item" in one_sentence(caught.value)
    assert groups(rule) == []  # an empty source says so itself


@pytest.mark.parametrize("rule", [r"(?P<group>.*)/(?P<rol>.*)", r"(?P<song>.*)/(?P<group>.*)"])
def test_a_named_group_without_a_meaning_is_refused(
    rule: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rule(rule)
    unknown = "song" if "song" in rule else "rol"
    assert f"unknown group {unknown};" in one_sentence(caught.value)
