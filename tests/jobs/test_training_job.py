"""jobs/train_linear.py and jobs/train_dit.py, with Ray Train."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile

from latentmill.engine.cluster import Cluster
from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError, StoreError, TrainingError
from latentmill.models.registry import resolve
from latentmill.storage.storage import Storage
from latentmill.training.job import cause, check_workers
from latentmill.training.loop import Trainer
from latentmill.training.metrics import read_metrics
from latentmill.training.settings import load_settings, parse_options
from store.store_files import write_store
from support.runs import Result
from support.scripts import run_here

JOBS = Path(__file__).parents[2] / "jobs"


def job(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def job_here(capsys: pytest.CaptureFixture[str], script: str, *options: object) -> Result:
    """A job that ends before it starts Ray, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", lambda **_: pytest.fail("Ray is started"))
        return run_here(capsys, JOBS / script, *options)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for song in ("one", "two"):
        (tmp_path / "songs" / song).mkdir(parents=True)
        for role in ("bass", "keys"):
            path = tmp_path / "songs" / song / role
            soundfile.write(f"{path}.wav", 0.1 * random.standard_normal(16_000), 8000)
            Path(f"{path}.json").write_text(json.dumps({"group": song, "role": role}))
    return tmp_path / "songs"


def options(songs: Path, out: Path) -> list[str]:
    shape = "{sample_rate: 8000, strides: [8, 4], width: 8, latent_channels: 8}"
    given = [f"source={songs}", f"out={out}", f"network={shape}", "steps=6", "batch_size=2"]
    return [*given, "crop_seconds=0.1", "log_every=1", "checkpoint_every=4"]


def test_the_first_process_that_failed_gives_the_reason() -> None:
    from ray.train import TrainingFailedError

    class FailedError(TrainingFailedError):  # type: ignore[misc]
        def __init__(self, failures: dict[int, Exception]) -> None:
            super().__init__("several\nlines")
            self.worker_failures = failures

    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = ConfigError("the reason")
    assert str(cause(FailedError({1: RuntimeError("later"), 0: wrapped}))) == "the reason"
    assert isinstance(cause(FailedError({0: wrapped})), ConfigError)
    other = cause(FailedError({0: RuntimeError("out of\nmemory")}))
    assert isinstance(other, TrainingError)
    assert str(other) == "training failed: memory"


