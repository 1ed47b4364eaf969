"""A folder of audio, wherever it lies: the same keys, the same order, nothing lost."""

from __future__ import annotations

import os
import random
import shutil
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.audio import open_media
from latentmill.errors import SourceError, StoreError
from latentmill.sources.base import Item
from latentmill.sources.folder import FolderSource
from latentmill.sources.metadata import read_metadata
from latentmill.sources.names import without_extensions
from latentmill.storage.storage import Storage
from support.sources import put, sorted_items

EXTENSIONS = ("wav", "FLAC", ".mp3")

TREE = {
    "a.wav": b"1",
    "a.flac": b"22",  # the same stem
    "b.wav": b"333",
    "b.mp3": b"1",
    "b.wav.flac": b"4",  # its stem is another's name
    "album/01. intro.v2.wav": b"55555",
    "album/01. intro.v2.json": b"{}",
    "album/cover.JPG": b"x",
    "album/Grüße 音楽.MP3": b"666666",
    "album/Grüße 音楽.txt": b"text",
    "album/Grüße 音楽.MP3.json": b"{}",
    "album.wav": b"7",  # a file and a folder of one name
    "with # and ?&%20.wav": b"8",
    "with :: it.wav": b"10",
    "with :: it.txt": b"text",
    "deep/er/est/x.wav": b"9",
    "orphan.json": b"{}",
    "README": b"",
}
KEYS = [
    "a.flac",
    "a.wav",
    "album",
    "album/01. intro.v2",
    "album/Grüße 音楽",
    "b.mp3",
    "b.wav",
    "b.wav.flac",
    "deep/er/est/x",
    "with # and ?&%20",
    "with :: it",
]


def write_tree(url: str, tree: Mapping[str, bytes]) -> str:
    filesystem, root = fsspec.core.url_to_fs(url)
    for name, data in tree.items():
        path = f"{root}/{name}"
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        filesystem.pipe_file(path, data)
    return url


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "music")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/music"
    return str(request.getfixturevalue("s3_bucket")) + "/music"


@dataclass(frozen=True)
class Listing:
    """What a source found, in the order of the keys, and what it left alone."""

    items: tuple[Item, ...]
    ignored: dict[str, int]


def listing(url: str) -> Listing:
    source = FolderSource(url, EXTENSIONS)
    items = sorted(source.items(), key=lambda item: item.key)
    return Listing(tuple(items), dict(source.ignored))


def by_key(url: str) -> dict[str, Item]:
    return {item.key: item for item in listing(url).items}


def test_keys_are_the_same_wherever_the_folder_lies(url: str) -> None:
    write_tree(url, TREE)
    found = listing(url)
    assert [item.key for item in found.items] == KEYS
    assert found.ignored == {".jpg": 1, ".json": 1, "no extension": 1}
    for item in found.items:
        source = FolderSource(url, EXTENSIONS)
        with open_media(item.uri, item.size) as media:
            assert media.read_at(0, 100) == TREE[item.uri.removeprefix(f"{source.uri}/")]
        read_metadata(item)
    items = by_key(url)
    names = [uri.rsplit("/", 1)[1] for uri in items["album/Grüße 音楽"].sidecars]
    assert names == ["Grüße 音楽.txt", "Grüße 音楽.MP3.json"]
    assert len(items["album/01. intro.v2"].sidecars) == 1
    assert items["album"].sidecars == ()
    assert listing(url) == found == listing(url + "/")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_changed_file_has_another_version(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_bucket") + "/m"
    write_tree(url, {"a.wav": b"1", "b.wav": b"2"})
    before = by_key(url)
    write_tree(url, {"a.wav": b"3"})
    assert set(by_key(url)) == {"a", "b"}
    if kind == "s3":  # by another process: s3fs keeps listings
        import boto3

        bucket = url.split("/")[2]
        boto3.client("s3").put_object(Bucket=bucket, Key="m/c.wav", Body=b"4")
    else:
        write_tree(url, {"c.wav": b"4"})
    after = by_key(url)
    assert set(after) == {"a", "b", "c"}  # a source listed anew sees new files
    assert after["a"].version != before["a"].version != ""
    assert after["b"] == before["b"]


def test_the_order_of_the_listing_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(str(tmp_path), TREE)
    (tmp_path / "aaa").symlink_to(tmp_path / "deep")  # two ways to one folder
    (tmp_path / "zzz").symlink_to(tmp_path / "deep")
    wanted = listing(str(tmp_path))
    real = os.scandir

    class Shuffled:
        def __init__(self, path: str) -> None:
            with real(path) as entries:
                self.entries = list(entries)
            random.shuffle(self.entries)

        def __enter__(self) -> Shuffled:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> object:
            return iter(self.entries)

        def __next__(self) -> os.DirEntry[str]:
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    monkeypatch.setattr(os, "scandir", Shuffled)
    for _ in range(5):
        assert listing(str(tmp_path)) == wanted


PARTS = st.lists(st.sampled_from(["a", "b", "wav", "flac", ""]), min_size=1, max_size=4)


@given(st.lists(PARTS.map(".".join).filter(lambda name: name.strip(".")), unique=True))
def test_every_path_has_a_name_of_its_own(paths: list[str]) -> None:
    names = without_extensions(paths)
    assert list(names) == paths
    assert len(set(names.values())) == len(paths)
    for path, name in names.items():
        assert name == path or path.startswith(name + ".") or path == name
    backwards = without_extensions(paths[::-1])
    assert backwards == names


@given(st.lists(st.text(string.printable + "äß音", min_size=1, max_size=8), max_size=9))
def test_the_keys_of_any_names_are_unique(names: list[str]) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    tree = {f"x{name.strip('/')}.wav": b"1" for name in names}
    write_tree(root, {**tree, "always.wav": b""})
    keys = [item.key for item in listing(root).items]
    assert len(set(keys)) == len(keys) == len(fsspec.filesystem("memory").find(root))
    assert keys == sorted(keys)


def test_empty_objects_that_stand_for_folders_are_no_files(s3_bucket: str) -> None:
    import boto3

    client = boto3.client("s3")
    for key in ("m/", "m/a/", "m/a/x.wav", "m/a//x.wav"):
        client.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key, Body=b"")
    found = listing(f"{s3_bucket}/m")
    assert [item.key for item in found.items] == ["a//x", "a/x"]
    assert found.ignored == {}


