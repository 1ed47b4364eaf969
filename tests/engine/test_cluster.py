"""Which Ray a run uses, what it reserves there, and what is left when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from latentmill.config import load_config
from latentmill.engine.actor import ActorShape
from latentmill.engine.cluster import (
    Cluster,
    _check_home,
    _check_temporary_folder,
    _init,
    connect,
)
from latentmill.engine.launch import _device, _load_threads, _resources
from latentmill.errors import ConfigError
from support import runs

NODES = st.lists(st.integers(0, 128), min_size=1, max_size=8)


def config(**options: object):
    return load_config(None, {"source": "a", "out": "b", **options})


def test_a_ray_that_runs_already_is_used_and_left_running(ray_session: Path) -> None:
    before = ray.get_runtime_context().get_job_id()
    with connect(None) as cluster:
        assert not cluster.embedded
        assert sum(cluster.node_cpus) >= 1
    assert ray.get_runtime_context().get_job_id() == before


@pytest.mark.parametrize("slow", [2, 3])
def test_ray_is_started_again_if_the_machine_is_too_busy(
    slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter(range(100))

    def init(**_: object) -> None:
        if next(starts) < slow:
            raise Exception("The current node timed out during startup. This could")

    monkeypatch.setattr(ray, "init", init)
    if slow == 2:
        _init(None, 1)
    else:
        with pytest.raises(Exception, match="timed out"):
            _init(None, 1)
    assert next(starts) == 3


def test_an_embedded_ray_is_started_and_stopped_and_says_nothing(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 2)
    (gate := tmp_path / "hold").touch()  # the model waits until this file is gone
    args = ["encode", songs, tmp_path / "store", "--device", "cpu", "--workers", "1", "--json"]
    model = ["--model", runs.SLOW_MODEL, "--model-option", f"hold={gate}"]
    with runs.started(*args, *model) as process:
        runs.until(lambda: bool(runs.actors(process.pid)) or process.poll() is not None, "an actor")
        family = runs.descendants(process.pid)
        gate.unlink()
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert any("raylet" in name for name in family.values())
    ours = [pid for pid, name in family.items() if "Agent" not in name]
    runs.until(lambda: not any(map(runs.alive, ours)), "what the run has started has ended")
    assert runs.outcome(runs.Result(0, out, err))["exit_code"] == 0
    assert len(out.splitlines()) == 1
    lines = [line for line in err.splitlines() if not line.startswith("Ray did not start in time")]
    first, *others = lines
    assert first == "2 items; starting the workers"
    assert all("items, " in line and " h of audio, " in line for line in others), err
    runs.assert_whole(tmp_path / "store")


def test_a_cluster_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    sentence = (
        r"Cannot connect to Ray at 127\.0\.0\.1:1 .* the address, and that the cluster is run"
    )
    with pytest.raises(ConfigError, match=sentence), connect("127.0.0.1:1"):
        pass


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 1)
    result = runs.command("encode", songs, tmp_path / "store", "--address", "127.0.0.1:1")
    assert result.code == 2
    assert "Cannot connect to Ray at 127.0.0.1:1" in result.err.splitlines()[-1]
    assert "check the address, and that the cluster is running" in result.err


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def full_disk(folder: Path) -> Path:
    """A file system without a free byte; only root can make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    return folder


