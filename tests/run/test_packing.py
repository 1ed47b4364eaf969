"""A store is continued in the order in which it was planned; see `encoding/lanes.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill
from latentmill.config import load_config
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.lanes import PACKING
from latentmill.engine.job import make_job
from latentmill.engine.launch import _check_packing
from latentmill.errors import ConfigError
from latentmill.export.export import Target, export_store
from latentmill.models import registry
from latentmill.plan import PLAN_PATH, iter_keys, load
from latentmill.run.forecast import forecast
from latentmill.run.run import run
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commits
from latentmill.store.index import to_batch
from latentmill.store.verify import verify
from support.batch_model import HOP
from support.in_process import in_process, spoil, tone

CHUNK = 20 * HOP
# Lengths in samples: equal ones that meet only if they are sorted, and many very short ones.
LENGTHS = {
    "a": [3 * HOP],
    "b": [HOP - n % 2 * 2 for n in range(40)],
    "c": [10 * CHUNK, 10 * CHUNK],
    "d": [3 * HOP - 2],
}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for name, lengths in LENGTHS.items():
        for number, samples in enumerate(lengths):
            tone(tmp_path / "clips" / f"{name}{number:02}.wav", samples)
    return tmp_path / "clips"


def options(clips: Path, store: Path, **more: object) -> dict[str, object]:
    return {
        "source": str(clips),
        "out": str(store),
        "device": "cpu",
        "threads": 1,
        "model": "python:support.batch_model:BatchModel",
        "dtype": "float32",
        **more,
    }


def set_packing(store: Storage, packing: int | None) -> None:
    document = json.loads(store.read(PLAN_PATH))
    del document["packing"]
    if packing is not None:
        document["packing"] = packing
    store.write(PLAN_PATH, json.dumps(document).encode())


# The number of chunks in the batch of each item. 1 and 2 were computed by the versions that planned
# such stores. 3: all items of one length share a batch.
ROWS = {
    None: {"a": [1], "b": [16] * 32 + [8] * 8, "c": [2, 2], "d": [1]},
    2: {"a": [2], "b": [16] * 31 + [8] * 3 + [16] + [8] * 5, "c": [2, 2], "d": [2]},
    3: {"a": [2], "b": [40] * 40, "c": [2, 2], "d": [2]},
}


@pytest.mark.parametrize("packing", ROWS)
def test_a_store_keeps_the_batches_of_its_plan(
    clips: Path, tmp_path: Path, packing: int | None
) -> None:
    given = options(clips, tmp_path / "store")
    forecast(load_config(None, given), calibrated=False)
    store = Storage(str(tmp_path / "store"))
    assert json.loads(store.read(PLAN_PATH))["packing"] == PACKING == 3
    set_packing(store, packing)
    with in_process():
        run(load_config(None, given))
    encoded = latentmill.open(store.root)
    for name, expected in ROWS[packing].items():
        rows = [np.unique(encoded[f"{name}{n:02}"].latent) for n in range(len(expected))]
        assert np.array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
@pytest.mark.parametrize("probe", [True, False])
def test_records_lie_in_the_order_of_lengths_and_commits_in_that_of_the_plan(
    clips: Path, tmp_path: Path, probe: bool, format_name: str
) -> None:
    """Also if the plan does not know the lengths, and sizes mislead."""
    for path in sorted(clips.iterdir())[::3]:
        soundfile.write(path, soundfile.read(path)[0], 44100, subtype="DOUBLE")
    spoil(clips / "b07.wav")
    lengths = {f"{name}{n:02}": one for name, some in LENGTHS.items() for n, one in enumerate(some)}
    del lengths["b07"]
    expected = sorted(lengths, key=lambda key: (lengths[key], key))
    given = options(clips, tmp_path / "store", probe=probe, format=format_name)
    with in_process():
        run(load_config(None, given))
    store = Storage(str(tmp_path / "store"))
    (commit,) = read_commits(store).values()
    plan = load(store)
    assert plan is not None
    assert [item.key for item in commit.items] == list(iter_keys(store, plan))
    found = sorted((item for item in commit.items if item.row is not None), key=lambda i: i.row)
    assert [item.key for item in found] == expected != sorted(expected)
    offsets = [item.offset for item in found]
    assert offsets == sorted(offsets)
    encoded = latentmill.open(store.root)
    for key, samples in lengths.items():
        record = encoded[key]
        assert (record.key, record.num_samples) == (key, samples)
    assert not verify(encoded).faults
    export_store(encoded, str(tmp_path / "export"), Target("parquet"))
    copied = latentmill.open(tmp_path / "export")
    assert not verify(copied).faults
    for key in lengths:
        assert np.array_equal(copied[key].latent, encoded[key].latent)


def test_commits_of_earlier_versions_have_no_rows(clips: Path, tmp_path: Path) -> None:
    given = options(clips, tmp_path / "store")
    forecast(load_config(None, given), calibrated=False)
    store = Storage(str(tmp_path / "store"))
    set_packing(store, 2)
    with in_process():
        run(load_config(None, given))
    (commit,) = read_commits(store).values()
    assert [item.row for item in commit.items] == list(range(len(commit.items)))
    earlier = commit.model_copy(
        update={"items": [item.model_copy(update={"row": None}) for item in commit.items]}
    )
    assert to_batch(earlier) == to_batch(commit)


@pytest.mark.parametrize("packing", [1, None])
def test_load_tasks_cannot_load_item_after_item(
    clips: Path, tmp_path: Path, packing: int | None
) -> None:
    given = options(clips, tmp_path / "store")
    config = load_config(None, given)
    forecast(config, calibrated=False)
    store = Storage(str(tmp_path / "store"))
    handle = registry.resolve(config.model, config.model_options)
    for wanted in (PACKING, 2, packing):
        set_packing(store, wanted)
        plan = load(store)
        assert plan is not None
        job = make_job(
            config, handle, Chunking.for_model(handle.spec), plan, device="cpu", threads=1
        )
        assert job.settings.packing == plan.packing == (wanted or 1)
        if plan.packing > 1:
            _check_packing(plan, store)
    with pytest.raises(ConfigError, match=r"remove --load-tasks\.$"):
        _check_packing(plan, store)