def test_links(tmp_path: Path) -> None:
    music = tmp_path / "music"
    write_tree(str(music), {"a/x.wav": b"1", "b.wav": b"2"})
    outside = write_tree(str(tmp_path / "outside"), {"y.wav": b"333"})
    (music / "linked").symlink_to(outside)
    (music / "a/loop").symlink_to(music)
    (music / "file.wav").symlink_to(music / "b.wav")
    (music / "dangling.wav").symlink_to(music / "nowhere.wav")
    (music / "itself.wav").symlink_to(music / "itself.wav")
    items = by_key(str(music))
    assert list(items) == ["a/x", "b", "dangling", "file", "itself", "linked/y"]
    assert listing(str(music)).ignored == {"links to folders that are listed already": 1}
    assert items["linked/y"].size == 3
    assert items["dangling"].size == items["itself"].size == 0  # items, which will fail by name


def test_what_is_no_source_is_refused(
    url: str, one_sentence: Callable[[BaseException], str]
) -> None:
    write_tree(url, {"sub/cover.jpg": b"x", "sub/notes.txt": b"y"})
    for wrong, says in (
        (url, "contains no audio files: none of its 2 files ends in .flac, .mp3, .wav"),
        (url + "/none", "does not exist"),
        (url + "/sub/notes.txt", "is a file"),
    ):
        with pytest.raises(SourceError) as caught:
            listing(wrong)
        assert says in one_sentence(caught.value)


def test_a_url_that_cannot_be_opened_is_refused(
    one_sentence: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError) as caught:
        listing("nonsense://a")
    assert "nonsense" in one_sentence(caught.value)
    for opened, error in ((listing, SourceError), (Storage, StoreError)):  # it connects at once
        with pytest.raises(error, match="cannot be opened: Connection refused"):
            opened("ftp://127.0.0.1:9/music")

    def missing(url: str) -> None:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(SourceError, match=r"pip install 'latentmill\[gcs\]'\.$"):
        listing("gs://bucket/music")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is empty: check the path"):
        listing(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    write_tree(str(tmp_path), {"a.wav": b"1", "secret/b.wav": b"2"})
    (tmp_path / "secret").chmod(0)
    try:
        with pytest.raises(SourceError) as caught:
            listing(str(tmp_path))
    finally:
        (tmp_path / "secret").chmod(0o755)
    assert f"Permission denied ({tmp_path}/secret)" in one_sentence(caught.value)


def test_a_folder_that_goes_while_it_is_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(str(tmp_path), {"a.wav": b"1", "gone/b.wav": b"2"})
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("gone"):
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"cannot be listed: No such file.*gone\)\.$"):
        listing(str(tmp_path))


def test_a_name_that_is_no_text_is_refused(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError) as caught:
        listing(str(tmp_path))
    assert r"caf\xe9.wav" in one_sentence(caught.value)


def test_files_that_macos_puts_beside_others_are_counted(tmp_path: Path) -> None:
    for name in ("a.wav", "._a.wav", "._a.txt", "__MACOSX/b.wav", "d/._c.flac", ".hidden.wav"):
        put(f"{tmp_path}/{name}", b"1")
    source = FolderSource(str(tmp_path), ("wav", "flac"))
    assert [item.key for item in sorted_items(source)] == [".hidden", "a"]
    assert source.ignored == {"files of macOS (._*, __MACOSX)": 4}
