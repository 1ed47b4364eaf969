"""What holds for every source: the same audio gives the same latents, keys, metadata, accounts."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.errors import LatentmillError, SourceError
from latentmill.models.families import mdct
from latentmill.record import Outcome, Record
from latentmill.sources.address import item_at
from latentmill.sources.base import Item
from latentmill.sources.reading import UnitReader
from support import hub_server
from support.hub_server import HubServer
from support.sources import KINDS, Recording, Written, put, recordings_in, sorted_items

MODEL = mdct.build(hop=64, sample_rate=8000).load("cpu")
CHUNKING = Chunking.for_model(MODEL.spec, seconds=0.5)
ON_S3 = ("folder", "webdataset", "parquet", "jsonl", "table")


def encode(items: Sequence[Item], settings: EncodeSettings | None = None) -> list[Outcome]:
    settings = settings or EncodeSettings(dtype="float32", batch_size=4, load_threads=3)
    encoder = UnitEncoder(MODEL, CHUNKING, settings)
    audio = LocalAudio(items, Loading(MODEL.spec, CHUNKING, settings), encoder.timings)
    with contextlib.closing(audio):
        return list(encoder.encode(audio))


def records(items: Sequence[Item]) -> dict[str, Record]:
    outcomes = encode(items)
    assert {one.key: one.reason for one in outcomes if one.record is None} == {}
    return {one.key: one.record for one in outcomes if one.record is not None}


@pytest.fixture(scope="module")
def recordings(corpus: Path) -> list[Recording]:
    return recordings_in(corpus, (".wav", ".flac", ".ogg", ".mp3", ".aiff"))


@pytest.fixture(scope="module")
def wanted(
    recordings: list[Recording], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Record]:
    """The records of the recordings as plain files, by name."""
    folder = KINDS["folder"](str(tmp_path_factory.mktemp("plain")), recordings)
    return records(sorted_items(folder.open()))


CASES = [(kind, "local") for kind in KINDS] + [(kind, "memory") for kind in KINDS]
CASES += [(kind, "s3") for kind in ON_S3]
CASES += [(kind, "hf") for kind in ("folder", "webdataset", "parquet")]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of our own with an empty dataset."""
    with hub_server.serve() as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.endpoint, "token": False})
        hub.create("org/corpus", private=False)
        yield hub


@pytest.fixture(params=CASES, ids="-".join)
def written(request: pytest.FixtureRequest, recordings: list[Recording], tmp_path: Path) -> Written:
    kind, storage = request.param
    if storage == "hf":
        hub = request.getfixturevalue("hub")
        local = KINDS[kind](f"{tmp_path}/in", recordings)
        for file in filter(Path.is_file, (tmp_path / "in").rglob("*")):
            hub.write("org/corpus", file.relative_to(tmp_path).as_posix(), file.read_bytes())
        options = {**local.options, "source_type": kind}
        served = local.uri.replace(str(tmp_path), "hf://datasets/org/corpus")
        return replace(local, uri=served, options=options)
    url = {"local": str(tmp_path / "in"), "memory": f"memory://{uuid.uuid4().hex}"}.get(storage)
    return KINDS[kind](url or request.getfixturevalue("s3_bucket") + "/in", recordings)


def test_the_same_audio_gives_the_same_latents(
    written: Written, wanted: dict[str, Record], recordings: list[Recording]
) -> None:
    source = written.open()
    items = sorted_items(source)
    assert sorted(written.keys.values()) == [item.key for item in items]
    assert dict(source.ignored) == written.ignored
    done = records(items)
    for one in recordings:
        found, plain = done[written.keys[one.name]], wanted[one.name]
        assert np.array_equal(found.latent, plain.latent)
        assert found.content_hash == plain.content_hash
        assert (found.num_samples, found.rms) == (plain.num_samples, plain.rms)
        assert dict(found.metadata) == one.metadata
        # The record says where its audio lies, exactly.
        place = item_at(found.source_uri)
        with UnitReader([place]) as reader, reader.open(place) as media:
            assert media.read_at(0, media.size) == one.data


LOCALLY = pytest.mark.parametrize(
    "written", [(kind, "local") for kind in KINDS], ids="-".join, indirect=True
)


