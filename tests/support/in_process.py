"""Runs without Ray: their units are encoded one after the other by a worker of this process.

`in_process`, and the fixture of that name, put this in the place of
`latentmill.engine.launch.encode_units`. Everything else of a run, and everything that it reads and
writes, is the library's. Starting an actor takes four seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from latentmill.config import RunConfig, load_config
from latentmill.encoding.chunks import Chunking
from latentmill.engine import launch
from latentmill.engine.joint import (
    FieldInPass,
    JointWorker,
    joint_job,
    joint_units,
    write_origins,
)
from latentmill.engine.lock import Hold
from latentmill.engine.worker import Worker
from latentmill.errors import StorageError
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.run.run import RunSummary, run

ATTEMPTS = 3  # as `engine.dispatch` gives a unit that cannot be written


def encode_units(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    todo: list[Unit],
    progress: Any,
    hold: Hold,
    fields: Sequence[FieldInPass] = (),
) -> None:
    """What `launch.encode_units` does, with one worker."""
    job = launch.make_job(config, handle, chunking, plan, device="cpu", threads=1)
    job = replace(job, owner=hold.owner)
    with contextlib.ExitStack() as stack:
        worker: Any
        if fields:
            worker = stack.enter_context(closing(JointWorker(joint_job(job, fields))))
            write_origins(hold, fields, worker.origin())
        else:
            worker = stack.enter_context(closing(Worker(job)))
            write_origins(hold, (), [worker.origin()])
        for unit in joint_units(todo, fields) if fields else todo:
            for attempt in range(1, ATTEMPTS + 1):
                hold.check()
                try:
                    progress.unit_done(worker.encode(unit))
                    break
                except StorageError:
                    if attempt == ATTEMPTS:
                        raise


@contextmanager
def in_process() -> Iterator[None]:
    """Runs inside this context use no Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "encode_units", encode_units)
        yield


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
