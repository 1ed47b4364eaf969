"""`Loader` and the life of its processes: after a fork, and when it ends."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentmill as lm
from latentmill.errors import ConfigError, StoreError, WorkerError
from latentmill.reader.buffers import Packed, Released, Slot
from latentmill.reader.sample import Sample
from support.latent_store import latent_of, write_again, write_latents


def workers() -> list[Any]:
    found = multiprocessing.active_children()
    return [one for one in found if one.name.startswith("latentmill-loader")]


def mapped() -> int:
    """Number of mappings of memory that a loader made."""
    return Path("/proc/self/maps").read_text().count("memfd:latentmill")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.freeze()  # `collect` need not look at what was there before
    yield
    gc.collect()
    gc.unfreeze()
    assert not workers()
    assert mapped() == 0


def read(loader: lm.Loader) -> list[tuple[int, str, float]]:
    """Positions, keys and sums of the latents of an epoch."""
    return [
        (position, key, float(latents.sum()))
        for batch in loader
        for position, key, latents in zip(
            batch["position"], batch["key"], batch["latents"], strict=True
        )
    ]


def test_a_fork_has_workers_of_its_own(mixed: list[str]) -> None:
    """All read at the same time: two children, and the parent, which is within an epoch."""

    def stream() -> lm.LatentStream:
        return lm.LatentStream(mixed, crop=8, batch_size=2)

    reference = lm.Loader(stream(), workers=0)
    first, second = read(reference), read(reference)
    loader = lm.Loader(stream(), workers=2)
    batches = iter(loader)
    held = next(batches)
    kept, position = held["latents"].clone(), held["position"]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def child(number: int) -> None:
        try:
            with pytest.raises(ConfigError, match="closed or iterated over again"):
                next(batches)
            assert read(loader) == second
            if number:  # the other one only ends
                loader.close()
            answers.put("equal")
        except BaseException as error:
            answers.put(repr(error))
            raise

    children = [context.Process(target=child, args=(number,)) for number in range(2)]
    for one in children:
        one.start()
    position += [place for batch in batches for place in batch["position"]]
    assert position == [place for place, *_ in first]
    assert [answers.get() for _ in children] == ["equal", "equal"]
    for one in children:
        one.join()
        assert one.exitcode == 0
    assert len(workers()) == 2
    assert read(loader) == second
    assert held["latents"].equal(kept)
    loader.close()


class Runtime:
    """Stands for the CUDA runtime; knows what is registered."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.streams = {0: Stream(), 3: Stream()}  # of the devices that have a context

    def cudaHostRegister(self, place: int, size: int, _flags: int) -> int:  # noqa: N802
        assert place not in self.registered
        self.registered[place] = size
        return 0

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802
        del self.registered[place]
        return 0


class Event:
    """Stands for an event of CUDA."""

    def __init__(self) -> None:
        self.stream: Any = None

    def record(self, stream: Any = None) -> None:
        self.stream = stream or torch.cuda.current_stream()

    def query(self) -> bool:
        return not self.stream.busy

    def synchronize(self) -> None:
        self.stream.busy = False


@dataclass
class Stream:
    """Stands for the current stream of a device."""

    busy: bool = False


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    stand_in = Runtime()
    monkeypatch.setattr("latentmill.reader.loader.check_pinnable", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: stand_in.streams[device])
    monkeypatch.setattr(
        torch._C,
        "_cuda_hasPrimaryContext",
        lambda device: device in stand_in.streams,
        raising=False,
    )
    return stand_in


@pytest.mark.parametrize("device", [0, 3])
def test_a_slot_waits_for_copies_to_every_device(runtime: Runtime, device: int) -> None:
    """Also to one that is not the current device, as `.to("cuda:3", non_blocking=True)` starts."""
    slot, released = Slot(0, 0), Released()
    packed = Packed(torch.arange(4.0), torch.float32)
    slot.set_memory(torch.zeros(packed.size, dtype=torch.uint8), pin=True)
    assert slot.memory is not None
    packed.write(slot.memory)
    batch = slot.unpack(packed.size, packed.payload, released)
    assert torch.equal(batch, torch.arange(4.0))
    copy = runtime.streams[device]
    copy.busy = True
    del batch
    assert list(released.take()) == [slot]
    assert not slot.reusable
    copy.busy = False
    assert slot.reusable
    copy.busy = True
    slot.free()
    assert not copy.busy
    assert runtime.registered == {}
    assert slot.reusable


@dataclass(frozen=True)
class Failing:
    """A transform that fails at a position of the epoch."""

    how: Callable[[], object]

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        if sample.position == 50:
            self.how()
        return sample


