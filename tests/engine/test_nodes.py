"""Several real Ray nodes: one joins, one dies, an actor dies, then the driver, and the head."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from latentmill.run.run import encode
from support import nodes, runs

SONGS = 40


@pytest.fixture
def cluster() -> Iterator[nodes.Nodes]:
    cluster = nodes.Nodes()
    yield cluster
    cluster.shutdown()


def wait_for(store: Path, units: int, driver: subprocess.Popen[str]) -> None:
    """Wait until so many more units are committed."""
    before = len(list(store.glob("commits/*.json")))

    def there() -> bool:
        if driver.poll() is not None:
            pytest.fail(f"the driver ended: {driver.communicate()}")
        return len(list(store.glob("commits/*.json"))) >= before + units

    runs.until(there, f"{units} more units are committed")


def started(
    songs: Path, store: Path, cluster: nodes.Nodes
) -> AbstractContextManager[subprocess.Popen[str]]:
    arguments = nodes.arguments(songs, store, cluster.address, 1.0)
    return runs.started(*arguments, **nodes.environment())


@pytest.mark.slow  # test_kill.py: a driver and an actor; test_simulate.py: nodes that go and come
@pytest.mark.parametrize("head", [False, True])
def test_a_store_survives_its_cluster(
    cluster: nodes.Nodes, tmp_path: Path, ray_session: Path, head: bool
) -> None:
    """With `head`, that dies too, which the driver notices after 40 s."""
    songs = runs.write_songs(tmp_path / "songs", SONGS, 2.0)
    undisturbed = tmp_path / "undisturbed"
    options = {"model": runs.SLOW_MODEL, "unit_seconds": 4.0, "batch_size": 1}
    encode(str(songs), str(undisturbed), device="cpu", **options)
    store = tmp_path / "store"
    first = cluster.add()
    with started(songs, store, cluster) as driver:
        wait_for(store, 2, driver)
        cluster.add()  # joins while the run goes
        second = cluster.workers[-1]
        runs.until(lambda: bool(cluster.actors(second)), "the second node has an actor")
        cluster.kill_node(first)
        wait_for(store, 3, driver)
        for pid in cluster.actors(second):
            os.kill(pid, signal.SIGKILL)
        wait_for(store, 3, driver)
        driver.kill()
    assert not (store / "dataset.json").exists()
    kept = runs.commits(store)
    if head:
        with started(songs, store, cluster) as driver:
            wait_for(store, 2, driver)
            cluster.kill_head()
            _, err = driver.communicate(timeout=runs.PATIENCE_SECONDS)
            assert driver.returncode == 9, err
            assert "The head of the Ray cluster is gone: start the cluster again" in err
        kept |= runs.commits(store)
        cluster.start_head()
        cluster.add()
    result = runs.command(
        *nodes.arguments(songs, store, cluster.address, 0.0), **nodes.environment()
    )
    assert result.code == 0, result.err
    assert kept.items() <= runs.commits(store).items()
    runs.assert_whole(store)
    assert runs.latents(store) == runs.latents(undisturbed)
