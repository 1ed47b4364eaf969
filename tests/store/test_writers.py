"""The contract of shard writers, for every format of `SHARD_FORMATS`."""

from __future__ import annotations

import json
import resource
import time
import typing
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_files import FORMATS, make_record
from webdataset.tariterators import base_plus_ext

from latentmill.record import Record, ShardFormat
from latentmill.store.formats import open_writer
from latentmill.store.tar import member_key
from latentmill.store.writers import Location
from support.open_files import open_files

each_format = pytest.mark.parametrize("name", FORMATS)

SHAPES = {
    "one frame": [(64, 1)],
    "many small": [(8, 3 + n) for n in range(50)],  # more than one row group of 16
    "mixed": [(64, 1), (64, 9000), (64, 2), (64, 20000), *[(64, 700)] * 25, (64, 1)],
    "one large": [(64, 60000)],
    "chunks": [(3, 64, 13), (1, 64, 13), (40, 64, 13)],
}
HARD_KEYS = [
    "plain",
    "v1.5 (live)",
    ".hidden",
    "a.b/c.d.e",
    "ends.",
    "100% real %2E",
    "été/東京 🎵",
    " spaces  everywhere ",
    "__meta__",
    "back\\slash:and*more?",
    "x" * 99,
    "x" * 150,
    "é" * 90,
    "/".join(["folder" * 20] * 4) + "/name",  # more than the 255 that ustar holds
    "../outside/../../name",
    "/absolute",
    "./here",
]


def latents(shapes: list[tuple[int, ...]], dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def write(name: str, path: Path, records: list[Record]) -> list[Location]:
    writer = open_writer(name, path, {"model": {"name": "tëst"}})
    for record in records:
        writer.add(record)
    return writer.close()


def stored_fields(name: str, path: Path, locations: list[Location]) -> list[dict]:
    if name == "parquet":
        return pq.read_table(path).drop_columns(["latent"]).to_pylist()
    data = path.read_bytes()
    return [json.loads(data[p.fields_offset :][: p.fields_length]) for p in locations]


@each_format
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_locations_point_at_the_latents_bytes(
    name: str, tmp_path: Path, shapes: list[tuple[int, ...]], dtype: str
) -> None:
    arrays = latents(shapes, dtype)
    # As the stitcher gives them (time-major) and as a user might (channels first).
    given = [np.asfortranarray(a) if n % 2 and a.ndim == 2 else a for n, a in enumerate(arrays)]
    records = [make_record(f"item {n}", array) for n, array in enumerate(given)]
    locations = write(name, tmp_path / "shard", records)
    data = (tmp_path / "shard").read_bytes()
    assert len(locations) == len(arrays)
    for array, place in zip(arrays, locations, strict=True):
        stored = data[place.offset : place.offset + place.length]
        assert stored == (array.transpose().tobytes() if array.ndim == 2 else array.tobytes())
        if array.ndim == 2:  # a frame is one contiguous range
            width = array.shape[0] * array.itemsize
            frame = array.shape[1] // 2
            assert stored[frame * width : (frame + 1) * width] == array[:, frame].tobytes()
    fields = stored_fields(name, tmp_path / "shard", locations)
    assert [tuple(f["shape"]) for f in fields] == [a.shape for a in arrays]
    assert {f["dtype"] for f in fields} == {dtype}


@each_format
def test_same_records_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        make_record(f"é{n}", latent, {"n": n})
        for n, latent in enumerate(latents([(64, 100 * n + 1) for n in range(40)], "float16"))
    ]
    write(name, tmp_path / "one", records)
    later = time.time() + 1000
    monkeypatch.setattr(time, "time", lambda: later)
    write(name, tmp_path / "other", records)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@each_format
@pytest.mark.parametrize("added", [0, 1, 40])
def test_an_aborted_file_is_gone(name: str, tmp_path: Path, added: int) -> None:
    writer = open_writer(name, tmp_path / "shard", {})
    for n in range(added):
        writer.add(make_record(str(n), np.ones((64, 100), np.float16)))
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@each_format
def test_an_aborted_file_takes_no_space_of_a_full_disk(name: str, tmp_path: Path) -> None:
    """An open file without a name does until it is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = open_writer(name, tmp_path / "shard", {})
    large = make_record("large", np.ones((64, 2000), np.float16))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.add(large)
            writer.close()
        writer.abort()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not open_files(tmp_path)


def test_the_names_of_formats_are_those_of_the_settings() -> None:
    assert set(FORMATS) == set(typing.get_args(ShardFormat))


@each_format
def test_no_records(name: str, tmp_path: Path) -> None:
    assert write(name, tmp_path / "shard", []) == []


@each_format
def test_fields_come_back(name: str, tmp_path: Path) -> None:
    metadata = {
        "title": "Été 東京 🎵",
        "nested": {"list": [1, 2.5, None, True, "\u2028"]},
        "half a surrogate pair": "\ud83d",
        "": "",
    }
    latent = np.ones((4, 3), np.float16)
    records = [make_record("with", latent, metadata), make_record("without", latent)]
    locations = write(name, tmp_path / "shard", records)
    first, second = stored_fields(name, tmp_path / "shard", locations)
    assert json.loads(first.pop("metadata")) == metadata
    assert json.loads(second["metadata"]) == {}
    assert first == {
        "key": "with",
        "shape": [4, 3],
        "dtype": "float16",
        "frames": 3,
        "channels": 4,
        "num_samples": 1000,
        "sample_rate": 22050,
        "source_uri": "/music/with.wav",
        "source_sample_rate": 48000,
        "source_channels": 2,
        "duration": 1000 / 22050,
        "content_hash": "xxh3:0123",
        "rms": 0.1234567890123,
        "peak": 0.5,
        "group": "song",
        "role": None,
        "levels": None,
    }


@each_format
def test_hard_keys(name: str, tmp_path: Path) -> None:
    arrays = [np.full((2, 3), n, np.float32) for n in range(len(HARD_KEYS))]
    records = [make_record(key, a) for key, a in zip(HARD_KEYS, arrays, strict=True)]
    locations = write(name, tmp_path / "shard", records)
    fields = stored_fields(name, tmp_path / "shard", locations)
    assert [f["key"] for f in fields] == HARD_KEYS
    data = (tmp_path / "shard").read_bytes()
    for array, place in zip(arrays, locations, strict=True):
        assert data[place.offset : place.offset + place.length] == array.T.tobytes()


parts = st.text(st.sampled_from("a.%/ é\\_2E"), min_size=1).filter(lambda key: key[-1] != "/")


@given(key=parts | st.sampled_from(HARD_KEYS))
def test_member_keys(key: str) -> None:
    member = member_key(key)
    assert unquote(member) == key
    assert base_plus_ext(member + ".npy") == (member, "npy")  # as webdataset splits it
    assert not member.startswith("/")
    assert not {".", ".."} & set(member.split("/"))
