"""`Loader`: the batches of a DataLoader, in memory that is used again, and what happens to it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler

import latentmill as lm
from latentmill.errors import ConfigError, StorageError, WorkerError
from latentmill.reader.sample import Sample
from latentmill.reader.stems import ContextAndTarget
from latentmill.storage.storage import Storage
from support.latent_store import write_latents

Batch = dict[str, Any]


def same(batch: Any, expected: Any) -> None:
    """Check equality of two batches: names, types, values, and the order of tensors in memory."""
    assert type(batch) is type(expected)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype
            assert batch[name].stride() == value.stride()
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value, name


def workers() -> list[Any]:
    found = multiprocessing.active_children()
    return [one for one in found if one.name.startswith("latentmill-loader")]


def mapped(pid: int | str = "self") -> int:
    """Number of a process's mappings of memory that a loader made."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:latentmill" in line for line in lines)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.freeze()  # `collect` need not look at what was there before
    yield
    gc.collect()
    gc.unfreeze()
    assert not workers()
    assert mapped() == 0


def until(holds: Callable[[], bool]) -> None:
    while not holds():  # pytest's timeout ends the test if it never holds
        time.sleep(0.02)


worlds = st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 9))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 9),
    worlds,
    st.booleans(),
    st.sampled_from([None, [1.0, 3.0, 2.0, 1.0]]),
    st.integers(0, 9),
)
def test_batches_and_states_are_those_of_a_data_loader(
    mixed: list[str],
    seed: int,
    world: tuple[int, int, int],
    shuffle: bool,
    weights: list[float] | None,
    steps: int,
) -> None:
    ranks, count, size = world

    def stream(batch_size: int | None = size) -> lm.LatentStream:
        return lm.LatentStream(
            mixed,
            weights if shuffle else None,
            crop=8,
            shuffle=shuffle,
            seed=seed,
            rank=ranks - 1,
            world_size=ranks,
            batch_size=batch_size,
        )

    plain = stream()
    expected = list(DataLoader(plain, batch_size=size, collate_fn=lm.collate))
    states = [plain.state_after(batch) for batch in expected]
    with lm.Loader(stream(None), size, workers=count) as loader:
        assert len(loader) == len(expected)
        state = loader.state_dict()
        for number, batch in enumerate(loader):
            same(batch, expected[number])
            assert loader.state_dict() == loader.state_after(batch) == states[number]
            if number == steps:
                break
        if steps < len(expected):
            state = loader.state_dict()
    left = expected[steps + 1 :] if steps < len(expected) else expected
    with lm.Loader(stream(), workers=2 - count) as resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert len(resumed) == len(expected)  # of the whole epoch
        rest = list(resumed)
        assert len(rest) == len(left)
        for batch, one in zip(rest, left, strict=True):
            same(batch, one)
        assert {epoch for batch in resumed for epoch in batch["epoch"]} == {1}  # the next one


