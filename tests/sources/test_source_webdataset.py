"""WebDataset tars: samples, metadata, and what a tar may hold to do harm."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from latentmill.errors import ItemError, SourceError
from latentmill.plan.items import draft_table
from latentmill.sources.base import Item
from latentmill.sources.metadata import read_metadata
from latentmill.sources.reading import UnitReader
from latentmill.sources.webdataset import WebDatasetSource
from support.sources import put, tar_of

AUDIO = ("wav", "flac")


def source(path: Path, data: bytes) -> WebDatasetSource:
    return WebDatasetSource(put(str(path), data), AUDIO)


def by_key(found: WebDatasetSource) -> dict[str, Item]:
    return {item.key: item for item in found.items()}


def read(item: Item) -> bytes:
    with UnitReader([item]) as reader, reader.open(item) as media:
        return media.read_at(0, media.size)


def test_samples_are_what_webdataset_says_they_are(tmp_path: Path) -> None:
    members = [
        ("a/one.json", b'{"n": 1}'),
        ("a/one.wav", b"W1"),
        ("a/one.txt", "zwölf\n".encode()),
        ("a/one.cls", b"7"),
        ("a/one.pyd", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."),  # webdataset would unpickle it
        ("two.drums.flac", b"D"),
        ("two.drums.json", b'{"stem": "drums"}'),
        ("two.json", b'{"song": "two"}'),
        ("two.bass.flac", b"B"),
        ("three.wav", b"3"),
        ("three.flac", b"33"),
        ("no-extension", b"?"),
        ("alone.json", b"{}"),
    ]
    found = source(tmp_path / "x.tar", tar_of(members))
    items = by_key(found)
    assert {key: read(item) for key, item in items.items()} == {
        "x/a/one": b"W1",
        "x/two.drums": b"D",
        "x/two.bass": b"B",
        "x/three.wav": b"3",
        "x/three.flac": b"33",
    }
    said = {key: read_metadata(item) for key, item in items.items()}
    assert said["x/a/one"] == {"n": 1, "text": "zwölf", "cls": 7}
    assert said["x/two.drums"] == {"stem": "drums", "song": "two"}
    assert said["x/two.bass"] == {"song": "two"}
    assert found.ignored == {".pyd": 1, "members without an extension": 1, ".json": 1}
    assert json.loads(items["x/a/one"].metadata)["cls"] == 7  # the plan has it: one read per item


def test_metadata_that_is_none_fails_its_item_by_name(tmp_path: Path) -> None:
    members = [
        ("a.json", b'{"title": '),
        ("a.wav", b"1"),
        ("b.json", b'{"text": "one"}'),
        ("b.txt", b"two"),
        ("b.wav", b"2"),
        ("c.txt", b"\x00\xff"),
        ("c.wav", b"3"),
        ("d.json", b'"half a \\ud800"'),
        ("d.wav", b"4"),
        ("e.json", b""),
        ("e.wav", b"5"),
    ]
    items = by_key(source(tmp_path / "x.tar", tar_of(members)))
    reasons = {}
    for key, item in items.items():
        with pytest.raises(ItemError) as caught:
            read_metadata(item)
        reasons[key] = str(caught.value)
    assert reasons["x/a"].startswith("sidecar a.json is not valid JSON")
    assert reasons["x/b"] == "the source and b.txt give different values of text: remove one"
    assert reasons["x/c"] == "sidecar c.txt is not a text file: remove it, or save it as UTF-8"
    assert reasons["x/d"].startswith("sidecar d.json contains half a surrogate pair")
    assert reasons["x/e"].startswith("sidecar e.json is not valid JSON")


def test_names_never_become_paths(tmp_path: Path) -> None:
    names = ["../../up.wav", "/etc/passwd.wav", "./here.wav", "a//b/../c.wav", "caf\udce9.wav"]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"%d" % number))
    items = by_key(source(tmp_path / "in" / "x.tar", target.getvalue()))
    assert {key: read(item) for key, item in items.items()} == {
        "x/%2E%2E/%2E%2E/up": b"0",
        "x/etc/passwd": b"1",
        "x/here": b"2",
        "x/a/b/%2E%2E/c": b"3",
        "x/caf\\xe9": b"4",
    }
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.tar"]


def test_an_invalid_metadata_member_whose_name_is_not_utf8_fails_its_item(tmp_path: Path) -> None:
    members = [("caf\udce9.wav", b"1"), ("caf\udce9.json", b"{broken")]
    items = list(source(tmp_path / "x.tar", tar_of(members)).items())
    assert draft_table(items)["key"].to_pylist() == ["x/caf\\xe9"]
    with pytest.raises(ItemError, match=r"^sidecar caf\\xe9\.json is not valid JSON"):
        read_metadata(items[0])


@pytest.mark.parametrize("pattern", ["", "/*.tar"])
def test_a_tar_whose_name_is_not_utf8_is_refused(
    pattern: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    for name in ("a.tar", "caf\udce9.tar"):
        try:
            (tmp_path / name).write_bytes(tar_of([("one.wav", b"1")]))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError) as caught:
        list(WebDatasetSource(f"{tmp_path}{pattern}", AUDIO).items())
    assert r"caf\xe9.tar" in one_sentence(caught.value)


def test_links_and_devices_are_counted_and_left_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(b"secret")
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, kind in (
            ("soft.wav", tarfile.SYMTYPE),
            ("hard.wav", tarfile.LNKTYPE),
            ("null.wav", tarfile.CHRTYPE),
            ("pipe.wav", tarfile.FIFOTYPE),
            ("folder.wav", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("real.wav")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    found = source(tmp_path / "x.tar", target.getvalue())
    assert list(by_key(found)) == ["x/real"]
    assert found.ignored == {"links in tars": 2, "devices and other special members": 2}


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [4 << 30, 1000, 1 << 60])
def test_a_member_that_claims_too_much_fails_and_leaves_the_others(
    tmp_path: Path, size: int
) -> None:
    good = tar_of([("good.wav", b"1")])[:1024]
    data = good + header("huge.wav", size) + b"x" * 512
    found = source(tmp_path / "x.tar", data)
    items = by_key(found)
    assert read(items["x/good"]) == b"1"
    with pytest.raises(
        ItemError, match=rf"truncated or its header is wrong: only 512 of {size} bytes"
    ):
        read(items["x/huge"])
    assert found.ignored == {"tars without an end mark": 1}


def test_a_tar_that_was_cut_between_members_is_counted(tmp_path: Path) -> None:
    data = tar_of([("a.wav", b"1"), ("b.wav", b"2")])
    found = source(tmp_path / "x.tar", data[:1024])
    assert list(by_key(found)) == ["x/a"]
    assert found.ignored == {"tars without an end mark": 1}


def test_a_damaged_tar_is_refused_by_name(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
    long_name = info.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096
    first = tar_of([("a.wav", b"1")])[:1024]
    for data in (first + b"\xaa" * 2048, first + header("b.wav", 9)[:300], first + long_name):
        with pytest.raises(SourceError) as caught:
            by_key(source(tmp_path / "x.tar", data))
        assert f"{tmp_path}/x.tar is not a valid tar file" in one_sentence(caught.value)


def test_a_tar_with_odd_numbers_is_refused_by_name(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.wav")
        info.pax_headers = {"GNU.sparse.map": "x", "GNU.sparse.size": "y"}
        tar.addfile(info)
    huge = header("b.wav", 1 << 70)
    other = huge[:156] + b"Z" + huge[157:]  # a type that nobody knows, so its bytes are passed by
    other = other[:148] + b"%06o\0 " % (sum(other[:148]) + 256 + sum(other[156:])) + other[156:]
    for data in (target.getvalue(), other + bytes(1024)):
        with pytest.raises(SourceError) as caught:
            by_key(source(tmp_path / "x.tar", data))
        assert f"{tmp_path}/x.tar " in one_sentence(caught.value)


def test_a_name_with_brackets_is_a_name(tmp_path: Path, s3_bucket: str) -> None:
    for folder in (str(tmp_path), s3_bucket):
        uri = put(f"{folder}/in [1]/x[1].tar", tar_of([("a.wav", b"1")]))
        assert list(by_key(WebDatasetSource(uri, AUDIO))) == ["x[1]/a"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar"])
def test_compressed_tars_are_refused(
    tmp_path: Path, name: str, one_sentence: Callable[[BaseException], str]
) -> None:
    import gzip

    found = source(tmp_path / name, gzip.compress(tar_of([("a.wav", b"1")])))
    with pytest.raises(SourceError) as caught:
        by_key(found)
    assert "is compressed" in one_sentence(caught.value)


def test_braces_globs_and_folders(tmp_path: Path, one_sentence: Callable[..., str]) -> None:
    for number in range(12):
        put(f"{tmp_path}/d{number % 2}/s-{number:03d}.tar", tar_of([(f"{number}.wav", b"1")]))
    put(f"{tmp_path}/d0/notes.md", b"")

    def found(pattern: str) -> list[str]:
        return sorted(by_key(WebDatasetSource(f"{tmp_path}/{pattern}", AUDIO)))

    assert found("d0/s-{000..004..2}.tar") == ["s-000/0", "s-002/2", "s-004/4"]
    assert found("{d0,d1}/s-00[01].tar") == ["d0/s-000/0", "d1/s-001/1"]
    assert found("d1/*.tar") == [f"s-{n:03d}/{n}" for n in (1, 3, 5, 7, 9, 11)]
    assert found("d1/s-003.tar") == ["s-003/3"]
    assert len(found("")) == 12
    folder = WebDatasetSource(str(tmp_path), AUDIO)
    by_key(folder)
    assert folder.ignored == {".md": 1}
    with pytest.raises(SourceError) as caught:
        found("d0/s-{000..001}.tar")
    assert "s-001.tar does not exist" in one_sentence(caught.value)


@pytest.mark.parametrize("zeros", [0, 512, 20_480])
def test_tars_behind_each_other_are_all_read(tmp_path: Path, zeros: int) -> None:
    """As `cat a.tar b.tar c.tar` makes them, whatever the padding of each."""
    tars = [
        tar_of([(f"{name}.txt", name.encode()), (f"{name}.wav", name.encode() * 3)])
        for name in "abc"
    ]
    found = source(tmp_path / "x.tar", (bytes(zeros)).join(tars))
    items = by_key(found)
    assert {key: read(item) for key, item in items.items()} == {
        "x/a": b"aaa",
        "x/b": b"bbb",
        "x/c": b"ccc",
    }
    assert [json.loads(item.metadata) for item in items.values()] == [{"text": n} for n in "abc"]
    assert found.ignored == {}


def test_other_bytes_behind_a_tar_are_counted(tmp_path: Path) -> None:
    found = source(tmp_path / "x.tar", tar_of([("a.wav", b"1")]) + b"signature" * 100)
    assert list(by_key(found)) == ["x/a"]
    assert found.ignored == {"tars with other bytes after their end": 1}


@pytest.mark.parametrize("behind", [True, False])
def test_a_member_name_that_comes_twice_is_refused(
    tmp_path: Path, behind: bool, one_sentence: Callable[[BaseException], str]
) -> None:
    members = [("one/a.wav", b"1"), ("one/b.wav", b"2"), ("one/a.wav", b"3")]
    data = tar_of(members[:2]) + tar_of(members[2:]) if behind else tar_of(members)
    with pytest.raises(SourceError) as caught:
        by_key(source(tmp_path / "x.tar", data))
    text = one_sentence(caught.value)
    assert "several audio members with the key 'one/a'" in text
    assert "column" not in text


def test_apple_double_members_are_counted(tmp_path: Path) -> None:
    members = [("._a.wav", b"x"), ("a.wav", b"1"), ("__MACOSX/d/b.wav", b"x"), ("d/b.wav", b"2")]
    found = source(tmp_path / "x.tar", tar_of(members))
    assert list(by_key(found)) == ["x/a", "x/d/b"]
    assert found.ignored == {"files of macOS (._*, __MACOSX)": 2}


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{a,.}*.tar"])
def test_apple_double_files_beside_tars_are_counted(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "tars"
    (folder / "__MACOSX").mkdir(parents=True)
    (folder / "a.tar").write_bytes(tar_of([("a.wav", b"1")]))
    (folder / "._a.tar").write_bytes(b"\0\5\26\7")
    (folder / "__MACOSX" / "a.tar").write_bytes(b"\0\5\26\7")
    found = WebDatasetSource(f"{folder}{pattern}", ["wav"])
    assert list(by_key(found)) == ["a/a"]
    assert found.ignored == {"files of macOS (._*, __MACOSX)": 1 if pattern else 2}
