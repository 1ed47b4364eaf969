"""`add --from` on a Ray cluster of two nodes: its units are computed in tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import latentmill as lm
from latentmill.store.store import open_store
from support import nodes, runs
from support.in_process import encode, in_process
from support.tiny_encoders import write_t5


@pytest.fixture
def cluster() -> Iterator[nodes.Nodes]:
    cluster = nodes.Nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.slow  # tests/fields/test_add_values.py pickles what a task is given, without Ray
def test_texts_are_embedded_on_the_nodes_of_a_cluster(
    cluster: nodes.Nodes, tmp_path: Path, ray_session: Path
) -> None:
    songs, store = runs.write_songs(tmp_path / "songs", 12), tmp_path / "store"
    for number, path in enumerate(sorted(songs.rglob("*.wav"))):
        path.with_suffix(".json").write_text(json.dumps({"prompt": "piano " * (number + 1)}))
    write_t5(tmp_path / "t5")
    model = f"t5:{tmp_path / 't5'}"
    options = {"source": "metadata:prompt", "model": model, "device": "cpu"}
    with in_process():
        encode(songs, store)
        lm.add(store, field="alone", precision="float32", **options)  # type: ignore[arg-type]
    cluster.add()
    cluster.add()
    given = ["add", str(store), "--field=text", "--from=metadata:prompt", f"--model={model}"]
    given += ["--precision=float32", "--address", cluster.address, "--json"]
    with runs.started(*given, **nodes.environment()) as driver:
        out, err = driver.communicate()
    assert driver.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["info"]["encoded"] == 12
    alone, found = (
        {one.key: one.latent for one in open_store(str(store / "fields" / name))}
        for name in ("alone", "text")
    )
    assert alone.keys() == found.keys()
    assert all(np.array_equal(alone[key], found[key]) for key in alone)
    workers = {commit.worker for commit in open_store(str(store / "fields/text")).commits.values()}
    assert len(workers) == 2  # each node has one core
    assert not any(worker.endswith(f":{driver.pid}") for worker in workers)