@dataclass(frozen=True)
class Louder:
    """A transform."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        return replace(sample, latents=sample.latents * np.float32(random.uniform(1, 2)))


def sources(mixed: list[str]) -> dict[str, Callable[[], Any]]:
    dataset = {"crop": 16, "seed": 4}
    return {
        "shuffled": lambda: lm.LatentDataset(mixed, **dataset),
        "windows": lambda: lm.LatentDataset(mixed, **dataset, mode="windows"),
        "whole": lambda: lm.LatentDataset(mixed),
        "transformed": lambda: lm.LatentDataset(mixed, **dataset, transforms=[Louder()]),
        "without metadata": lambda: lm.LatentDataset(mixed[3], **dataset, metadata=False),
        "stems": lambda: lm.StemDataset(mixed[3], ContextAndTarget(), crop=16, active_db=None),
    }


@pytest.mark.parametrize(
    "collate", [lm.collate, pytest.param(lm.collate_tensors, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", list(sources([])))
def test_every_dataset_gives_the_batches_of_a_data_loader(
    mixed: list[str], name: str, collate: Any
) -> None:
    source = sources(mixed)[name]
    if name == "stems" and collate is lm.collate_tensors:
        collate = torch.utils.data.default_collate  # not ours
    options = {"buckets": 2, "seed": 3} if name == "whole" else {}
    first = lm.BatchSampler(source(), 6, **options)
    plain = DataLoader(first.dataset, batch_sampler=first, collate_fn=collate)
    second = lm.BatchSampler(source(), 6, **options) if options else source()
    with lm.Loader(second, 6, workers=2, collate_fn=collate) as loader:
        for _ in range(2):
            expected, batches = list(plain), list(loader)
            assert len(batches) == len(expected) > 1
            for batch, one in zip(batches, expected, strict=True):
                same(batch, one)
            if collate is lm.collate:
                assert loader.state_dict() == first.state_after(expected[-1])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("transforms", [[], [Louder()]])
def test_float16(mixed: list[str], count: int, transforms: list[Any]) -> None:
    def stream() -> lm.LatentStream:
        return lm.LatentStream(mixed, crop=8, batch_size=5, transforms=transforms)

    with lm.Loader(stream(), workers=count, dtype="float16") as loader:
        for batch, expected in zip(loader, lm.Loader(stream(), workers=0), strict=True):
            expected["latents"] = expected["latents"].half()
            same(batch, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_held_batches_keep_their_values(mixed: list[str], dtype: Any) -> None:
    def stream() -> lm.LatentStream:
        return lm.LatentStream(mixed, crop=8, batch_size=4)

    expected = list(lm.Loader(stream(), workers=0, dtype=dtype))
    loader = lm.Loader(stream(), workers=2, dtype=dtype)
    held, crops = [], []
    for number, batch in enumerate(loader):
        if number % 3 == 0:
            held.append((number, batch))
        elif number % 3 == 1:  # an array of one crop keeps all of the batch's memory
            crops.append((number, batch["latents"][1:, :, 2:].numpy()[0]))
    del batch
    for _ in loader:  # another epoch in the same memory
        pass
    loader.close()
    for number, kept in held:
        same(kept, expected[number])
    for number, crop in crops:
        assert np.array_equal(crop, expected[number]["latents"][1, :, 2:].numpy())


def test_memory_is_used_again_and_freed(mixed: list[str]) -> None:
    stream = lm.LatentStream(mixed, crop=8, batch_size=1)
    with lm.Loader(stream, workers=2, prefetch=2) as loader:
        places = {batch["latents"].data_ptr() for batch in loader}
        assert len(places) <= 2 * (2 + 1 + 1)  # of each worker: requested ones, in use, received
        held = list(loader)
        assert mapped() >= len(held) == 73
        del held
        places = {batch["latents"].data_ptr() for batch in loader}
        assert mapped() <= 2 * (2 + 1 + 1 + 2)  # and the spare ones


def test_batches_of_whole_items_get_the_memory_they_need(tmp_path: Path) -> None:
    lengths = [3, 9, 2, 200, 1, 2000, 5, 1]
    store = write_latents(str(tmp_path / "store"), lengths)
    stream = lm.LatentStream(store, shuffle=False, batch_size=1)
    with lm.Loader(stream, workers=1) as loader:
        assert [batch["latents"].shape[2] for batch in loader] == lengths


def test_a_worker_that_is_killed_is_reported(mixed: list[str], one_sentence: Any) -> None:
    loader = lm.Loader(lm.LatentStream(mixed, crop=8, batch_size=2), workers=2)
    for idle in (False, True):
        batches = iter(loader)
        held = next(batches)
        latents = held["latents"].clone()
        if idle:  # nothing is requested any more
            for _ in range(len(loader) - 3):
                next(batches)
        victim = workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="killed by SIGKILL") as error:
            for _ in range(2):
                list(batches)
                batches = iter(loader)
        one_sentence(error.value)
        assert not workers()
        assert torch.equal(held["latents"], latents)
        loader.set_epoch(0)  # a later iteration starts new workers
    assert sum(len(batch["key"]) for batch in loader) == 73


@dataclass(frozen=True)
class Failing:
    """A transform that fails at a position of the epoch."""

    how: Callable[[], object]

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        if sample.position == 21:
            self.how()
        return sample


class Unpicklable(Exception):  # noqa: N818
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def refuse() -> None:
    raise ZeroDivisionError("the transform divides by zero")


def refuse_unpicklably() -> None:
    raise Unpicklable("this", "that")


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        (refuse, ZeroDivisionError, "^the transform divides by zero"),
        (refuse_unpicklably, WorkerError, "Unpicklable: this and that"),
        (lambda: os._exit(3), WorkerError, "ended with exit code 3"),
        (lambda: sys.exit(4), WorkerError, "ended with exit code 4"),
    ],
)
def test_errors_of_workers(mixed: list[str], how: Any, error: Any, text: str) -> None:
    stream = lm.LatentStream(mixed, crop=8, batch_size=2, transforms=[Failing(how)])
    loader = lm.Loader(stream, workers=2)
    positions = []
    with pytest.raises(error, match=text) as raised:
        for batch in loader:
            positions += batch["position"]
    assert positions == list(range(20))
    if error is ZeroDivisionError:
        assert "in refuse" in "".join(raised.value.__notes__)  # where it happened
    assert not workers()


def test_a_damaged_shard_is_one_sentence(tmp_path: Path, one_sentence: Any) -> None:
    store = write_latents(str(tmp_path / "store"), [9] * 8)
    dataset = lm.LatentDataset(store, crop=4, metadata=False)
    loader = lm.Loader(dataset, 4, workers=1)
    os.truncate(next((tmp_path / "store" / "shards").iterdir()), 100)
    with pytest.raises(StorageError, match="does not have the size") as error:
        next(iter(loader))
    one_sentence(error.value)


@pytest.mark.parametrize("end", ["drop", "raise", "close", "twice", "not begun"])
def test_iterators_that_are_dropped(mixed: list[str], end: str) -> None:
    loader = lm.Loader(lm.LatentStream(mixed, crop=8, batch_size=2), workers=2)
    batches = iter(loader)
    kept = next(batches)["key"]
    assert len(workers()) == 2
    if end == "raise":
        with pytest.raises(KeyError):
            for batch in batches:
                batch["no such name"]
        del batch
    elif end == "close":
        loader.close()
        with pytest.raises(ConfigError, match="closed or iterated over again"):
            next(batches)
    elif end == "twice":
        again = iter(loader)
        assert next(again)["epoch"] == [1, 1]
        with pytest.raises(ConfigError, match="closed or iterated over again"):
            next(batches)
        assert len([*again]) == 36  # goes on as if nothing had happened
        del again
    elif end == "not begun":
        waiting, again = iter(loader), iter(loader)
        with pytest.raises(ConfigError, match="closed or iterated over again"):
            next(waiting)
        assert len([*again]) == 37
        del waiting, again
    assert len(kept) == 2
    del loader, batches  # the fixture checks that nothing is left


SCRIPT = """
import multiprocessing, sys
import latentmill as lm
loader = lm.Loader(lm.LatentStream(sys.argv[1], crop=8, batch_size=2), workers=2)
held = []
while True:
    for batch in loader:
        held = [*held[-5:], batch]
        if len(held) == 6 and loader is not None:
            pids = [one.pid for one in multiprocessing.active_children()]
            print(*pids, flush=True)
            sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_workers_end_with_a_main_process_that_is_killed(mixed: list[str], how: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, mixed[3]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(mapped(pid) for pid in pids)
    process.send_signal(how)
    process.communicate("\n" if how == signal.SIGINT else None)
    until(lambda: not any(Path(f"/proc/{pid}/maps").exists() and mapped(pid) for pid in pids))


def test_processes_that_are_not_forked(mixed: list[str]) -> None:
    stream = lm.LatentStream(mixed, crop=8, batch_size=8)
    with lm.Loader(stream, workers=1, start_method="spawn") as loader:
        assert sum(len(batch["key"]) for batch in loader) == 73


def test_long_requests_and_batches_do_not_block_each_other(mixed: list[str]) -> None:
    """Longer than what a pipe holds, in both directions at the same time."""
    dataset = lm.LatentDataset(mixed, crop=1, metadata=False)
    sampler = RandomSampler(dataset, replacement=True, num_samples=60_000)
    with lm.Loader(lm.BatchSampler(dataset, 20_000, sampler=sampler), workers=1) as loader:
        assert [len(batch["key"]) for batch in loader] == [20_000] * 3


@pytest.mark.parametrize("name", ["crops", "transformed", "stems"])
def test_a_worker_reads_two_batches_of_a_remote_store_at_once(
    mixed: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lengths = [9, 3, 30, 17, 8, 25, 12, 40]
    store = write_latents(f"memory://{name}", lengths)

    def source() -> Any:
        if name == "stems":
            return lm.StemDataset(store, ContextAndTarget(), crop=8, active_db=None)
        transforms = [Failing(lambda: None)] if name == "transformed" else []
        return lm.LatentDataset(store, crop=8, transforms=transforms)

    size = 1 if name == "stems" else 2
    expected = list(lm.Loader(source(), size, workers=0))
    together = threading.Barrier(2, timeout=120)
    real = Storage.read_ranges

    def waiting(self: Storage, ranges: Any) -> Any:
        if any(length == 8 * 4 * 2 for _, _, length in ranges):  # of latents
            together.wait()
        return real(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", waiting)
    with lm.Loader(source(), size, workers=1, start_method="fork") as loader:
        batches = list(loader)
    assert len(batches) == len(expected) == len(lengths) // (4 if name == "stems" else 2)
    for batch, one in zip(batches, expected, strict=True):
        same(batch, one)


@pytest.mark.parametrize("count", [0, 1])
def test_drop_last(mixed: list[str], count: int) -> None:
    stream = lm.LatentStream(mixed, crop=8, batch_size=10)
    with lm.Loader(stream, workers=count, drop_last=True) as loader:
        assert len(loader) == 7
        epochs = [[(batch["epoch"][0], len(batch["key"])) for batch in loader] for _ in range(2)]
        assert epochs == [[(0, 10)] * 7, [(1, 10)] * 7]
        loader.load_state_dict(state := loader.state_dict())
        assert state["position"] == 70
        assert [*loader] == []  # three samples are left, which is no batch
        assert next(iter(loader))["epoch"][0] == 2


@pytest.mark.parametrize("count", [0, 1])
def test_drop_last_of_a_dataset(mixed: list[str], count: int) -> None:
    dataset = lm.LatentDataset(mixed, crop=8)
    sampler = lm.BatchSampler(dataset, 10, drop_last=True)
    for loader in (
        lm.Loader(dataset, 10, workers=count, drop_last=True),
        lm.Loader(sampler, workers=count, drop_last=True),
        lm.Loader(lm.BatchSampler(dataset, 10, drop_last=True), workers=count),
    ):
        with loader:
            assert len(loader) == 7
            assert [len(batch["key"]) for batch in loader] == [10] * 7


def test_invalid_options(mixed: list[str], one_sentence: Any) -> None:
    stream = lm.LatentStream(mixed, crop=8, batch_size=4)
    dataset = lm.LatentDataset(mixed, crop=8)
    used = lm.LatentStream(mixed, crop=8)
    lm.Loader(used, batch_size=32)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (stream, {"batch_size": 5}, "batch_size is 5 in Loader, but 4 in LatentStream"),
        (lm.LatentStream(mixed, crop=8), {}, "batch_size is None in Loader"),
        (
            used,
            {"batch_size": 16},
            r"16 in Loader, but 32 in LatentStream \(its own, or that of an",
        ),
        (lm.BatchSampler(dataset, 4), {"drop_last": True}, "but False in BatchSampler"),
        (dataset, {}, "needs a batch_size"),
        (dataset, {"batch_size": 0}, "batch_size must be at least 1"),
        (stream, {"workers": -1}, "workers must be at least 0"),
        (stream, {"prefetch": 0}, "prefetch must be at least 1"),
        (stream, {"dtype": "int8"}, "dtype is 'int8': use one of float32, float16"),
        ([1, 2], {"batch_size": 2}, "not list"),
        (dataset, {"batch_size": 2, "start_method": "thread"}, "'fork', 'spawn' or 'forkserver'"),
    ]
    if not torch.cuda.is_available():
        cases.append((stream, {"pin_memory": True}, "needs a GPU with CUDA"))
    for source, options, text in cases:
        with pytest.raises(ConfigError, match=text) as error:
            list(lm.Loader(source, **options))
        one_sentence(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
@pytest.mark.parametrize("count", [0, 2])
def test_page_locked_memory(mixed: list[str], count: int) -> None:
    def stream() -> lm.LatentStream:
        return lm.LatentStream(mixed, crop=8, batch_size=5)

    expected = [batch["latents"] for batch in lm.Loader(stream(), workers=0)]
    with lm.Loader(stream(), workers=count, pin_memory=True) as loader:
        for _ in range(2):
            copies = []
            for batch in loader:
                assert batch["latents"].is_pinned()
                copies.append(batch["latents"].cuda(non_blocking=True))
            if not _:
                for copy, one in zip(copies, expected, strict=True):
                    assert torch.equal(copy.cpu(), one)
