"""Listings folder by folder: every file once, in its own folder, without holding the others."""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import SourceError
from latentmill.sources.files import Place
from latentmill.sources.listing import Entry, by_folder, folders
from latentmill.storage import client_listing, object_listing, objects
from latentmill.storage.client_listing import Listed
from latentmill.storage.object_listing import has_pages
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3

NAMES = st.sampled_from(["a", "b", "a b", "a-", "é", "音", "a.wav", "0", ""])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "bucket/" + "/".join(parts))


def test_only_buckets_whose_keys_are_in_order_are_read_by_pages(s3_bucket: str) -> None:
    place = Place(f"{s3_bucket}/m")
    assert has_pages(place.fs, place.path)
    place.path = "express--use1-az4--x-s3/m"
    assert not has_pages(place.fs, place.path)
    assert not has_pages(Place("memory://bucket/m").fs, "/bucket/m")


@given(st.sets(PATHS))
def test_every_file_is_in_its_folder_once(paths: set[str]) -> None:
    paths = {path for path in paths if not path.endswith("/")}
    ordered = sorted(paths, key=lambda path: path.encode())
    wanted: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        wanted[posixpath.dirname(path)].add(path)
    found = list(by_folder((path, Entry(1)) for path in ordered))
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted.values()))


def test_a_folder_is_given_as_soon_as_it_is_over() -> None:
    taken = 0

    def objects() -> Iterator[tuple[str, Entry]]:
        nonlocal taken
        for folder in range(100):
            for file in range(10):
                taken += 1
                yield f"bucket/{folder:03}/{file}.wav", Entry(1)

    for number, files in enumerate(by_folder(objects()), start=1):
        assert len(files) == 10
        assert taken <= 10 * number + 1


def test_that_something_is_a_folder_is_known_without_listing_it(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("s3")
    for number in range(3):
        files.pipe_file(f"{s3_bucket}/m/{number}.wav", b"")
    place = Place(f"{s3_bucket}/m")
    asked: list[dict[str, Any]] = []
    real = type(place.fs)._call_s3

    async def call(self: Any, method: str, *more: Any, **request: Any) -> Any:
        if method == "list_objects_v2":
            asked.append(request)
        return await real(self, method, *more, **request)

    monkeypatch.setattr(type(place.fs), "_call_s3", call)
    assert place.kind() == "folder"
    assert [request["MaxKeys"] for request in asked] == [1]
    assert Place(f"{s3_bucket}/m/0.wav").kind() == "file"
    assert Place(f"{s3_bucket}/nothing").kind() == "nothing"
    with faulty_s3(Faults(deny=lambda method, path: method == "HEAD")):
        assert Place(f"{s3_bucket}/m").kind() == "folder"  # it may be listed
    with (
        faulty_s3(Faults(deny=lambda method, path: True)),
        pytest.raises(SourceError, match="cannot be listed"),
    ):
        Place(f"{s3_bucket}/m").kind()


def test_a_bucket_is_listed_page_by_page(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(objects.SWITCH, "0")
    files = fsspec.filesystem("s3")
    keys = [f"m/{n % 5}/{n}.wav" for n in range(20)] + ["m/top.wav", "m/1/deep/x.wav", "mm/no.wav"]
    for number, key in enumerate(keys):
        files.pipe_file(f"{s3_bucket}/{key}", b"x" * number)
    place = Place(f"{s3_bucket}/m")
    call, pages = place.fs.call_s3, []

    def small_pages(method: str, **request: Any) -> Any:
        pages.append(request)
        return call(method, **request, MaxKeys=3)

    monkeypatch.setattr(place.fs, "call_s3", small_pages)
    monkeypatch.setattr(place.fs, "req_kw", {"RequestPayer": "requester"})
    found = list(folders(place, Counter()))
    assert len(pages) == -(-22 // 3)
    assert {page["RequestPayer"] for page in pages} == {"requester"}
    bucket = s3_bucket.removeprefix("s3://")
    everything = {path: entry for group in found for path, entry in group.items()}
    assert {path: entry.size for path, entry in everything.items()} == {
        f"{bucket}/{key}": number for number, key in enumerate(keys[:-1])
    }
    for group in found:
        assert len({posixpath.dirname(path) for path in group}) == 1
    for path, entry in everything.items():
        assert entry.version == files.info(path)["ETag"].strip('"')


def listed(url: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Entry]]:
    """What obstore lists, and how many objects s3fs lists then; checks that s3fs lists the same."""
    monkeypatch.setenv(objects.SWITCH, "0")
    wanted = list(folders(Place(url), Counter()))
    monkeypatch.delenv(objects.SWITCH)
    assert [dict(group) for group in folders(Place(url), Counter())] == wanted
    return [dict(group) for group in wanted]


def test_obstore_lists_as_s3fs_does(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(object_listing, "PAGE", 4)
    files = fsspec.filesystem("s3")
    names = ["a b.wav", "é/音.wav", "%41+&?#.wav", "deep/er/x.wav", "a-.wav", "a/b.wav", "a.wav"]
    for number, name in enumerate(names):
        files.pipe_file(f"{s3_bucket}/m/{name}", b"x" * (number + 1))
    files.pipe_file(f"{s3_bucket}/mm/other.wav", b"x")
    rest: list[str] = []
    real = client_listing.REST["s3"]

    def counted(fs: Any, path: str, last: str) -> Iterator[Listed]:
        rest.append(last)
        return real(fs, path, last)

    monkeypatch.setitem(client_listing.REST, "s3", counted)
    found = listed(f"{s3_bucket}/m", monkeypatch)
    assert sum(map(len, found)) == len(names)
    assert rest == [""]  # with obstore switched off
    files.pipe_file(f"{s3_bucket}//m/apart.wav", b"x")  # not in the folder `m`
    (apart,) = listed(f"{s3_bucket}//m", monkeypatch)
    assert list(apart) == [f"{s3_bucket.removeprefix('s3://')}//m/apart.wav"]
    # Markers of folders and names that obstore does not support are left to s3fs.
    files.pipe_file(f"{s3_bucket}/m/n/", b"")
    files.pipe_file(f"{s3_bucket}/m/n/empty.wav", b"")
    files.pipe_file(f"{s3_bucket}/m/o//p.wav", b"x")
    rest.clear()
    found = listed(f"{s3_bucket}/m", monkeypatch)
    assert sum(map(len, found)) == len(names) + 2
    assert len(rest) == 2
    assert listed(f"{s3_bucket}/nothing", monkeypatch) == []


def test_listing_with_obstore_is_retried_and_fails_as_with_s3fs(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(object_listing, "PAGE", 2)
    files = fsspec.filesystem("s3")
    for number in range(7):
        files.pipe_file(f"{s3_bucket}/m/{number}.wav", b"x")
    monkeypatch.delitem(client_listing.REST, "s3")
    with faulty_s3(Faults(errors=0.5, seed=4)) as faults:
        found = list(folders(Place(f"{s3_bucket}/m"), Counter()))
    assert sum(map(len, found)) == 7
    assert faults.seen["error"]
    monkeypatch.undo()
    for switch in ("0", "1"):
        monkeypatch.setenv(objects.SWITCH, switch)
        with faulty_s3(Faults(deny=lambda method, path: True)):
            place = Place(f"{s3_bucket}/m")
            with pytest.raises(SourceError, match="cannot be listed: AccessDenied"), place.errors():
                list(folders(place, Counter()))