UNUSABLE = ("file", "missing", "read-only", "full", "long", "relative")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR", "HOME"])
@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.skipif(sys.platform != "linux", reason="TMPDIR counts on Linux only")
def test_a_folder_that_ray_cannot_use_is_named_before_it_starts(
    name: str, kind: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = short_path / "file"
    file.touch()
    folder = {
        "file": file,
        "missing": Path("/proc/missing"),
        "read-only": Path("/sys"),
        "full": short_path / "full",
        "long": short_path / ("x" * 100),
        "relative": Path("relative"),
    }[kind]
    if kind == "full":
        full_disk(folder)
    for variable in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.chdir(short_path)
    monkeypatch.setenv(name, str(folder))
    try:
        if name == "HOME" and kind in ("long", "relative"):  # no socket lies there
            _check_home()
            return
        with pytest.raises(ConfigError) as caught:
            _check_temporary_folder()
            _check_home()
    finally:
        if kind == "full":
            subprocess.run(["umount", str(folder)], check=True)
    text = str(caught.value)
    assert text.startswith(f"Ray cannot start: {name}={folder} ")
    assert f"Set {'HOME' if name == 'HOME' else 'RAY_TMPDIR'} to a writable folder" in text
    assert {"full": "No space left on device", "long": "bytes too long"}.get(kind, "(") in text


def test_a_home_that_has_a_token_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/missing")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    _check_home()


@pytest.mark.slow
def test_the_command_names_the_variable(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 1)
    folder = str(tmp_path / ("x" * 100))
    result = runs.command("encode", songs, tmp_path / "store", RAY_TMPDIR=folder)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("latentmill: Ray cannot start: RAY_TMPDIR=")


@given(
    cpus=NODES.filter(any),
    workers=st.none() | st.integers(1, 40),
    threads=st.none() | st.integers(1, 64),
)
def test_ray_can_place_all_workers_on_cpus(
    cpus: list[int], workers: int | None, threads: int | None
) -> None:
    cluster = Cluster(embedded=True, node_cpus=tuple(cpus), node_gpus=(0,) * len(cpus))
    wanted = config(workers=workers, threads=threads)
    resources = _resources(wanted, cluster, on_gpu=False)
    assert resources.workers == workers or workers is None
    assert resources.shape.gpus == 0
    assert placed(resources.shape.cpus, cpus) >= resources.workers
    if workers is None and max(cpus) >= resources.threads:  # no cores beyond those there are
        assert resources.shape.cpus == resources.threads


@pytest.mark.parametrize(
    ("workers", "threads", "cpus"), [(None, None, 4), (8, None, 4), (None, 16, 16), (8, 2, 2)]
)
def test_a_head_without_cores_runs_no_workers(
    workers: int | None, threads: int | None, cpus: int
) -> None:
    """An actor that asks for no cores is placed on the head, also once other nodes are there."""
    cluster = Cluster(embedded=False, node_cpus=(0,), node_gpus=(0,))
    resources = _resources(config(workers=workers, threads=threads), cluster, on_gpu=False)
    assert resources.workers == (workers or 1)
    assert (resources.shape, resources.threads) == (ActorShape(cpus=cpus, gpus=0), cpus)


@given(gpus=NODES.filter(any), workers=st.none() | st.integers(1, 200), cpus=st.integers(1, 64))
def test_ray_can_place_all_workers_on_gpus(gpus: list[int], workers: int | None, cpus: int) -> None:
    cluster = Cluster(embedded=False, node_cpus=(cpus,) * len(gpus), node_gpus=tuple(gpus))
    resources = _resources(config(workers=workers), cluster, on_gpu=True)
    assert resources.workers == (workers or sum(gpus))
    assert 0 < resources.shape.gpus <= 1
    assert placed(resources.shape.gpus, gpus) >= resources.workers


def placed(share: float, node_units: list[int]) -> int:
    """How many actors Ray places, which gives an actor a share of one unit or whole units."""
    if share == 0:
        return 10**9
    if share < 1:
        return sum(units * int(1 / share) for units in node_units)
    return sum(int(units // share) for units in node_units)


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "threads"),
    [
        ((16,), (1,), 1.0, 16),
        ((16,), (1,), 0.5, 8),
        ((96, 16), (8, 2), 1.0, 8),  # the node with the fewest cores for each GPU
        ((64,), (1,), 1.0, 16),
        ((4, 2), (0, 2), 1.0, 2),
        ((16,), (0,), 1.0, 2),  # an autoscaler will add the GPUs
        ((16,), (1,), 0.0, 2),  # the model works on the CPU
    ],
)
def test_a_gpu_is_fed_by_its_share_of_the_cores(
    cpus: tuple[int, ...], gpus: tuple[int, ...], share: float, threads: int
) -> None:
    shape = ActorShape(cpus=0, gpus=share)
    assert _load_threads(Cluster(False, cpus, gpus), shape) == threads


def test_devices() -> None:
    with_gpu, without = Cluster(True, (8,), (2,)), Cluster(True, (8,), (0,))
    assert _device(config(), with_gpu) == "cuda"
    assert _device(config(), without) == "cpu"
    assert _device(config(device="cpu"), with_gpu) == "cpu"
    with pytest.raises(ConfigError, match="Ray has no GPUs"):
        _device(config(device="cuda"), without)
    with pytest.raises(ConfigError, match="Ray chooses the GPUs"):
        _device(config(device="cuda:1"), with_gpu)
