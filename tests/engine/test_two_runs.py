"""Two runs at once on a store in a bucket: the second is refused, a third replaces a dead one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import fsspec
import pytest

from latentmill.engine.lease import LEASE_PATH
from latentmill.store.store import open_store
from latentmill.store.verify import verify
from support import runs


@pytest.mark.slow  # test_lease.py is quicker
def test_a_second_run_is_refused_and_takes_over_a_dead_one(tmp_path: Path, s3_bucket: str) -> None:
    songs = runs.write_songs(tmp_path / "songs", 6, 2.0)
    store = f"{s3_bucket}/latents"
    bucket = fsspec.filesystem("s3")

    def there(path: str) -> bool:
        bucket.invalidate_cache()
        return bool(bucket.exists(f"{store}/{path}"))

    def arguments(seconds: float) -> list[str]:
        return [
            *("encode", str(songs), store, "--model", runs.SLOW_MODEL, "--device", "cpu"),
            *("--model-option", f"seconds={seconds}", "--batch-size", "1", "--threads", "1"),
            *("--unit-seconds", "4", "--workers", "1"),
        ]

    with runs.started(*arguments(60.0)) as first:
        runs.until(lambda: there("plan/plan.json"), "the first run has its plan")
        second = runs.command(*arguments(0.0))
        assert second.code == 5, second.err
        last = second.err.splitlines()[-1]
        assert last.startswith(f"latentmill: Another run is writing to {store} (process")
        assert last.endswith("wait until it has ended.")
        assert first.poll() is None
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert there(LEASE_PATH)
    third = runs.command(*arguments(0.0))
    assert third.code == 0, third.err
    assert not there(LEASE_PATH)
    opened = open_store(store)
    assert verify(opened).faults == []
    assert len(list(opened.keys())) == 6
