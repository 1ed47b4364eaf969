"""A run without Ray: its units are encoded one after the other by a worker of this process.

`in_process` puts this in the place of `latentmill.engine.launch.encode_units`; everything else of a
run, and everything that it reads and writes, is the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.engine import launch
from latentmill.engine.lock import Hold
from latentmill.engine.worker import Worker
from latentmill.errors import StorageError
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.storage.storage import Storage
from latentmill.store.schema import ORIGIN_PATH
from latentmill.store.seal import write_origin

ATTEMPTS = 3  # as `engine.dispatch` gives a unit that cannot be written


def encode_units(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    todo: list[Unit],
    progress: Any,
    hold: Hold,
) -> None:
    """What `launch.encode_units` does, with one worker."""
    storage = getattr(hold, "storage", None) or Storage(config.out)
    job = launch.make_job(config, handle, chunking, plan, device="cpu", threads=1)
    with closing(Worker(replace(job, owner=hold.owner))) as worker:
        if not storage.exists(ORIGIN_PATH):
            write_origin(storage, worker.origin())
        for unit in todo:
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
