"""Runs that are killed: the same command again finishes them, with the same bytes.

The model stands still in the middle of a shard until the test has killed the run. For kills at
random moments, it sleeps before every batch instead.
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


def options(store: Path, hold: Path, seconds: float = BATCH_SECONDS) -> list[str]:
    """Of runs that stand still in the middle of a shard while there is a file `hold`."""
    model = {"seconds": seconds, "hold": hold, "shards": store}
    return [
        *("--model", runs.SLOW_MODEL, "--device", "cpu"),
        *(word for name, value in model.items() for word in ("--model-option", f"{name}={value}")),
        *("--batch-size", "1", "--threads", "1", "--workers", "1", "--json"),
    ]


def arguments(songs: Path, store: Path, seconds: float = BATCH_SECONDS) -> list[str]:
    words = ["encode", str(songs), str(store), "--unit-seconds", str(UNIT_SECONDS)]
    return words + options(store, store.parent / "hold", seconds)


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


def wait_for_shard(process: subprocess.Popen[str], store: Path, before: set[str]) -> None:
    """Wait until a shard of this run is half-written, which was not there `before`."""
    runs.until(
        lambda: bool(set(runs.half_written(store)) - before) or process.poll() is not None,
        "a shard is half-written",
    )


def kill_once(
    args: list[str], store: Path, target: str, delay: float | None, hold: Path
) -> list[str]:
    """Start a run and kill its driver or its actor; gives the shards that were half-written then.

    The moment is `delay` seconds after the driver has made its plan or the actor has begun a shard;
    without a delay, when a shard is half-written.
    """
    before = set(runs.half_written(store))
    if delay is None or target == "actor":
        hold.touch()
    with runs.started(*args) as process:
        pids: list[int] = []
        if target == "actor":  # a shard may still be written by a worker of the run before

            def found() -> bool:
                pids[:] = runs.actors(process.pid)
                return bool(pids) or process.poll() is not None

            runs.until(found, "the run has an actor")
        if delay is None or target == "actor":
            wait_for_shard(process, store, before)
        else:
            runs.until((store / "plan" / "plan.json").exists, "the plan is frozen")
        time.sleep(delay or 0)
        if target == "driver":
            process.kill()
            half = sorted(set(runs.half_written(store)) - before)
            code = process.wait(runs.PATIENCE_SECONDS)
            hold.unlink(missing_ok=True)
            assert code in (-signal.SIGKILL, 0), process.communicate()[1]  # 0: it has ended before
            return half
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the run has ended before
                os.kill(pid, signal.SIGKILL)
        half = sorted(set(runs.half_written(store)) - before)
        hold.unlink(missing_ok=True)
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
    hold: Path,
    last: str = "dataset.json",
) -> None:
    """Kill a run again and again, and start it at once again, while its workers may still live.

    While there is a file `hold`, the model stands still in the middle of a shard. `last` is the
    file that a run writes last.
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
        hits += bool(kill_once(args, store, target, delay, hold))
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
    args = arguments(songs, store, seconds=0.1)
    kills = [("driver", None), ("actor", 0.1)]
    kill_and_resume(args, store, undisturbed, kills, tmp_path / "hold")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_at_random_moments(
    songs: Path, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    store = tmp_path / "store"
    args = arguments(songs, store)
    kill_and_resume(args, store, undisturbed, ten_kills(seed), tmp_path / "hold")


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
    args = ["add", str(base), "--field", "slow"]
    store = base / "fields" / "slow"
    args += options(store, tmp_path / "hold")
    kill_and_resume(args, store, undisturbed, ten_kills(3), tmp_path / "hold")
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
    kill_and_resume(args, store, undisturbed, ten_kills(4), tmp_path / "hold", last)


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
    args = arguments(songs, store, seconds=1.0)
    for signum in (signal.SIGTERM, signal.SIGINT):
        before, hold = set(runs.half_written(store)), tmp_path / "hold"
        hold.touch()
        with runs.started(*args) as process:
            wait_for_shard(process, store, before)
            assert process.poll() is None
            hold.unlink()
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
