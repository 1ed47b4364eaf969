"""One node of a cluster cannot start a worker, read the source or write the store."""

from __future__ import annotations

import math

import pytest

from latentmill.engine.scheduler import (
    LONGEST_RESTART_SECONDS,
    PLACE_SECONDS,
    RESTART_SECONDS,
    STORAGE_RETRY_SECONDS,
)
from latentmill.errors import (
    ConfigError,
    LatentmillError,
    SourceError,
    StorageError,
    UnitsFailedError,
)
from latentmill.plan import Unit
from support.fake_cluster import FakeCluster, Node

REFUSED = ConfigError("--device cuda is not available: use --device cpu.")
FULL = StorageError("Cannot write /tmp/latentmill-1: No space left on device.")
GONE = SourceError("Host bad cannot read any of the planned files of /music.")


def good(count: int) -> dict[str, Node]:
    return {f"good-{number}": Node() for number in range(count)}


@pytest.mark.parametrize("bad", [Node(start_error=REFUSED), Node(start_error=RuntimeError("CUDA"))])
def test_a_node_that_cannot_start_a_worker_leaves_the_units_to_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: Node
) -> None:
    cluster = FakeCluster({"bad": bad, **good(3)})
    cluster.run(monkeypatch, 30)
    assert cluster.done.keys() == good(3).keys()
    assert cluster.done.total() == 30
    assert caplog.messages[0].startswith("process 1 on bad: ")
    assert cluster.now < 30 + 11 * 100


def test_a_model_that_fails_on_one_node_before_its_first_unit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster({"bad": Node(origin_error=RuntimeError("CUDA error")), **good(2)})
    cluster.run(monkeypatch, 20)
    assert cluster.done.total() == 20
    assert cluster.losses == ["RuntimeError: CUDA error"] * 2  # the other worker gave the origin
    assert caplog.messages[0].endswith("loaded the model: RuntimeError: CUDA error.")


def test_an_option_that_every_worker_refuses_ends_the_run_with_its_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster({f"node-{number}": Node(start_error=REFUSED) for number in range(5)})
    with pytest.raises(ConfigError, match=rf"^process 1 on node-\d: {REFUSED}$"):
        cluster.run(monkeypatch, 30, workers=8)  # three of them wait for a node
    assert len(caplog.messages) == 1  # not one for each worker
    assert cluster.now < 10


def test_workers_that_die_while_they_load_the_model_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeCluster({"bad": Node(dies=True)})
    with pytest.raises(UnitsFailedError, match=r"^process 1 on bad: A worker died while it loaded"):
        cluster.run(monkeypatch, 30)


def test_a_worker_that_waits_for_a_node_does_not_delay_the_end_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeCluster({"bad": Node(unit_error=FULL), "worse": Node(unit_error=FULL)})
    with pytest.raises(StorageError):
        cluster.run(monkeypatch, 30, workers=3)
    assert cluster.now < PLACE_SECONDS + 100


@pytest.mark.parametrize("bad", [Node(start_error=REFUSED), Node(dies=True)])
def test_lost_nodes_are_replaced_although_a_worker_cannot_start_on_one(
    monkeypatch: pytest.MonkeyPatch, bad: Node
) -> None:
    cluster = FakeCluster(good(4))
    cluster.events[40] = lambda: cluster.nodes.update(bad=bad)
    for number in range(4):
        cluster.events[300 + 10 * number] = lambda number=number: cluster.replace(  # type: ignore[misc]
            f"good-{number}", f"fresh-{number}", Node()
        )
    before = []
    cluster.events[300 + 10 * RESTART_SECONDS] = lambda: before.append(cluster.ready)
    cluster.run(monkeypatch, 60)
    assert before == [4]
    assert cluster.done.total() == 60
    assert all(cluster.done[f"fresh-{number}"] > 5 for number in range(4))


@pytest.mark.parametrize("error", [FULL, GONE])
def test_a_node_that_cannot_read_or_write_leaves_the_units_to_the_others(
    monkeypatch: pytest.MonkeyPatch, error: LatentmillError
) -> None:
    bad = {f"bad-{number}": Node(load=1, unit_error=error) for number in range(8)}
    cluster = FakeCluster({**bad, **good(2)})
    cluster.run(monkeypatch, 40)
    assert cluster.done.keys() == good(2).keys()
    assert cluster.done.total() == 40
    tries = 1 + cluster.now // STORAGE_RETRY_SECONDS
    assert 0 < len(cluster.losses) <= 2 * 8 * tries  # two units at once
    assert all("bad" in reason for reason in cluster.losses)


@pytest.mark.parametrize("error", [FULL, GONE])
@pytest.mark.parametrize("workers", [1, 8])
def test_if_no_worker_can_read_or_write_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, error: LatentmillError, workers: int
) -> None:
    cluster = FakeCluster({f"bad-{number}": Node(unit_error=error) for number in range(workers)})
    with pytest.raises(type(error), match=str(error)):
        cluster.run(monkeypatch, 40)
    assert cluster.done.total() == 0
    assert cluster.now < 50


def test_a_worker_that_can_write_again_gets_units_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster({"bad": Node(unit_error=FULL), **good(1)})
    cluster.events[60] = lambda: setattr(cluster.nodes["bad"], "unit_error", None)
    cluster.run(monkeypatch, 40)
    assert len(cluster.losses) == 2
    assert cluster.done["bad"] > 10


@pytest.mark.parametrize("left", [1, 2, 10])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_a_disk_that_is_full_near_the_end_ends_the_run_with_its_error(
    monkeypatch: pytest.MonkeyPatch, workers: int, left: int
) -> None:
    cluster = FakeCluster(good(workers))
    units = 2 * workers + left

    def fill() -> None:
        if cluster.done.total() >= units - left:
            for node in cluster.nodes.values():
                node.unit_error = FULL

    for second in range(2000):
        cluster.events[second] = fill
    with pytest.raises(StorageError, match=str(FULL)):
        cluster.run(monkeypatch, units)


def test_a_write_that_fails_once_beside_a_worker_that_cannot_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Once(FakeCluster):
        def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
            super().unit_lost(unit, attempt, reason)
            self.nodes["good-0"].unit_error = None

    cluster = Once({"bad": Node(start_error=REFUSED), **good(1)})
    cluster.events[100] = lambda: setattr(cluster.nodes["good-0"], "unit_error", FULL)
    cluster.run(monkeypatch, 20)
    assert (cluster.done["good-0"], len(cluster.losses)) == (20, 1)


@pytest.mark.parametrize("seconds", [70, 90, 200])
def test_workers_that_refuse_late_one_after_the_other_end_the_run(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    cluster = FakeCluster({"bad-0": Node(start_error=REFUSED, start_seconds=seconds)})
    for number in range(1, 4):
        late = Node(start_error=REFUSED, start_seconds=seconds)
        cluster.events[(seconds - 5) * number] = lambda number=number, late=late: (  # type: ignore[misc]
            cluster.nodes.update({f"bad-{number}": late})
        )
    with pytest.raises(ConfigError, match=str(REFUSED)):
        cluster.run(monkeypatch, 20)


def test_a_worker_that_can_never_start_is_tried_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = FakeCluster({"bad": Node(start_error=REFUSED), **good(1)})
    cluster.run(monkeypatch, 150)
    assert cluster.now > 4 * LONGEST_RESTART_SECONDS
    doubling = math.log2(LONGEST_RESTART_SECONDS / RESTART_SECONDS) + 1
    # Each start is an actor; one is that of the good node.
    assert cluster.started <= 2 + doubling + cluster.now / LONGEST_RESTART_SECONDS
