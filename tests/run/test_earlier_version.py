"""Stores of earlier versions, and what is done with them today.

Both were written right before a large change: fb5f60c before the modules moved into packages, of
the same encoding version as today, so it is resumed and extended with equal latents; 0badd19 before
that, of encoding version 1, so it is read, and continuing it is refused.

`store` has the first three songs, and `extended.parquet` is the shard that fb5f60c added for the
fourth. All are from mdct (hop 64) and the WAV files of `put`, whose ETags are in the plan.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from latentmill.errors import StoreError
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.in_process import encode

DATA = Path(__file__).parents[1] / "data"
MOVED, FIRST = "store-of-fb5f60c", "store-of-0badd19"
SOURCE = "s3://songs/a"


@pytest.fixture
def store(tmp_path: Path, s3_bucket: str, request: pytest.FixtureRequest) -> Path:
    del s3_bucket  # it starts the server; the plan has the name of another bucket
    fsspec.filesystem("s3").makedirs("songs", exist_ok=True)
    storage = Storage("s3://songs")
    for number in range(3):
        put(storage, number)
    return Path(shutil.copytree(DATA / request.param / "store", tmp_path / "store"))


def put(storage: Storage, number: int) -> None:
    samples = (np.arange(1500 + 500 * number) * (7 + number)) % 600 - 300
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.int16) * 30, 22050, format="WAV", subtype="PCM_16")
    storage.write(f"a/{number}.wav", file.getvalue())


def run_again(store: Path, **options: object) -> None:
    encode(
        SOURCE,
        store,
        model_options={"hop": 64, "sample_rate": 22050},
        chunk_samples=1024,
        unit_seconds=0.05,
        **options,
    )


def latents(shard: Path) -> dict[str, object]:
    """The latents of a shard by key, as pyarrow reads them."""
    table = pq.read_table(shard)
    return dict(zip(table["key"].to_pylist(), table["latent"].to_pylist(), strict=True))


@pytest.mark.parametrize("store", [MOVED, FIRST], indirect=True)
def test_they_are_read_and_verified(store: Path) -> None:
    opened = LatentStore(str(store), device="cpu")
    assert opened.sealed
    assert opened.complete
    assert list(opened.keys()) == ["0", "1", "2"]
    assert verify(opened, decode=3).faults == []


@pytest.mark.parametrize("store", [FIRST], indirect=True)
def test_another_encoding_version_is_not_continued(store: Path, inline: None) -> None:
    with pytest.raises(StoreError, match="encoding version 1, now 2"):
        run_again(store, extend=True)


@pytest.mark.parametrize("store", [MOVED], indirect=True)
def test_it_is_resumed_and_extended_with_equal_latents(store: Path, inline: None) -> None:
    # What a run leaves that was interrupted in its second unit.
    for path in (store / "dataset.json", *store.glob("index.*"), *store.glob("*/000001.*")):
        path.unlink()
    first = (store / "shards/000000.parquet").read_bytes()
    run_again(store)
    resumed = latents(store / "shards/000001.parquet")
    assert resumed == latents(DATA / MOVED / "store/shards/000001.parquet")
    put(Storage("s3://songs"), 3)
    run_again(store, extend=True)
    assert latents(store / "shards/000002.parquet") == latents(DATA / MOVED / "extended.parquet")
    assert (store / "shards/000000.parquet").read_bytes() == first
    opened = LatentStore(str(store), device="cpu")
    assert opened.complete
    assert list(opened.keys()) == ["0", "1", "2", "3"]
    assert verify(opened, decode=4).faults == []
