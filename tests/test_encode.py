"""A unit of real files through decode threads, batches and a model: nothing mixed, nothing lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile as sf
import torch

from latentmill.audio import MediaFile
from latentmill.chunks import Chunking
from latentmill.decode import decode_latent
from latentmill.encode import UnitEncoder
from latentmill.errors import ModelError
from latentmill.meter import Meter
from latentmill.models import mdct
from latentmill.models.base import Autoencoder, Context, ModelSpec
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.sources.filters import Filters
from latentmill.sources.folder import FolderSource
from latentmill.sources.reading import UnitReader
from latentmill.unit_audio import Decoding, EncodeSettings, LocalAudio
from support.recordings import CORPUS, noise

RATE = 8000
MODEL = mdct.build(hop=64, sample_rate=RATE).load("cpu")
CHUNKING = Chunking.for_model(MODEL.spec, seconds=0.5)
EXTENSIONS = ("wav", "flac", "ogg", "mp3", "aiff")


def items_of(folder: Path) -> tuple[Item, ...]:
    return tuple(sorted(FolderSource(str(folder), EXTENSIONS).items(), key=lambda i: i.key))


def encode(
    items: Sequence[Item],
    model: Autoencoder = MODEL,
    chunking: Chunking = CHUNKING,
    settings: EncodeSettings = EncodeSettings(dtype="float32", batch_size=4),  # noqa: B008
    meter: Meter | None = None,
) -> list[Outcome]:
    """Every item's outcome; always in the items' order, each once."""
    encoder = UnitEncoder(model, chunking, settings, meter)
    audio = LocalAudio(items, Decoding(model.spec, chunking, settings), encoder.meter)
    with contextlib.closing(audio):
        outcomes = list(encoder.encode(audio))
    assert [outcome.key for outcome in outcomes] == [item.key for item in items]
    for outcome in outcomes:
        assert (outcome.record is not None) == (outcome.status == "encoded")
        assert (outcome.reason is None) == (outcome.status == "encoded")
        assert outcome.reason is None or ("\n" not in outcome.reason and outcome.reason)
    assert not decode_threads()
    return outcomes


def decode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_error_of_a_decode_thread_is_raised_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Decoding, item: Item, reader: UnitReader) -> Iterator[object]:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Decoding, "read", broken)
    sf.write(tmp_path / "a.wav", noise(1.0, RATE), RATE)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        encode(items_of(tmp_path))
    assert not decode_threads()


def records(outcomes: Sequence[Outcome]) -> dict[str, Record]:
    return {outcome.key: outcome.record for outcome in outcomes if outcome.record is not None}


def statuses(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.key: outcome.status for outcome in outcomes}


def test_a_corpus_becomes_records(corpus: Path) -> None:
    meter = Meter()
    done = records(encode(items_of(corpus), meter=meter))
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
    assert meter.audio_seconds == pytest.approx(encoded, rel=0.2)
    stages = ("audio", "read", "decode", "wait", "model")  # the others are the worker's
    assert all(meter.snapshot()[f"{stage}_seconds"] > 0 for stage in stages)


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


def test_the_number_of_decode_threads_changes_no_bit(corpus: Path) -> None:
    items = items_of(corpus)
    one, *others = (
        encode(items, settings=EncodeSettings(batch_size=3, decode_threads=threads))
        for threads in (1, 2, 4)
    )
    for outcomes in others:
        for outcome, wanted in zip(outcomes, one, strict=True):
            assert outcome.record is not None
            assert wanted.record is not None
            assert outcome.record.latent.tobytes() == wanted.record.latent.tobytes()


def without_length(flac: bytes) -> bytes:
    """A FLAC that does not say how long it is, as a live encoder writes it."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