def refuse() -> None:
    raise ZeroDivisionError("the transform divides by zero")


@pytest.mark.parametrize("end", ["epoch", "break", "error", "killed", "killed when idle"])
def test_no_memory_stays_page_locked(mixed: list[str], runtime: Runtime, end: str) -> None:
    transforms = [Failing(refuse)] if end == "error" else []
    stream = lm.LatentStream(mixed, crop=8, batch_size=2, transforms=transforms)
    loader = lm.Loader(stream, workers=2, pin_memory=True)
    most, raised = 0, None
    batches = iter(loader)
    try:
        for number, _ in enumerate(batches):
            most = max(most, len(runtime.registered))
            if number == 12 and end == "break":
                break
            if number == {"killed": 12, "killed when idle": 36}.get(end):
                victim = workers()[0]
                victim.kill()
                victim.join()
        if end == "killed when idle":
            list(loader)
    except (ZeroDivisionError, WorkerError) as error:
        raised = type(error)
    assert raised is {"epoch": None, "break": None, "error": ZeroDivisionError}.get(
        end, WorkerError
    )
    assert most >= 4
    assert len(runtime.registered) >= 1  # the last batch
    loader.close()
    del _, batches
    gc.collect()
    assert runtime.registered == {}
    assert mapped() == 0


def test_a_fork_leaves_page_locked_memory_to_its_parent(mixed: list[str], runtime: Runtime) -> None:
    loader = lm.Loader(lm.LatentStream(mixed, crop=8, batch_size=2), workers=1, pin_memory=True)
    held = [next(iter(loader))]
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def child() -> None:
        before = dict(runtime.registered)
        held.clear()
        loader.close()
        answers.put(runtime.registered == before != {})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert answers.get()
    process.join()
    held.clear()
    loader.close()
    assert runtime.registered == {}


def cancel() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(("how", "code"), [(lambda: sys.exit(4), 4), (cancel, 1)])
@pytest.mark.parametrize("remote", [False, True])
def test_a_worker_that_ends_is_reported(
    tmp_path: Path, how: Callable[[], object], code: int, remote: bool, one_sentence: Any
) -> None:
    url = f"memory://{uuid.uuid4().hex}" if remote else str(tmp_path)
    store = write_latents(url, [9] * 64)
    stream = lm.LatentStream(store, crop=4, batch_size=2, transforms=[Failing(how)])
    loader = lm.Loader(stream, workers=2, start_method="fork")
    positions = []
    with pytest.raises(WorkerError, match=f"ended with exit code {code}") as error:
        for batch in loader:
            positions += batch["position"]
    one_sentence(error.value)
    assert positions == list(range(50))


def test_batches_that_a_worker_made_before_it_died_are_not_lost(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path), [9] * 64)
    exits = Failing(lambda: sys.exit(4))
    stream = lm.LatentStream(store, crop=4, batch_size=2, transforms=[exits])
    loader = lm.Loader(stream, workers=2, start_method="fork")
    alive, positions = len(multiprocessing.active_children()) + 2, []
    with pytest.raises(WorkerError, match="ended with exit code 4"):
        for batch in loader:
            positions += batch["position"]
            if len(positions) == 46:  # the next request is sent to a worker that has died
                while len(multiprocessing.active_children()) == alive:
                    time.sleep(0.01)
    assert positions == list(range(50))


@dataclass(frozen=True)
class Uncopyable:
    """A transform that holds something that cannot be copied."""

    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        return sample


def test_objects_that_cannot_be_copied_are_reported() -> None:
    store = write_latents("memory://uncopyable", [9] * 16)
    stream = lm.LatentStream(store, crop=4, batch_size=2, transforms=[Uncopyable()])
    with pytest.raises(TypeError, match="cannot pickle") as error:
        list(lm.Loader(stream, workers=2, start_method="fork"))
    assert "In a worker process of the Loader" in "".join(error.value.__notes__)


@pytest.mark.parametrize(
    ("method", "remote"), [("fork", True), pytest.param("spawn", False, marks=pytest.mark.slow)]
)
def test_a_store_that_was_sealed_again_is_reported(
    tmp_path: Path, method: str, remote: bool, one_sentence: Any
) -> None:
    """A worker opens the store again, which has other items now."""
    url = f"memory://{uuid.uuid4().hex}" if remote else str(tmp_path / "store")
    dataset = lm.LatentDataset(write_latents(url, [9] * 16), crop=4)
    loader = lm.Loader(dataset, 2, workers=2, start_method=method)
    write_again(url, [0], [latent_of(number, 9) for number in range(16)], failed=[2])
    with pytest.raises(StoreError, match="sealed again with other items") as error:
        list(loader)
    one_sentence(error.value)
