"""Stores and fields without origin.npy, such as partial copies: the same command writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.models.embedder import EmbedderSpec
from latentmill.run.add import run_add
from latentmill.run.run import RunSummary
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify
from support import runs
from support.fields import added, given, write_import
from support.in_process import encode

OPTIONS: dict[str, Any] = {"device": "cpu", "threads": 1, "chunk_seconds": 0.5}


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    return runs.write_songs(tmp_path / "songs", 2)


def lose_origin(store: Path) -> dict[str, tuple[int, bytes]]:
    """Remove origin.npy; the files that the store had, with their times."""
    files = {
        str(path.relative_to(store)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in store.rglob("*")
        if path.is_file()
    }
    (store / "origin.npy").unlink()
    assert not LatentStore(str(store)).complete
    (fault,) = verify(open_store(str(store))).faults
    assert fault == (
        "origin.npy is missing or damaged: delete it and run the same encode command again"
    )
    return files


def assert_restored(store: Path, before: dict[str, tuple[int, bytes]], result: RunSummary) -> None:
    """Nothing but the origin was written, and it is the same one."""
    assert result.resumed_units == result.units
    assert (store / "origin.npy").read_bytes() == before["origin.npy"][1]
    for name in before.keys() - {"origin.npy", ".lock"}:
        path = store / name
        assert (path.stat().st_mtime_ns, path.read_bytes()) == before[name], name
    assert LatentStore(str(store)).complete
    runs.assert_whole(store)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("gone", [False, True])
def test_encode_writes_it_also_without_the_source(songs: Path, tmp_path: Path, gone: bool) -> None:
    store = tmp_path / "store"
    encode(songs, store)
    before = lose_origin(store)
    if gone:
        songs.rename(tmp_path / "elsewhere")
    assert_restored(store, before, encode(songs, store))


@pytest.mark.usefixtures("inline")
def test_add_writes_that_of_a_field(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From audio, from latents, and imported."""
    store = tmp_path / "store"
    encode(songs, store)
    spec = EmbedderSpec("one", "vector", "latents", 1)
    model = given(monkeypatch, spec, lambda latent: latent.mean(keepdims=True) + 7)
    values = write_import(tmp_path / "v.jsonl", {"album 1/song 01": [1.0]})

    def embedded() -> RunSummary:
        options = {"model": model, "device": "cpu"}
        return run_add(str(store), "embedded", options, source="latents")

    def imported() -> RunSummary:
        return lm.add(store, field="imported", source=str(values))

    for name, add in (
        ("second", lambda: added(store)),
        ("embedded", embedded),
        ("imported", imported),
    ):
        add()
        field = store / "fields" / name
        before = lose_origin(field)
        assert_restored(field, before, add())
    assert np.load(store / "fields" / "embedded" / "origin.npy").all()


@pytest.mark.usefixtures("inline")
def test_one_pass_writes_both(songs: Path, tmp_path: Path) -> None:
    store, field = tmp_path / "store", tmp_path / "store/fields/second"
    fields = {"second": {"model": "mdct", "model_options": {"hop": 100, "sample_rate": 16000}}}
    encode(songs, store, with_fields=fields)
    of_field, of_store = lose_origin(field), lose_origin(store)
    result = encode(songs, store, with_fields=fields)
    assert_restored(field, of_field, result.fields["second"])
    assert (store / "origin.npy").read_bytes() == of_store["origin.npy"][1]
    runs.assert_whole(store)


@pytest.mark.usefixtures("ray_session")
def test_a_worker_of_ray_computes_it(songs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    lm.encode(songs, store, model="mdct", workers=1, **OPTIONS)
    before = lose_origin(store)
    assert_restored(store, before, lm.encode(songs, store, model="mdct", workers=1, **OPTIONS))
