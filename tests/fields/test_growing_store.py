"""Fields from texts and latents of a store whose run has not ended, and their inputs by unit."""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import latentmill as lm
from latentmill.cli import show, show_status
from latentmill.engine import tasks
from latentmill.errors import StoreError
from latentmill.fields import base_rows
from latentmill.fields.base_rows import BaseRows
from latentmill.models.embedder import EmbedderSpec
from latentmill.run.run import RunSummary
from latentmill.storage.storage import Storage
from latentmill.store import metadata as metadata_file
from latentmill.store import store as stores
from latentmill.store.commit import iter_commits
from latentmill.store.store import LatentStore
from support import runs
from support.in_process import encode
from support.latent_store import latent_of, write_again, write_latents


class Lengths:
    """The number of letters of a text, or the number of frames of latents and their sum."""

    def __init__(self, taken: Any) -> None:
        self.spec = EmbedderSpec("lengths", "vector", taken, dimensions=2)

    def load(self, device: str) -> Lengths:
        del device
        return self

    def embed(self, values: Any) -> list[Any]:
        return [
            np.array([[len(v)], [0]] if isinstance(v, str) else [[v.shape[1]], [v.sum()]], "f")
            for v in values
        ]


def texts() -> Lengths:
    return Lengths("text")


def latents() -> Lengths:
    return Lengths("latents")


SOURCES = {"metadata:prompt": "texts", "latents": "latents"}


def add(store: Path, source: str = "metadata:prompt") -> RunSummary:
    model = f"python:{__name__}:{SOURCES[source]}"
    return lm.add(store, field="f", source=source, model=model, device="cpu", dtype="float32")


def stop_after(store: Path, songs: Path, units: int) -> None:
    """A store whose run was killed after some units."""
    encode(songs, store)
    (store / "dataset.json").unlink()
    for path in sorted((store / "commits").iterdir())[units:]:
        path.unlink()
        (store / "shards" / path.with_suffix(".parquet").name).unlink()


def status(store: Path) -> str:
    return show_status.status(show_status.StoreStatus.of(LatentStore(str(store))))


@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize("source", SOURCES)
def test_a_store_whose_run_has_not_ended(tmp_path: Path, source: str) -> None:
    songs, store = runs.write_songs(tmp_path / "songs", 4), tmp_path / "store"
    for number, path in enumerate(sorted(songs.rglob("*.wav"))):
        path.with_suffix(".json").write_text(json.dumps({"prompt": "x" * (number + 1)}))
    stop_after(store, songs, 2)
    summary = add(store, source)
    assert (summary.info.encoded, summary.waiting, summary.exit_code) == (2, 2, 0)
    assert "2 units of 4 not encoded in the store yet" in show.summary(summary)
    field = LatentStore(str(store / "fields/f"))
    assert not field.sealed
    assert len(field) == 2
    assert "2 items not encoded in the store yet" in status(store)
    again = add(store, source)
    assert (again.resumed_units, again.waiting) == (2, 2)
    encode(songs, store)
    assert "behind by 2 items: rerun the `latentmill add` command" in status(store)
    summary = add(store, source)
    assert (summary.info.encoded, summary.waiting, summary.resumed_units) == (4, 0, 2)
    runs.assert_whole(store / "fields/f")
    base = {record.key: record for record in LatentStore(str(store))}
    for record in LatentStore(str(store / "fields/f")):
        of = base[record.key]
        expected = (
            [len(of.metadata["prompt"]), 0]
            if source != "latents"
            else [of.latent.shape[1], of.latent.astype("f").sum()]
        )
        np.testing.assert_allclose(record.latent[:, 0], expected, rtol=1e-6)
    runs.write_songs(songs, 1, first=20)
    encode(songs, store, extend=True)
    (store / "commits/000004.json").unlink()
    assert add(store, source).waiting == 1  # the field keeps its seal of four items
    assert LatentStore(str(store / "fields/f")).info.items == 4


def test_a_store_that_has_no_unit_yet(tmp_path: Path) -> None:
    songs, store = runs.write_songs(tmp_path / "songs", 1), tmp_path / "store"
    stop_after(store, songs, 0)
    with pytest.raises(StoreError, match="has no encoded items yet"):
        add(store)


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
@pytest.mark.parametrize("allowed", [0, 2])
def test_metadata_is_read_unit_by_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, allowed: int
) -> None:
    """From row groups of the metadata file, or from the shard if they would have too many rows."""
    monkeypatch.setattr(metadata_file, "ROW_GROUP", 8)
    monkeypatch.setattr(base_rows, "KEPT_BYTES", 0)
    monkeypatch.setattr(base_rows, "ROWS_FOR_ONE", allowed)
    monkeypatch.setattr(base_rows, "FIRST_ROWS", 0)
    count, url = 42, str(tmp_path / "store")
    own = [{"prompt": f"text {number}", "n": number} for number in range(count)]
    write_latents(url, [4] * count, per_unit=5, metadata=own, format_name=format_name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"key": "item/00007", "prompt": "mine"}\n')
    lm.annotate(url, rows)
    expected = {f"item/{n:05d}": values for n, values in enumerate(own)}
    expected["item/00007"] = {"prompt": "mine", "n": 7}
    read, most = [], 0
    group = pq.ParquetFile.read_row_group

    def noted(self: Any, number: int, *args: Any, **options: Any) -> Any:
        read.append(number)
        return group(self, number, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    found: dict[str, Any] = {}
    reader = BaseRows(LatentStore(url))
    for commit in iter_commits(Storage(url)):
        found |= reader.metadata(commit)
        most = max(most, len(reader._kept))
    assert found == expected
    assert most == bool(read) == bool(allowed)
    # A unit that the seal does not have is read from its shard, with the annotations.
    made = [latent_of(number, 4) for number in range(count)]
    before = LatentStore(url)
    reader = BaseRows(before)
    assert before.info is not None
    write_again(url, [1], made)
    commits = {commit.unit: commit for commit in iter_commits(Storage(url))}
    assert reader.metadata(commits["000001"])["item/00007"]["prompt"] == "mine"


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_tasks_do_not_read_the_index_of_a_store_in_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    url, count = f"memory://{uuid.uuid4().hex}", 12
    own = [{"prompt": "x" * (number + 1)} for number in range(count)]
    write_latents(url, [4] * count, per_unit=5, metadata=own, format_name=format_name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"key": "item/00007", "prompt": "mine"}\n')
    lm.annotate(url, rows)

    def refuse(*args: Any) -> None:
        raise AssertionError("a file of all records is read")

    def in_tasks(task: Any, units: Any, address: str) -> Iterator[Any]:
        assert address == "auto"
        for unit in units:
            with monkeypatch.context() as patch:
                patch.setattr(base_rows, "metadata_of", refuse)
                patch.setattr(stores, "read_index", refuse)
                result = pickle.loads(pickle.dumps(task))(unit)
            yield result

    monkeypatch.setattr(tasks, "map_in_tasks", in_tasks)
    model = f"python:{__name__}:texts"
    options = {"model": model, "device": "cpu", "dtype": "float32", "address": "auto"}
    lm.add(url, field="f", source="metadata:prompt", **options)
    lengths = [int(record.latent[0, 0]) for record in LatentStore(f"{url}/fields/f")]
    assert lengths == [len("mine") if n == 7 else n + 1 for n in range(count)]
