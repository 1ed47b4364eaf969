"""accelerate with two processes: every sample exactly once, or an error."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.latent_store import write_latents

pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("accelerate_script.py")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_read_everything_once(tmp_path: Path, workers: int) -> None:
    store = write_latents(str(tmp_path / "store"), [20] * 40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uneven = [42, 43, 45, 3]  # of which accelerate divides or fills up the last step
    others = [write_latents(str(tmp_path / str(count)), [20] * count).url for count in uneven]
    command = [sys.executable, str(SCRIPT), store.url, str(tmp_path), str(workers), *others]
    started = []
    for rank in (0, 1):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        told = {name: str(value) for name, value in names.items()}
        told |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=os.environ | told))
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("batches", "sharded", "dispatched"):
        for epoch in (0, 1):
            steps = [rank[name][epoch] for rank in ranks]
            assert [len(batches) for batches in steps] == [5, 5]
            seen = [position for batches in steps for batch in batches for position in batch]
            assert sorted(seen) == list(range(40))
        assert [rank[f"{name}-rest"] for rank in ranks] == [rank[name][1][2:] for rank in ranks]
        assert ranks[0][f"{name}-state"] == ranks[1][f"{name}-state"]
        assert ranks[0][f"{name}-state"] == [1, 4 if name == "batches" else 16]
        for rank in ranks if name != "dispatched" else ranks[:1]:
            assert "rank=0, world_size=1" in rank[f"{name}-error"]
        for number, count in enumerate(uneven):
            all_read, step = (-(-count // 4), 2) if name == "batches" else (count, 8)
            ends = [[0, at] for at in range(step, all_read, step)] + [[0, all_read]]
            assert [rank[f"{name}-uneven"][number] for rank in ranks] == [ends, ends]
