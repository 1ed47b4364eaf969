"""Runs that are killed: the same command again finishes them, with the same bytes.

The model sleeps before every batch, so that a shard takes a second to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import runs
from support.fields import files

SONGS = 20
UNIT_SECONDS = 26.0  # ten songs: half of them fill a row group, then the file is not empty
BATCH_SECONDS = 0.3
OPTIONS = [
    *("--model", runs.SLOW_MODEL, "--model-option", f"seconds={BATCH_SECONDS}", "--device", "cpu"),
    *("--batch-size", "1", "--threads", "1", "--workers", "1", "--json"),
]


def arguments(songs: Path, store: Path) -> list[str]:
    return ["encode", str(songs), str(store), "--unit-seconds", str(UNIT_SECONDS), *OPTIONS]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), SONGS, seconds=2.4)


@pytest.fixture(scope="module")
def undisturbed(
    songs: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Path
) -> dict[str, bytes]:
    """The latents of a run that nobody killed."""
    from latentmill.run.run import encode

    store = tmp_path_factory.mktemp("undisturbed") / "store"
    options = {"model": runs.SLOW_MODEL, "unit_seconds": UNIT_SECONDS, "batch_size": 1}
    encode(str(songs), str(store), device="cpu", **options)
    runs.assert_whole(store)
    latents = runs.latents(store)
    assert len(latents) == SONGS
    return latents


def wait_for_shard(process: subprocess.Popen[str], store: Path) -> None:
    """Wait until a shard of this run is half-written."""
    before = set(runs.half_written(store))
    runs.until(
        lambda: bool(set(runs.half_written(store)) - before) or process.poll() is not None,
        "a shard is half-written",
    )


def kill_once(args: list[str], store: Path, target: str, delay: float | None) -> list[str]:
    """Start a run and kill its driver or its actor; gives the shards that were half-written then.

    The moment is `delay` seconds after the driver has made its plan or the actor has begun a shard;
    without a delay, when a shard is half-written.
    """
    before, sealed = set(runs.half_written(store)), (store / "dataset.json").exists()
    with runs.started(*args) as process:
        pids: list[int] = []
        if target == "actor":  # a shard may still be written by a worker of the run before

            def found() -> bool:
                pids[:] = runs.actors(process.pid)
                return bool(pids) or process.poll() is not None

            runs.until(found, "the run has an actor")
        if delay is None or target == "actor":
            wait_for_shard(process, store)
        else:
            runs.until((store / "plan" / "plan.json").exists, "the plan is frozen")
        time.sleep(delay or 0)
        if target == "driver":
            process.kill()
            half = sorted(set(runs.half_written(store)) - before)
            code = process.wait(runs.PATIENCE_SECONDS)
            # It has ended before; if only fields were left, that may be.
            assert code == -signal.SIGKILL or sealed, process.communicate()[1]
            return half
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the run has ended before
                os.kill(pid, signal.SIGKILL)
        half = sorted(set(runs.half_written(store)) - before)
        out, err = process.communicate(timeout=runs.PATIENCE_SECONDS)
        assert process.returncode == 0, err
        assert runs.outcome(runs.Result(0, out, err))["exit_code"] == 0  # nothing else on stdout
        assert "failed on attempt 1" in err or not half
        return half


def kill_and_resume(
    args: list[str],
    store: Path,
    undisturbed: dict[str, bytes],
    kills: list[tuple[str, float | None]],
    last: str = "dataset.json",
) -> None:
    """Kill a run again and again, and start it at once again, while its workers may still live.

    `last` is the file that a run writes last.
    """
    hits = 0
    more: list[tuple[str, float | None]] = [("driver", None)] * 5  # if none of `kills` hits a shard
    for number, (target, delay) in enumerate([*kills, *more]):
        if number >= len(kills) and hits:
            break
        if (store / last).exists():
            check(store, undisturbed)
            store.rename(store.with_name(f"finished before kill {number}"))
        kept = runs.commits(store)
        hits += bool(kill_once(args, store, target, delay))
        assert kept.items() <= runs.commits(store).items()
    if not (store / last).exists():
        finish(args, store, undisturbed)
    check(store, undisturbed)
    assert hits, "no kill hit a shard that was being written"


def check(store: Path, undisturbed: dict[str, bytes]) -> None:
    """Nothing twice, nothing missing, nothing left behind, and the same bytes."""
    for root in (store, *store.glob("fields/*")):
        runs.assert_whole(root)
        assert runs.latents(root) == undisturbed


def finish(args: list[str], store: Path, undisturbed: dict[str, bytes]) -> None:
    kept = runs.commits(store)
    result = runs.command(*args)
    assert result.code == 0, result.err
    assert kept.items() <= runs.commits(store).items()
    check(store, undisturbed)


def test_a_killed_driver_and_a_killed_actor(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    args = arguments(songs, store)
    kill_and_resume(args, store, undisturbed, [("driver", None), ("actor", 0.1)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_at_random_moments(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    store = tmp_path / "store"
    kill_and_resume(arguments(songs, store), store, undisturbed, ten_kills(seed))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_of_a_field(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path, ray_session: Path
) -> None:
    """The field gets the latents of a run of the same model, and its store does not change."""
    from latentmill.run.run import encode

    base = tmp_path / "base"
    encode(str(songs), str(base), device="cpu", unit_seconds=UNIT_SECONDS)
    before = files(base)
    args = ["add", str(base), "--field", "slow", *OPTIONS]
    kill_and_resume(args, base / "fields" / "slow", undisturbed, ten_kills(3))
    assert files(base) == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_of_a_store_and_its_field(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """In one pass with the same model, both have the same latents."""
    store, config = tmp_path / "store", tmp_path / "run.yaml"
    model = {"model": runs.SLOW_MODEL, "batch_size": 1}
    config.write_text(
        json.dumps({"with_fields": {"slow": {**model, "model_options": {"seconds": 0.1}}}})
    )
    args = [*arguments(songs, store), "--config", str(config)]
    last = "fields/slow/dataset.json"
    kill_and_resume(args, store, undisturbed, ten_kills(4), last)


def ten_kills(seed: int) -> list[tuple[str, float | None]]:
    chance = random.Random(seed)
    kills: list[tuple[str, float | None]] = []
    for number in range(10):
        target = "driver" if number % 5 < 3 else "actor"
        on_shard = target == "driver" and number % 5 == 0
        kills.append((target, None if on_shard else chance.uniform(0.0, 8.0)))
    chance.shuffle(kills)
    return kills


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_trace_and_resumes(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    args = arguments(songs, store)
    for signum in (signal.SIGTERM, signal.SIGINT):
        with runs.started(*args) as process:
            wait_for_shard(process, store)
            assert process.poll() is None
            if signum == signal.SIGINT:
                os.killpg(process.pid, signum)  # as Ctrl-C in a terminal
            else:
                process.send_signal(signum)
            out, err = process.communicate(timeout=runs.PATIENCE_SECONDS)
        assert process.returncode == 130, err
        assert out == ""
        assert (
            err.splitlines()[-1] == "latentmill: interrupted; run the same command again to resume"
        )
        assert "Traceback" not in err
        assert not (store / "tmp").exists()
        assert not (store / "dataset.json").exists()
        committed = {path.stem for path in store.glob("commits/*")}
        assert {path.stem for path in store.glob("shards/*")} == committed
    finish(args, store, undisturbed)