def test_real_recordings_are_the_same_everywhere(shared_audio: Path, tmp_path: Path) -> None:
    """FLAC, Ogg Vorbis and AAC stems."""
    some: list[Recording] = []
    for folder, extension, count in (
        ("flac", ".flac", 6),
        ("ogg", ".ogg", 2),
        ("stems", ".m4a", 1),
    ):
        paths = (shared_audio / folder).rglob(f"*{extension}")
        smallest = sorted(paths, key=lambda path: path.stat().st_size)[:count]
        some += [Recording(p.stem, extension, p.read_bytes(), {"title": p.stem}) for p in smallest]
    plain = KINDS["folder"](str(tmp_path / "folder"), some)
    wanted = records(sorted_items(plain.open()))
    for kind in ("webdataset", "parquet", "csv"):
        written = KINDS[kind](str(tmp_path / kind), some)
        done = records(sorted_items(written.open()))
        for one in some:
            found = done[written.keys[one.name]]
            assert np.array_equal(found.latent, wanted[one.name].latent)
            assert found.metadata == wanted[one.name].metadata


@LOCALLY
def test_items_are_the_same_every_time(written: Written) -> None:
    source = written.open()
    first, ignored = sorted_items(source), dict(source.ignored)
    assert sorted_items(source) == first  # asked again
    assert dict(source.ignored) == ignored
    other = written.open()
    assert sorted_items(other) == first
    for item in first:
        assert isinstance(json.loads(item.metadata), dict)
        assert item.key == item.key.strip("/")
        item.key.encode()


@LOCALLY
def test_items_are_read_in_any_order(written: Written, wanted: dict[str, Record]) -> None:
    items = sorted_items(written.open())
    names = {key: name for name, key in written.keys.items()}
    for order in (items[::-1], items[1::2] + items[::2]):
        for key, record in records(order).items():
            assert record.content_hash == wanted[names[key]].content_hash


@LOCALLY
def test_a_group_comes_from_the_metadata_or_the_key(written: Written) -> None:
    by_field = sorted_items(written.open(group_by="metadata:title,bpm"))
    assert {item.group for item in by_field} == {f"Stück {n}" for n in range(len(by_field))}
    assert {item.role for item in by_field} == {str(60 + n) for n in range(len(by_field))}
    by_key = sorted_items(written.open(group_by=r"(?P<group>.*)/(?P<role>[^/]+)$"))
    assert [item.key for item in by_key] == [item.key for item in by_field]
    for item in by_key:
        folder, _, name = item.key.rpartition("/")
        assert (item.group or "", item.role or name) == (folder, name)
    record = records(by_field)[by_field[0].key]
    assert (record.group, record.role) == (by_field[0].group, by_field[0].role)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_refused(
    kind: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    written = KINDS[kind](str(tmp_path / "in"), [])
    with pytest.raises(SourceError) as caught:
        sorted_items(written.open())
    one_sentence(caught.value)
    gone = Written(f"{tmp_path}/gone{Path(written.uri).suffix}", {}, {}, written.options)
    with pytest.raises(SourceError) as caught:
        sorted_items(gone.open())
    assert "does not exist" in one_sentence(caught.value)


NAMES = {"webdataset": "a.tar", "parquet": "a.parquet", "table": "a.parquet"}
NAMES |= {"csv": "a.csv", "jsonl": "a.jsonl", "nemo": "a.json"}


@pytest.mark.parametrize("data", [b"", b"\xff\xfe nothing of the kind \0" * 200], ids=len)
@pytest.mark.parametrize("kind", NAMES)
def test_what_is_something_else_is_refused(
    kind: str, data: bytes, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    uri = put(f"{tmp_path}/{NAMES[kind]}", data)
    with pytest.raises(LatentmillError) as caught:
        sorted_items(Written(uri, {}, {}, {}).open())
    assert NAMES[kind] in one_sentence(caught.value)


CHANGED = ["folder", "webdataset", "parquet"]
CONTAINER_CHANGED = "has changed since it was listed: `encode --extend --retry-changed`"


@pytest.mark.parametrize("storage", ["local", "s3"])
@pytest.mark.parametrize("kind", CHANGED)
def test_what_changed_after_the_plan_fails(
    kind: str,
    storage: str,
    recordings: list[Recording],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    url = str(tmp_path) if storage == "local" else request.getfixturevalue("s3_bucket") + "/in"
    items = sorted_items(KINDS[kind](url, recordings[:2]).open())
    swapped = [
        Recording(one.name, one.extension, other.data + b"\0", one.metadata)
        for one, other in zip(recordings[:2], recordings[1::-1], strict=True)
    ]
    KINDS[kind](url, swapped)
    reason = "changed since the plan was made" if kind == "folder" else CONTAINER_CHANGED
    for outcome in encode(items):
        assert outcome.status == "failed"
        assert reason in (outcome.reason or "")
    # A whole file is its item, whatever it contains now; a position can be that of another item.
    retried = EncodeSettings(dtype="float32", batch_size=4, allow_changed=True)
    for outcome in encode(items, retried):
        assert outcome.status == ("encoded" if kind == "folder" else "failed")
        assert kind == "folder" or reason in (outcome.reason or "")
