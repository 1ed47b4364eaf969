"""A unit of real files through decode threads, batches and a model: nothing mixed, nothing lost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from latentmill.audio import pieces
from latentmill.decoding.decoder import decode_latent
from latentmill.encoding import unit_audio
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.loading import EncodeSettings
from latentmill.encoding.timings import Timings
from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec
from latentmill.models.families import mdct
from support.recordings import CORPUS
from support.units import (
    MODEL,
    RATE,
    encode,
    items_of,
    records,
    sparse_wav,
)


def test_a_corpus_becomes_records(corpus: Path) -> None:
    timings = Timings()
    done = records(encode(items_of(corpus), timings=timings))
    assert len(done) == len(CORPUS)
    for name, (seconds, rate, channels, _) in CORPUS.items():
        record = done[name.rsplit(".", 1)[0]]
        samples = -(-round(seconds * rate) * RATE // rate)
        assert record.num_samples == samples
        assert record.latent.shape == (64, MODEL.spec.frames(MODEL.spec.padded(samples)))
        assert record.source_sample_rate == rate
        assert record.source_channels == channels
        assert 0 < record.rms < record.peak
        assert record.content_hash.startswith("xxh3:")
        assert record.source_uri == str(corpus / name)
    assert done["album/long"].metadata == {"title": "Länge", "bpm": 120, "text": "a long piece"}
    assert done["boundary"].metadata == {}
    encoded = sum(record.duration for record in done.values())
    assert timings.audio_seconds == pytest.approx(encoded, rel=0.2)
    stages = ("audio", "read", "decode", "wait", "model")  # the others are the worker's
    assert all(timings.snapshot()[f"{stage}_seconds"] > 0 for stage in stages)


def test_a_latent_is_that_of_the_file_encoded_whole(corpus: Path) -> None:
    record = records(encode(items_of(corpus)))["album/long"]
    audio, _ = sf.read(corpus / "album/long.wav", dtype="float32")
    padded = torch.zeros(1, 1, MODEL.spec.padded(len(audio)))
    padded[0, 0, : len(audio)] = torch.from_numpy(audio)
    assert np.abs(record.latent - MODEL.encode(padded)[0].numpy()).max() < 1e-5


@pytest.mark.parametrize("stitch", ["trim", "crossfade", "none"])
def test_neighbours_and_batch_size_change_nothing(corpus: Path, stitch: str) -> None:
    items = items_of(corpus)
    chunking = Chunking.for_model(MODEL.spec, stitch=stitch, seconds=0.5)  # type: ignore[arg-type]
    alone = {item.key: records(encode([item], chunking=chunking))[item.key] for item in items}
    for batch_size, order in ((1, items), (3, items[::-1]), (64, items)):
        settings = EncodeSettings(dtype="float32", batch_size=batch_size)
        for key, record in records(encode(order, MODEL, chunking, settings)).items():
            assert np.abs(record.latent - alone[key].latent).max() <= 1e-6
            assert replace(record, latent=alone[key].latent) == alone[key]


def test_neighbours_and_batch_size_change_little_in_lin_cae(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("linear_cae")
    from latentmill.models import registry
    from support.linear_cae_weights import use_cache, write_cache

    write_cache(tmp_path)
    use_cache(monkeypatch, tmp_path)
    model = registry.resolve("lin-cae", {}).load("cpu")
    chunking = Chunking.for_model(model.spec, seconds=1.0, overlap=0.2)
    items = [item for item in items_of(corpus) if item.key in ("lame", "album/stereo", "tiny")]
    together = records(encode(items, model, chunking))
    assert len(together) == 3
    for item in items:
        settings = EncodeSettings(dtype="float32", batch_size=1)
        latent = records(encode([item], model, chunking, settings))[item.key].latent
        other = together[item.key].latent
        assert latent.shape == other.shape
        assert np.abs(latent - other).max() <= 1e-4 * np.abs(latent).max()


def test_real_recordings_come_back(shared_audio: Path, tmp_path: Path) -> None:
    files = [path for kind in ("flac", "ogg") for path in sorted((shared_audio / kind).iterdir())]
    files = [path for path in files if path.suffix in (".flac", ".ogg")]
    smallest = sorted(files, key=lambda path: path.stat().st_size)[:12]
    for path in smallest:
        (tmp_path / path.name).symlink_to(path)
    model = mdct.build(hop=256).load("cpu")
    chunking = Chunking.for_model(model.spec, seconds=0.5)
    for record in records(encode(items_of(tmp_path), model, chunking)).values():
        audio = decode_latent(model, record.latent, record.num_samples, chunking)
        source, rate = sf.read(record.source_uri, dtype="float32", always_2d=True)
        assert record.source_sample_rate == rate
        if rate == model.spec.sample_rate:
            assert np.abs(audio[0] - source.mean(axis=1)).max() < 1e-5
        assert np.sqrt(np.square(audio).mean()) == pytest.approx(record.rms, rel=1e-3)


def test_latents_that_float16_cannot_hold_fail(corpus: Path) -> None:
    loud = mdct.build(hop=64, sample_rate=RATE, scale_factor=1e8).load("cpu")
    items = items_of(corpus)
    failed = encode(items, loud, settings=EncodeSettings(dtype="float16"))
    assert {outcome.status for outcome in failed} == {"failed"}
    assert "float16" in (failed[0].reason or "")
    kept = encode(items, loud, settings=EncodeSettings(dtype="float32"))
    assert {outcome.status for outcome in kept} == {"encoded"}


class Overflowing:
    """A model whose half precision overflows on loud chunks, as float16 does."""

    def __init__(self) -> None:
        self.spec, self.decode = MODEL.spec, MODEL.decode
        self.calls: list[bool] = []

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        half = torch.is_autocast_enabled("cpu")
        self.calls.append(half)
        latents = MODEL.encode(audio)
        return latents.where(latents.abs() < 0.5, torch.nan) if half else latents


def test_what_overflows_in_a_fast_mode_is_encoded_again_in_float32(corpus: Path) -> None:
    items = items_of(corpus)
    model = Overflowing()
    fast = EncodeSettings(dtype="float32", batch_size=1, precision="bf16")
    again = records(encode(items, model, settings=fast))
    wanted = records(encode(items))
    assert again.keys() == wanted.keys()
    for key, record in again.items():
        assert np.array_equal(record.latent, wanted[key].latent)
    assert 0 < model.calls.count(False) < model.calls.count(True)  # once each, where it must be


def test_what_float32_cannot_save_fails_after_one_more_try(corpus: Path) -> None:
    loud = mdct.build(hop=64, sample_rate=RATE, scale_factor=1e8).load("cpu")
    settings = EncodeSettings(dtype="float16", precision="bf16")
    assert {one.status for one in encode(items_of(corpus), loud, settings=settings)} == {"failed"}


def test_a_model_that_does_not_keep_its_spec_is_refused(
    corpus: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    """Its latents would be stored at wrong times."""

    class Wrong:
        def __init__(self, spec: ModelSpec) -> None:
            self.spec, self.decode, self.encode = spec, MODEL.decode, MODEL.encode

    for spec in (replace(MODEL.spec, overhang=0), replace(MODEL.spec, latent_channels=1)):
        with pytest.raises(ModelError) as caught:
            encode(items_of(corpus)[:1], Wrong(spec))
        assert "by its spec they have shape" in one_sentence(caught.value)


def test_an_empty_unit_has_no_outcomes() -> None:
    assert encode([]) == []


class Averager:
    """A model with one latent number per second, so that audio alone takes memory."""

    def __init__(self) -> None:
        self.most = 0
        small = mdct.build(hop=RATE, sample_rate=RATE).spec
        self.spec: ModelSpec = replace(small, overhang=0, latent_channels=1, context=Context(0, 0))

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)  # slower than decoding, so that the queues fill up
        self.most = max(self.most, tracemalloc.get_traced_memory()[0])
        return audio.reshape(*audio.shape[:2], -1, RATE).mean(-1)

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_a_long_item_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_audio, "BUFFER_BYTES", 2 << 20)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 19)  # as much smaller as the buffer
    samples = 30_000_000  # an hour: 120 MB as float32
    sparse_wav(tmp_path / "a.wav", samples)
    model = Averager()
    chunking = Chunking.for_model(model.spec, seconds=8)
    outcomes = encode(items_of(tmp_path), model, chunking, EncodeSettings(batch_size=4))
    assert outcomes[0].record is not None
    assert outcomes[0].record.num_samples == samples
    assert outcomes[0].record.latent.shape == (1, samples // RATE)
    assert 0 < model.most < 20e6
