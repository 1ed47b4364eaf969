"""Runs in this process, without Ray: what a driver and its workers write is the same."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from latentmill.config import load_config
from latentmill.engine import launch
from latentmill.engine.worker import Worker
from latentmill.plan import Plan
from latentmill.run.run import RunSummary, run
from latentmill.store.schema import ORIGIN_PATH
from latentmill.store.seal import write_origin


def encode_inline(patch: pytest.MonkeyPatch) -> None:
    """Encode units in this process from now on."""

    def encode_units(
        config: Any, handle: Any, chunking: Any, plan: Plan, todo: Any, progress: Any, hold: Any
    ) -> None:
        job = launch.make_job(config, handle, chunking, plan, device="cpu", threads=1)
        worker = Worker(replace(job, owner=hold.owner))
        if not hold.storage.exists(ORIGIN_PATH):
            write_origin(hold.storage, worker.origin())
        with contextlib.closing(worker):
            for unit in todo:
                worker.encode(unit)

    patch.setattr(launch, "encode_units", encode_units)


def encode(source: Path, store: object, **options: Any) -> RunSummary:
    """One unit for each song that `runs.write_songs` wrote, with a model of few channels."""
    defaults = {
        "device": "cpu",
        "unit_seconds": 0.01,
        "threads": 1,
        "model_options": {"hop": 64, "sample_rate": 44100},
    }
    given = {"source": str(source), "out": str(store), **defaults, **options}
    return run(load_config(None, given))


def spoil(path: Path) -> None:
    """Make a file one that fails."""
    path.write_bytes(b"no audio")


def tone(path: Path, samples: int, level: float = 0.25) -> None:
    """Write a file of constant samples, exact as 32-bit floats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [level, -level] * (samples // 2), 44100, subtype="FLOAT")
