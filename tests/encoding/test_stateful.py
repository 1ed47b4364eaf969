"""Units with `stitch: state`: each chunk continues from the state after the one before it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.encoding.batches import Packer, expected_batches
from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.lanes import reading_order
from latentmill.encoding.loading import EncodeSettings
from latentmill.encoding.single import encode_chunked
from latentmill.encoding.timings import Timings
from latentmill.errors import ConfigError
from latentmill.models.base import ModelSpec
from latentmill.models.inference.device_pipeline import DevicePipeline, PlainTransport
from support.stateful_model import HOP, Decaying, build, expected
from support.units import encode, items_of, records

SPEC = build().spec
CHUNKING = Chunking.for_model(SPEC)
CHUNK = CHUNKING.samples
LENGTHS = [5, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK - 1, 2 * CHUNK + 40, 7 * CHUNK + 3, 100]


def write(folder: Path, lengths: list[int], level: float = 0.1) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    sounds = {}
    for number, samples in enumerate(lengths):
        random = np.random.default_rng(number)
        sounds[f"{number:02}"] = random.uniform(0, level, samples).astype(np.float32)
        soundfile.write(folder / f"{number:02}.wav", sounds[f"{number:02}"], 8000, "FLOAT")
    return sounds


def test_the_chunks_do_not_overlap() -> None:
    assert Chunking("state", CHUNK, CHUNK, 0, 0) == CHUNKING
    trimmed = Chunking.for_model(SPEC, stitch="trim")
    assert (trimmed.overlap, trimmed.step) == (16, 24 * HOP)


@settings(max_examples=40)
@given(samples=st.integers(1, 6 * CHUNK), frames=st.integers(1, 60))
def test_an_item_of_any_length_in_chunks_of_any_length(samples: int, frames: int) -> None:
    sound = np.random.default_rng(samples).uniform(0, 1, samples).astype(np.float32)
    chunking = Chunking.for_model(SPEC, samples=frames * HOP)
    latent = encode_chunked(Decaying(SPEC), torch.from_numpy(sound[None]), chunking)
    wanted = expected(sound)
    assert latent.shape == wanted.shape
    assert np.allclose(latent.numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("packing", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("count", [3, 40])
def test_a_unit_s_latents_are_those_of_the_whole_items(
    tmp_path: Path, batch_size: int, packing: int, count: int
) -> None:
    sounds = write(tmp_path, (LENGTHS * 5)[:count])
    run = EncodeSettings(dtype="float32", batch_size=batch_size, packing=packing)
    model, timings = Decaying(SPEC, seconds=1e-3), Timings()
    done = records(encode(items_of(tmp_path), model, CHUNKING, run, timings))
    assert timings.snapshot()["model_seconds"] >= 1e-3 * len(model.batches)
    for key, sound in sounds.items():
        assert np.allclose(done[key].latent, expected(sound), rtol=1e-5)
        assert done[key].num_samples == len(sound)
    encoded = sum(rows for rows, _ in model.batches)
    assert encoded == sum(math.ceil(len(sound) / CHUNK) for sound in sounds.values())
    assert any(with_state for _, with_state in model.batches)
    if batch_size > 1 and count > 3 and packing > 1:
        assert max(with_state for _, with_state in model.batches) > 1  # items share batches


def test_the_batches_depend_on_the_items_alone(tmp_path: Path) -> None:
    write(tmp_path, LENGTHS * 3)
    items, results = items_of(tmp_path), []
    for threads in (1, 2, 5):
        run = EncodeSettings(dtype="float32", batch_size=4, load_threads=threads)
        model = Decaying(SPEC)
        done = records(encode(items, model, CHUNKING, run))
        results.append((model.batches, {key: one.latent.tobytes() for key, one in done.items()}))
    assert results[0] == results[1] == results[2]


def test_the_expected_batches_are_those_that_the_model_gets(tmp_path: Path) -> None:
    sounds = write(tmp_path, LENGTHS * 3)
    items = reading_order(items_of(tmp_path))
    model = Decaying(SPEC)
    encode(items, model, CHUNKING, EncodeSettings(dtype="float32", batch_size=4))
    planned = expected_batches(
        items, lambda item: len(sounds[item.key]) / 8000, SPEC, CHUNKING, batch_size=4
    )
    assert [rows for rows, _ in planned] == [rows for rows, _ in model.batches]


def test_a_chunk_is_never_in_the_batch_of_the_one_before() -> None:
    packer = Packer(CHUNKING, 8)
    chunk = Chunk(0, np.zeros((1, CHUNK), np.float32))
    short = Chunk(0, np.zeros((1, HOP), np.float32))
    batches = []
    later, short = replace(chunk, frame=40), replace(short, frame=40)
    for owner, one in [(1, chunk), (2, chunk), (1, later), (3, chunk), (2, short), (1, short)]:
        batches += [batch.owners for batch in packer.add(owner, one)]
    batches += [batch.owners for batch in packer.flush()]
    assert batches == [(1, 2), (1, 3), (2, 1)]


def states_of(encoder: Any, pending: dict[int, Any]) -> int:
    return sum(one.state is not None for one in pending.values())


def test_states_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two for each lane, none after an item's end, also if it fails half-way.

    All last chunks have different lengths, so that they wait for a batch.
    """
    from latentmill.encoding import encoder as module

    write(tmp_path, [*[4 * CHUNK + n for n in range(30)], 4 * CHUNK, CHUNK])
    broken = tmp_path / "07.wav"
    broken.write_bytes(broken.read_bytes()[: -3 * CHUNK])
    held: list[int] = []
    outcomes = module.UnitEncoder._outcomes

    def noted(self: Any, pending: dict[int, Any], number: int) -> Any:
        held.append(states_of(self, pending))
        return outcomes(self, pending, number)

    monkeypatch.setattr(module.UnitEncoder, "_outcomes", noted)
    run = EncodeSettings(dtype="float32", batch_size=4)
    done = encode(items_of(tmp_path), Decaying(SPEC), CHUNKING, run)
    assert [one.key for one in done if one.status == "failed"] == ["07"]
    assert 16 < max(held) <= 32
    assert held[-1] == 0