def test_a_wrong_setting_is_one_sentence_before_ray_starts(
    songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(songs, tmp_path / "run")
    done = job_here(capsys, "train_linear.py", *given, "step=7")
    assert done.code == ConfigError.exit_code
    assert done.err == "error: unknown setting step: did you mean steps?\n"


def test_a_second_run_in_the_same_folder_is_refused(
    songs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("latentmill.engine.lock.WAIT_SECONDS", 0.1)
    out = tmp_path / "run"
    with only_run(Storage(str(out))):
        done = job_here(capsys, "train_linear.py", *options(songs, out))
    assert done.code == StoreError.exit_code
    assert done.err == f"error: Another run is writing to {out}: wait until it has ended.\n"


@pytest.mark.slow
def test_a_run_that_is_alive_keeps_its_folder_and_a_killed_one_is_resumed(
    songs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = [*options(songs, out), "steps=1000000", "checkpoint_every=2"]
    first = started(given, until=lambda: len(read_metrics(out)) > 10)
    try:
        second = job("train_linear.py", *given)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert second.returncode == StoreError.exit_code
    error = f"error: Another run is writing to {out}: wait until it has ended."
    assert second.stderr.splitlines()[-1] == error
    reached = len(read_metrics(out))
    third = started(given, until=lambda: len(read_metrics(out)) > reached + 10)
    third.kill()
    third.wait()
    steps = [line["step"] for line in read_metrics(out)]
    assert steps == list(range(len(steps)))


def started(given: list[str], until: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """A run that is alive when the condition is met."""
    run = subprocess.Popen([sys.executable, str(JOBS / "train_linear.py"), *given])
    end = time.monotonic() + 600
    while not until():
        if run.poll() is not None or time.monotonic() > end:
            run.kill()
            pytest.fail("the run has ended, or does not train")
        time.sleep(0.05)
    return run


@pytest.mark.parametrize(
    ("gpus", "on_gpu", "message"),
    [
        (0, False, "workers is 3, but this machine has only 2 CPU cores: use at most 2."),
        (1, True, "workers is 3, but this machine has only 1 GPU: use at most 1."),
        (4, False, "workers is 3, but this machine has only 2 CPU cores: use at most 2."),
    ],
)
def test_more_workers_than_this_machine_can_run(gpus: int, on_gpu: bool, message: str) -> None:
    """Ray Train would wait for more of them forever."""
    cluster = Cluster(embedded=True, node_cpus=(2,), node_gpus=(gpus,))
    with pytest.raises(ConfigError) as caught:
        check_workers("workers", 3, cluster, on_gpu=on_gpu)
    assert str(caught.value) == message
    check_workers("workers", gpus if on_gpu else 2, cluster, on_gpu=on_gpu)


def test_more_workers_than_a_cluster_has_places(caplog: pytest.LogCaptureFixture) -> None:
    """A cluster may get more nodes."""
    cluster = Cluster(embedded=False, node_cpus=(8, 8), node_gpus=(2, 2))
    with caplog.at_level(logging.WARNING, "latentmill.training"):
        check_workers("workers", 4, cluster, on_gpu=True)
        assert not caplog.messages
        check_workers("workers", 6, cluster, on_gpu=True)
    assert caplog.messages == [
        "workers is 6, but the cluster has only 4 GPUs now: training starts when it has 6."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_linear.py", "train_dit.py"])
def test_too_many_workers_are_one_sentence(songs: Path, tmp_path: Path, script: str) -> None:
    given, name = [*options(songs, tmp_path / "run"), "workers=1000", "device=cpu"], "workers"
    if script == "train_dit.py":
        small = {"model_options": {"hop": 32, "sample_rate": 8000}}
        store = write_store(str(tmp_path / "latents"), songs, **small)
        given = ["--store", store.url, "--folder", str(tmp_path / "dit"), "--processes", "1000"]
        name = "--processes"
    done = job(script, *given)
    assert done.returncode == ConfigError.exit_code
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {name} is 1000, but this machine has only ")


@pytest.mark.slow
def test_one_process_trains_as_the_plain_loop_does(songs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = job("train_linear.py", *options(songs, out))
    assert done.returncode == 0, done.stderr
    plain = load_settings(None, parse_options(options(songs, tmp_path / "plain")))
    Trainer(plain).train()
    curves = [[line["loss"] for line in read_metrics(run)] for run in (out, tmp_path / "plain")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert resolve(f"trained:{out}").spec.identity["run"].startswith("run-")
    baseline = job("train_linear.py", *options(songs, tmp_path / "baseline"), "--no-linearity")
    assert baseline.returncode == 0, baseline.stderr
    document = json.loads((tmp_path / "baseline" / "model" / "trained.json").read_text())
    assert document["linearity"] is None


@pytest.mark.slow
def test_two_processes(songs: Path, tmp_path: Path) -> None:
    done = job("train_linear.py", *options(songs, tmp_path / "run"), "workers=2")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(6))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_sentence(songs: Path, tmp_path: Path) -> None:
    given = options(songs, tmp_path / "run")
    done = job("train_linear.py", *given, "learning_rate=1e30", "clip_norm=1e30")
    assert done.returncode == 10
    assert "training stopped; look at its audio (" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: the ")


def test_an_error_of_the_diffusion_job_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--store", tmp_path / "nowhere", "--folder", tmp_path / "dit"]
    done = job_here(capsys, "train_dit.py", *given)
    assert done.code == StoreError.exit_code
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_the_diffusion_job_lists_its_own_and_the_examples_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = job_here(capsys, "train_dit.py", "--help")
    assert done.code == 0, done.err
    assert "--processes" in done.out
    assert "--mixing" in done.out


@pytest.mark.slow
def test_the_diffusion_job(songs: Path, tmp_path: Path) -> None:
    store = write_store(
        str(tmp_path / "latents"), songs, model_options={"hop": 32, "sample_rate": 8000}
    )
    given = ["--store", store.url, "--folder", tmp_path / "dit", "--steps", 4, "--crop", 16]
    done = job("train_dit.py", *given, "--batch", 4, "--width", 32, "--depth", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "dit" / "result.json").read_text())["steps"] == 4
    assert (tmp_path / "dit" / "samples" / "0-mix.wav").exists()
