"""A store written before the modules moved into packages (0badd19), and what is done with it today.

It is read and verified. It is of encoding version 1, so continuing it is refused; with that version
set, it is resumed and extended with equal latents: for these files nothing else has changed.

`store` has the first three songs, and `extended.parquet` is the shard that 0badd19 added for the
fourth. Both are from mdct (hop 64) and the WAV files of `put`, whose ETags are in the plan.
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

from latentmill import config
from latentmill.encoding import fingerprint
from latentmill.errors import StoreError
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.in_process import encode

DATA = Path(__file__).parents[1] / "data" / "store-of-0badd19"
SOURCE = "s3://songs/a"


@pytest.fixture
def store(tmp_path: Path, s3_bucket: str) -> Path:
    del s3_bucket  # it starts the server; the plan has the name of another bucket
    fsspec.filesystem("s3").makedirs("songs", exist_ok=True)
    storage = Storage("s3://songs")
    for number in range(3):
        put(storage, number)
    return Path(shutil.copytree(DATA / "store", tmp_path / "store"))


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


def test_it_is_read_and_verified(store: Path) -> None:
    opened = LatentStore(str(store), device="cpu")
    assert opened.sealed
    assert opened.complete
    assert list(opened.keys()) == ["0", "1", "2"]
    assert verify(opened, decode=3).faults == []


def test_it_is_resumed_and_extended_with_equal_latents(
    store: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="encoding version 1, now 2"):
        run_again(store, extend=True)
    for module in (config, fingerprint):
        monkeypatch.setattr(module, "ENCODING_VERSION", 1)
    # What a run leaves that was interrupted in its second unit.
    for name in ("dataset.json", "index.arrow", "commits/000001.json", "shards/000001.parquet"):
        (store / name).unlink()
    first = (store / "shards/000000.parquet").read_bytes()
    run_again(store)
    resumed = latents(store / "shards/000001.parquet")
    assert resumed == latents(DATA / "store/shards/000001.parquet")
    put(Storage("s3://songs"), 3)
    run_again(store, extend=True)
    assert latents(store / "shards/000002.parquet") == latents(DATA / "extended.parquet")
    assert (store / "shards/000000.parquet").read_bytes() == first
    opened = LatentStore(str(store), device="cpu")
    assert opened.complete
    assert list(opened.keys()) == ["0", "1", "2", "3"]
    assert verify(opened, decode=4).faults == []
