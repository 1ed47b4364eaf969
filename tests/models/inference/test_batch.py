"""The search for a batch size, on a memory that is only pretended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from latentmill.config import load_config
from latentmill.encoding.chunks import Chunking
from latentmill.engine import tuning
from latentmill.engine.job import make_job
from latentmill.engine.tuning import settled_batch_size
from latentmill.errors import ConfigError, ModelError, StoreError
from latentmill.models.families import mdct
from latentmill.models.inference import batch
from latentmill.models.inference.batch import (
    LARGEST,
    TooLarge,
    find_batch_size,
    most_chunks,
    search,
)
from latentmill.models.inference.split import SplitHandle
from latentmill.plan import BATCH_PATH
from latentmill.storage.storage import Storage

HANDLE = mdct.build(hop=16, sample_rate=800)


class Memory:
    """Takes batches up to a size; each takes a fixed time, and more for what is computed one
    after another."""

    def __init__(self, fits: int, parallel: int = 10**9, error: type[Exception] | None = None):
        self.fits, self.parallel, self.tried = fits, parallel, list[int]()
        self.error = error or torch.OutOfMemoryError

    def __call__(self, size: int) -> float:
        self.tried.append(size)
        if size > self.fits:
            raise self.error
        return 1.0 + max(0, size - self.parallel) / self.parallel


@given(fits=st.integers(0, 3000), first=st.integers(1, 64), most=st.integers(1, 2000))
@example(fits=56, first=57, most=57)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, TooLarge])
def test_the_largest_that_fits_is_found(
    error: type[Exception], fits: int, first: int, most: int
) -> None:
    memory = Memory(fits, error=error)
    found = search(memory, first, most)
    if found is None:
        assert fits == 0
        return
    assert found <= min(fits, most)
    assert memory.tried[-1] <= most
    # The next larger size was tried, or is not allowed: twice as much, and one more if an odd size
    # was halved.
    assert 2 * found + 1 > min(fits, most)
    assert len(memory.tried) < 20


def test_it_stops_where_more_at_once_is_not_faster() -> None:
    memory = Memory(fits=10_000, parallel=16)
    assert search(memory, first=4, most=1024) == 16
    assert memory.tried == [4, 8, 16, 32]


def test_a_model_s_own_limit_holds() -> None:
    limited = replace(HANDLE.spec, max_batch_samples=10_000)
    assert most_chunks(HANDLE.spec, 1000) == LARGEST
    assert most_chunks(limited, 1000) == 10
    assert most_chunks(limited, 20_000) == 1
    assert SplitHandle(replace(HANDLE, spec=limited)).spec.max_batch_samples == 5000


def test_batches_beyond_that_limit_are_refused_on_a_gpu(
    one_sentence: Callable[[BaseException], str],
) -> None:
    limited = replace(HANDLE, spec=replace(HANDLE.spec, max_batch_samples=10_000))
    chunking = Chunking.for_model(HANDLE.spec, seconds=2.0)
    fingerprint = {"numeric": {"precision": "tf32"}, "model": {}}
    plan: Any = SimpleNamespace(fingerprint=fingerprint, packing=2, field=None)

    def size(handle: Any, device: str, **options: Any) -> int:
        config = load_config(None, {"source": "in", "out": "out", **options})
        job = make_job(config, handle, chunking, plan, device=device, threads=1)
        return job.settings.batch_size

    assert chunking.samples == 1600
    assert size(limited, "cuda", batch_size=6) == 6
    assert size(limited, "cpu", batch_size=7) == size(HANDLE, "cuda", batch_size=7) == 7
    with pytest.raises(ConfigError) as caught:
        size(limited, "cuda", batch_size=7)
    assert "7 chunks of 2.0 s are too large a batch for mdct" in one_sentence(caught.value)
    longer = replace(limited, spec=replace(limited.spec, max_batch_samples=1500))
    with pytest.raises(ConfigError, match="lower --batch-size or --chunk-seconds"):
        size(longer, "cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CPU that passes for a GPU of a certain memory; the default batch of mdct is 64."""
    state = SimpleNamespace(total=1000, used=0, most=10**9, sizes=[])
    encode = mdct.Mdct.encode

    def limited(self: Any, audio: torch.Tensor) -> torch.Tensor:
        if len(audio) > state.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        state.sizes.append(len(audio))
        state.used = state.total * len(audio) // 1000
        return encode(self, audio)

    monkeypatch.setattr(mdct.Mdct, "encode", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    free = lambda device: (state.total - state.used, state.total)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(batch, "GAIN", 0.0)  # times are as they come
    return state


def test_out_of_memory_halves_and_says_so_if_nothing_fits(
    gpu: SimpleNamespace, one_sentence: Callable[[BaseException], str]
) -> None:
    gpu.most = 20
    assert find_batch_size(HANDLE.load("cpu"), 1600, "cpu", "float32") == 16
    gpu.most = 0
    with pytest.raises(ModelError) as caught:
        find_batch_size(HANDLE.load("cpu"), 1600, "cpu", "float32")
    assert "one chunk of 2.0 s does not fit" in one_sentence(caught.value)


def test_some_memory_stays_free(gpu: SimpleNamespace) -> None:
    """Of 1000 units a chunk takes one; 512 leave a half, 1024 nothing."""
    assert find_batch_size(HANDLE.load("cpu"), 160, "cpu", "float32") == 512
    assert max(gpu.sizes) == 1024


def test_a_store_s_batch_size_is_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: Callable[[BaseException], str]
) -> None:
    found = iter([48, 96])
    monkeypatch.setattr(tuning, "find_batch_size", lambda *_: next(found))
    storage, model = Storage(str(tmp_path)), HANDLE.load("cpu")
    chunking = SimpleNamespace(model_samples=lambda spec: 160)
    job: Any = SimpleNamespace(chunking=chunking, settings=SimpleNamespace(precision="tf32"))
    assert settled_batch_size(storage, model, job, "cuda") == 48
    assert settled_batch_size(storage, model, job, "cuda") == 48  # a resume, another worker
    for damaged in (b"{}", b"[]", b'{"batch_size": 0}', b"{"):
        storage.write(BATCH_PATH, damaged)
        with pytest.raises(StoreError) as caught:
            settled_batch_size(storage, model, job, "cuda")
        assert "plan/batch.json is damaged" in one_sentence(caught.value)


def test_of_two_workers_that_search_at_once_the_first_one_s_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))

    def slow(*_: Any) -> int:
        storage.create(BATCH_PATH, b'{"batch_size": 8}')  # the other one is done meanwhile
        return 32

    monkeypatch.setattr(tuning, "find_batch_size", slow)
    chunking = SimpleNamespace(model_samples=lambda spec: 160)
    job: Any = SimpleNamespace(chunking=chunking, settings=SimpleNamespace(precision="tf32"))
    assert settled_batch_size(storage, HANDLE.load("cpu"), job, "cuda") == 8