@pytest.fixture
def broken(tmp_path: Path, corpus: Path) -> Path:
    """Good files between bad ones."""
    long = (corpus / "album/stereo.flac").read_bytes()
    good = (corpus / "boundary.wav").read_bytes()
    nan = np.full(4 * RATE, 0.1, np.float32)
    nan[3 * RATE] = np.nan  # several chunks are packed by then
    for name in ("a0.wav", "b0.wav", "c0.wav", "d0.wav", "e0.wav", "f0.wav", "g0.wav"):
        (tmp_path / name).write_bytes(good)
    (tmp_path / "a1.flac").write_bytes(long[: len(long) * 3 // 4])
    (tmp_path / "b1.flac").write_bytes(b"")
    sf.write(tmp_path / "c1.wav", nan, RATE, subtype="FLOAT")
    (tmp_path / "d1.ogg").write_bytes(b"no audio at all " * 100)
    (tmp_path / "e1.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "f1.wav").write_bytes(good)
    (tmp_path / "f1.json").write_text('{"title": ')
    sf.write(tmp_path / "g1.wav", np.zeros(0, np.float32), RATE)
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_file_that_fails_says_why_and_leaves_its_neighbours_alone(
    broken: Path, batch_size: int, corpus: Path
) -> None:
    settings = EncodeSettings(dtype="float32", batch_size=batch_size)
    outcomes = encode(items_of(broken), settings=settings)
    reasons = {one.key: one.reason for one in outcomes if one.status == "failed"}
    assert list(reasons) == ["a1", "b1", "c1", "d1", "e1", "f1", "g1"]
    for key, says in {
        "a1": "truncated",
        "b1": "empty",
        "c1": "NaN",
        "e1": "no such file",
        "f1": "f1.json is no valid JSON",
    }.items():
        assert says in (reasons[key] or "")
    wanted = records(encode([i for i in items_of(corpus) if i.key == "boundary"]))["boundary"]
    for record in records(outcomes).values():
        assert np.abs(record.latent - wanted.latent).max() <= 1e-6


def test_a_truncated_file_is_kept_where_that_is_allowed(broken: Path) -> None:
    settings = EncodeSettings(dtype="float32", allow_truncated=True)
    assert statuses(encode(items_of(broken), settings=settings))["a1"] == "encoded"


@pytest.fixture
def planned(tmp_path: Path, corpus: Path) -> tuple[Item, ...]:
    """Copies of one file as they were listed, before a test changes them."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.wav").write_bytes((corpus / "boundary.wav").read_bytes())
    return items_of(tmp_path)


def test_a_file_that_changed_after_the_plan_fails(planned: tuple[Item, ...]) -> None:
    longer, rewritten = Path(planned[0].uri), Path(planned[1].uri)
    size = planned[0].size
    sf.write(longer, noise(1.5, RATE), RATE, subtype="FLOAT")
    now = longer.stat().st_size
    os.utime(rewritten, ns=(0, int(planned[1].version) + 1))
    outcomes = encode(planned)
    assert [outcome.reason for outcome in outcomes] == [
        f"changed since the plan was made ({size} bytes then, {now} now)",
        "changed since the plan was made (the same size, written anew)",
        None,
    ]
    mended = EncodeSettings(allow_changed=True)
    assert {outcome.status for outcome in encode(planned, settings=mended)} == {"encoded"}
    # A listing that knew neither size nor version promised nothing.
    unknown = [replace(item, size=0, version="") for item in planned]
    assert {outcome.status for outcome in encode(unknown)} == {"encoded"}


def test_a_remote_file_is_compared_by_its_size(planned: tuple[Item, ...]) -> None:
    remote = fsspec.filesystem("memory")
    data = Path(planned[0].uri).read_bytes()
    for name in ("kept", "grown"):
        remote.pipe_file(f"/changes/{name}.wav", data)
    items = list(FolderSource("memory://changes", EXTENSIONS).items())
    remote.pipe_file("/changes/grown.wav", data + bytes(8))
    items = [replace(item, version="an etag") for item in items]
    assert {one.key: one.reason for one in encode(items)} == {
        "grown": f"changed since the plan was made ({len(data)} bytes then, {len(data) + 8} now)",
        "kept": None,
    }


def test_group_and_role_come_from_the_metadata(planned: tuple[Item, ...]) -> None:
    given = {"a": {"group": "song", "role": "drums"}, "b": {"group": 3, "role": None, "x": 1}}
    for item in planned[:2]:
        Path(item.uri).with_suffix(".json").write_text(json.dumps(given[item.key]))
    done = records(encode(items_of(Path(planned[0].uri).parent)))
    assert [(done[key].group, done[key].role) for key in "abc"] == [
        ("song", "drums"),
        (None, None),
        (None, None),
    ]
    assert [done[key].metadata for key in "abc"] == [given["a"], given["b"], {}]


def test_an_error_that_nobody_foresaw_fails_its_item_alone(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UnitReader.open

    def fragile(self: UnitReader, item: Item) -> MediaFile:
        if item.key == "lame":
            raise ZeroDivisionError("a bug\nin a decoder")
        return real(self, item)

    monkeypatch.setattr(UnitReader, "open", fragile)
    outcomes = encode(items_of(corpus))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert [outcome.key for outcome in failed] == ["lame"]
    assert failed[0].reason == "ZeroDivisionError while reading: a bug in a decoder"


def test_filters_skip_by_name(corpus: Path, tmp_path: Path) -> None:
    settings = EncodeSettings(filters=Filters(min_seconds=0.21, max_seconds=2.3))
    outcomes = {one.key: one for one in encode(items_of(corpus), settings=settings)}
    skipped = {key: one.reason for key, one in outcomes.items() if one.status == "skipped"}
    assert skipped == {
        "album/long": "max_seconds: 3.700 s",
        "lame": "max_seconds: 2.600 s",
        "tiny": "min_seconds: 0.004 s",
    }
    assert {one.status for key, one in outcomes.items() if key not in skipped} == {"encoded"}


def test_filters_work_where_the_header_does_not_say_the_length(tmp_path: Path) -> None:
    for name, seconds in (("brief", 0.3), ("middling", 1.0), ("long", 3.0)):
        path = tmp_path / f"{name}.flac"
        sf.write(path, noise(seconds, RATE), RATE)
        path.write_bytes(without_length(path.read_bytes()))
    filters = Filters(min_seconds=0.5, max_seconds=2.0)
    settings = EncodeSettings(filters=filters, batch_size=2)
    outcomes = encode(items_of(tmp_path), settings=settings)
    assert [(one.key, one.status, one.reason) for one in outcomes] == [
        ("brief", "skipped", "min_seconds: 0.300 s"),
        ("long", "skipped", "max_seconds: 3.000 s"),
        ("middling", "encoded", None),
    ]


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
    fast = EncodeSettings(dtype="float32", batch_size=4, precision="bf16")
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
        assert "where its spec promises" in one_sentence(caught.value)


def test_an_empty_unit_has_no_outcomes() -> None:
    assert encode([]) == []


def sparse_wav(path: Path, samples: int) -> Path:
    """A 16-bit mono WAV of silence that takes no room on the disk."""
    size = 2 * samples
    fields = (b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", size)
    with path.open("wb") as file:
        file.write(struct.pack("<4sI4s4sIHHIIHH4sI", *fields))
        file.truncate(44 + size)
    return path


@pytest.mark.parametrize("events", [0, 1, 3, 20])
def test_closing_in_the_middle_ends_the_threads_at_once(tmp_path: Path, events: int) -> None:
    sparse_wav(tmp_path / "a.wav", 1_000_000_000)  # seconds of work for each thread
    sparse_wav(tmp_path / "b.wav", 1_000_000_000)
    settings = EncodeSettings(decode_threads=2)
    audio = LocalAudio(items_of(tmp_path), Decoding(MODEL.spec, CHUNKING, settings), Meter())
    assert len(list(itertools.islice(audio, events))) == events
    start = time.perf_counter()
    audio.close()
    assert time.perf_counter() - start < 2
    assert not decode_threads()
    audio.close()


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
def test_a_long_item_is_streamed(tmp_path: Path) -> None:
    samples = 30_000_000  # an hour: 120 MB as float32
    sparse_wav(tmp_path / "a.wav", samples)
    model = Averager()
    chunking = Chunking.for_model(model.spec, seconds=8)
    outcomes = encode(items_of(tmp_path), model, chunking, EncodeSettings(batch_size=4))
    assert outcomes[0].record is not None
    assert outcomes[0].record.num_samples == samples
    assert outcomes[0].record.latent.shape == (1, samples // RATE)
    assert 0 < model.most < 20e6
