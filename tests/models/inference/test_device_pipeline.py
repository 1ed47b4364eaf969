"""Batches through a device pipeline: the same latents in order, and when it waits for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentmill.models.families import mdct
from latentmill.models.inference import device_pipeline
from latentmill.models.inference.device_pipeline import (
    CHANGES_UNTIL_TRIM,
    DevicePipeline,
    PlainTransport,
)
from latentmill.record import FloatArray

MODEL = mdct.build(hop=16, sample_rate=800).load("cpu")


class SlowTransport(PlainTransport):
    """Takes its time like a GPU; writes down what happens when."""

    def __init__(self, ahead: int) -> None:
        self.prefetch = ahead
        self.log: list[str] = []

    def send(self, audio: FloatArray) -> torch.Tensor:
        self.log.append("send")
        return super().send(audio)

    def fetch(self, latents: torch.Tensor) -> torch.Tensor:
        self.log.append("fetch")
        return super().fetch(latents)

    def wait(self, pending: torch.Tensor) -> FloatArray:
        self.log.append("wait")
        return super().wait(pending)


def batches(count: int) -> list[FloatArray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((2, 1, 160), dtype=np.float32) for _ in range(count)]


@given(count=st.integers(0, 6), ahead=st.integers(0, 3))
def test_latents_are_the_model_s_in_order(count: int, ahead: int) -> None:
    audio = batches(count)
    pipeline = DevicePipeline(MODEL, transport=SlowTransport(ahead))
    latents = [z for batch in audio for z in pipeline.push(batch)]
    assert len(latents) == max(0, count - ahead)
    latents += pipeline.flush()
    assert list(pipeline.flush()) == []
    for batch, z in zip(audio, latents, strict=True):
        assert np.array_equal(z, MODEL.encode(torch.from_numpy(batch)).numpy())


def test_a_batch_is_queued_before_the_one_ahead_is_awaited() -> None:
    transport = SlowTransport(ahead=1)
    pipeline = DevicePipeline(MODEL, transport=transport)
    for batch in batches(3):
        list(pipeline.push(batch))
    list(pipeline.flush())
    queue = ["send", "fetch"]
    assert transport.log == [*queue, *queue, "wait", *queue, "wait", "wait"]


def test_on_a_cpu_each_batch_comes_back_at_once() -> None:
    pipeline = DevicePipeline(MODEL)
    assert [len(list(pipeline.push(batch))) for batch in batches(3)] == [1, 1, 1]


def test_batches_of_changing_shapes_do_not_pile_up_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(device_pipeline, "trim_memory", lambda: trims.append(1))
    monkeypatch.setattr(PlainTransport, "_shape", None)
    monkeypatch.setattr(PlainTransport, "_changes", 0)
    same, other = np.zeros((1, 1, 160), np.float32), np.zeros((1, 1, 320), np.float32)
    for _ in range(100):
        list(DevicePipeline(MODEL).push(same))  # each unit has its own device pipeline
    assert not trims  # holes of one size are filled again
    for _ in range(CHANGES_UNTIL_TRIM):
        list(DevicePipeline(MODEL).push(other))
        list(DevicePipeline(MODEL).push(same))
    assert len(trims) == 2


def test_the_numeric_mode_is_the_model_s_alone() -> None:
    class Product:
        spec = MODEL.spec

        def encode(self, audio: torch.Tensor) -> torch.Tensor:
            self.dtype = (audio @ audio.transpose(1, 2)).dtype
            return audio

        decode = MODEL.decode

    model = Product()
    for batch in batches(1):
        list(DevicePipeline(model, precision="bf16").push(batch))
    assert model.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    model = mdct.build(hop=16, sample_rate=800).load("cuda")
    audio = batches(5)
    pipeline = DevicePipeline(model, "cuda")
    latents = [*(z for batch in audio for z in pipeline.push(batch)), *pipeline.flush()]
    for batch, z in zip(audio, latents, strict=True):
        assert np.allclose(z, MODEL.encode(torch.from_numpy(batch)).numpy(), atol=1e-5)
    staged = [pipeline.stage(batch.shape) for batch in audio[:3]]
    assert len({one.ctypes.data for one in staged}) == 3  # one is filled while two are queued
    latents, pipeline = [], DevicePipeline(model, "cuda")
    for batch in audio:
        memory = pipeline.stage(batch.shape)
        memory[:] = batch
        latents += pipeline.push(memory)
    latents += pipeline.flush()
    for batch, z in zip(audio, latents, strict=True):
        assert np.allclose(z, MODEL.encode(torch.from_numpy(batch)).numpy(), atol=1e-5)


class SmallMemory:
    """A model on a device that holds batches of a few elements only."""

    spec = MODEL.spec

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.sizes: list[int] = []

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(audio))
        if len(audio) > self.elements:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return MODEL.encode(audio)


@pytest.mark.parametrize("elements", [2, 3, 5])
def test_a_device_that_runs_out_of_memory_gets_half_batches_from_then_on(elements: int) -> None:
    audio = [np.repeat(batch, [2, 3], axis=0) for batch in batches(3)]  # 5 elements
    model = SmallMemory(elements)
    pipeline = DevicePipeline(model, transport=SlowTransport(1))
    if elements == 2:
        with pytest.raises(torch.OutOfMemoryError):
            list(pipeline.push(audio[0]))
        assert model.sizes == [5, 3]  # once, and no more
        return
    latents = [z for batch in audio for z in (*pipeline.push(batch),)] + list(pipeline.flush())
    for batch, z in zip(audio, latents, strict=True):
        assert np.allclose(z, MODEL.encode(torch.from_numpy(batch)).numpy(), atol=1e-6)
    assert model.sizes == ([5] * 3 if elements == 5 else [5, 3, 2, 3, 2, 3, 2])


def test_one_element_cannot_be_halved() -> None:
    pipeline = DevicePipeline(SmallMemory(0))
    with pytest.raises(torch.OutOfMemoryError):
        list(pipeline.push(batches(1)[0][:1]))


def test_batches_are_staged_in_memory_that_is_reused() -> None:
    pipeline = DevicePipeline(MODEL)
    audio, expected, addresses = batches(4), [], set()
    audio[2] = audio[2][:1, :, :64]  # a smaller batch
    latents = []
    for batch in audio:
        staged = pipeline.stage(batch.shape)
        staged[:] = batch
        latents += pipeline.push(staged)
        addresses.add(staged.ctypes.data)
        expected.append(MODEL.encode(torch.from_numpy(batch)).numpy())
    assert len(addresses) == 1
    for z, wanted in zip(latents, expected, strict=True):
        assert np.array_equal(z, wanted)


def test_latents_that_are_a_view_of_the_audio_are_copied() -> None:
    class Reshape:
        spec = MODEL.spec
        decode = MODEL.decode

        def encode(self, audio: torch.Tensor) -> torch.Tensor:
            return audio.unflatten(2, (16, -1)).flatten(1, 2)

    pipeline, latents = DevicePipeline(Reshape()), []
    for value in (1.0, 2.0):
        staged = pipeline.stage((1, 1, 160))
        staged[:] = value
        latents += pipeline.push(staged)
    assert [set(z.ravel().tolist()) for z in latents] == [{1.0}, {2.0}]