class Ahead(PlainTransport):
    """A transport that queues batches ahead, as on a GPU."""

    prefetch = 2
    _memory = None

    def stage(self, shape: tuple[int, int, int]) -> Any:
        return np.empty(shape, np.float32)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_overflows_continues_from_a_state_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Also if the next chunk is already queued with the state that overflowed."""
    from latentmill.encoding import encoder as module

    if ahead:
        monkeypatch.setattr(
            module, "DevicePipeline", lambda *args, step: DevicePipeline(*args, transport=Ahead())
        )
    sounds = write(tmp_path, [6 * CHUNK, 6 * CHUNK + 8, 3 * CHUNK], level=0.1)
    sounds["03"] = np.concatenate([sounds["00"][:CHUNK], 20 * sounds["01"]])
    soundfile.write(tmp_path / "03.wav", sounds["03"], 8000, "FLOAT")
    run = EncodeSettings(dtype="float32", batch_size=2, precision="bf16")
    done = records(encode(items_of(tmp_path), Decaying(SPEC, overflow=3), CHUNKING, run))
    assert done.keys() == sounds.keys()
    for key, sound in sounds.items():
        assert np.allclose(done[key].latent, expected(sound), rtol=1e-5)


class SmallMemory(Decaying):
    """A model that runs out of memory for more than two rows."""

    def encode_step(self, audio: torch.Tensor, states: Any) -> Any:
        if len(audio) > 2:
            raise torch.OutOfMemoryError
        return super().encode_step(audio, states)


def test_halves_of_a_batch_have_their_states(tmp_path: Path) -> None:
    sounds = write(tmp_path, [3 * CHUNK] * 6)
    run = EncodeSettings(dtype="float32", batch_size=3)
    model = SmallMemory(SPEC)
    done = records(encode(items_of(tmp_path), model, CHUNKING, run))
    for key, sound in sounds.items():
        assert np.allclose(done[key].latent, expected(sound), rtol=1e-5)
    assert (2, 2) in model.batches
    assert (1, 1) in model.batches


def test_a_model_without_a_state_is_refused() -> None:
    spec: ModelSpec = replace(SPEC, step_frames=0, stitch="trim")
    with pytest.raises(ConfigError, match="use --stitch trim"):
        Chunking.for_model(spec, stitch="state")
