"""Audio files of any length in bounded memory, and mixes that are computed as they are decoded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from latentmill.decoding.decoder import LatentSource, decode_blocks, decode_latent
from latentmill.decoding.files import file_name, fitted, mixed, write_audio
from latentmill.encoding.chunks import Chunking
from latentmill.errors import ConfigError, StorageError
from latentmill.models.families import mdct
from latentmill.ops import Origin, fit, mix
from latentmill.store import store as store_module
from latentmill.store.store import LatentStore
from support.stem_files import RATE, waveform, write_stem_store, write_stems

MODEL = mdct.build(hop=256, sample_rate=44100).load("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stems(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return write_stem_store(tmp_path_factory.mktemp("store"), source)


def repeated(frames: int) -> LatentSource:
    """A latent of any length that costs no memory."""
    piece = np.random.default_rng(1).standard_normal((256, 4096)).astype(np.float32) * 0.05

    def read(start: int, count: int) -> np.ndarray:
        return piece[:, np.arange(start, start + count) % 4096]

    return LatentSource((256, frames), read)


def test_memory_does_not_grow_with_the_length() -> None:
    chunking = Chunking.for_model(MODEL.spec, seconds=2.0)
    peaks = []
    for minutes in (1, 20):
        frames = MODEL.spec.frames(minutes * 60 * 44100)
        samples, energy = 0, 0.0
        tracemalloc.start()
        blocks = decode_blocks(MODEL, repeated(frames), minutes * 60 * 44100, chunking)
        for block in blocks:
            samples += block.shape[1]
            energy += float(np.square(block).sum())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert samples == minutes * 60 * 44100
        assert energy > 0
    assert peaks[1] < peaks[0] + 2**20
    assert peaks[1] < 20 * 2**20  # the audio itself would be 202 MiB


@given(total=st.integers(1, 300), batch_size=st.integers(1, 5))
def test_blocks_are_the_audio(total: int, batch_size: int) -> None:
    model = mdct.build(hop=16, sample_rate=1600).load("cpu")
    chunking = Chunking.for_model(model.spec, seconds=0.5)
    latent = np.random.default_rng(total).standard_normal((16, total + 1)).astype(np.float32)
    samples = total * 16 - total % 16
    whole = decode_latent(model, latent, samples, chunking)
    blocks = list(decode_blocks(model, latent, samples, chunking, batch_size=batch_size))
    assert np.allclose(np.concatenate(blocks, axis=1), whole, atol=1e-6)
    assert max(block.shape[1] for block in blocks) <= chunking.samples


def test_too_many_samples_are_refused_before_anything_is_written() -> None:
    chunking = Chunking.for_model(MODEL.spec, seconds=2.0)
    with pytest.raises(ConfigError, match="at most"):
        decode_blocks(MODEL, repeated(10), 10**6, chunking)


def test_a_long_latent_stays_on_the_disk(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.decode("north/drums")
    monkeypatch.setattr(store_module, "_WHOLE_BYTES", 5000)
    monkeypatch.setattr(LatentStore, "read", None)  # the record is not read at once
    windowed = store.source("north/drums")
    assert windowed.shape == store.entry("north/drums").shape
    assert np.array_equal(store.decode("north/drums"), whole)
    assert np.array_equal(store.decode("north/drums", batch_size=3), whole)
    for decode in (store.decode_latent, store.decode_blocks):
        with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
            decode(windowed, batch_size=0)


def test_a_long_latent_that_is_damaged_is_not_played(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_stem_store(tmp_path, source)
    entry = store.entry("north/drums")
    shard = tmp_path / entry.shard
    content = bytearray(shard.read_bytes())
    content[entry.offset + entry.length // 2] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(store_module, "_WHOLE_BYTES", 5000)
    with pytest.raises(StorageError, match="does not match its hash"):
        store.decode("north/drums")


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    frames=st.integers(1, 50),
    at=st.integers(0, 49),
    count=st.integers(0, 50),
    offset=st.integers(-60, 60),
)
def test_a_mix_read_in_pieces_is_the_mix(
    lengths: list[int], frames: int, at: int, count: int, offset: int
) -> None:
    random = np.random.default_rng(frames)
    latents = [random.standard_normal((3, n)).astype(np.float32) for n in lengths]
    chunking = Chunking("crossfade", 8 * 32, 6 * 32, 2)
    origin = Origin(random.standard_normal((3, 8)).astype(np.float32), chunking)
    gains = random.uniform(-2, 2, len(latents)).tolist()
    options = [{"origin": origin, "offset": n * offset} for n in range(len(latents))]
    placed = [fit(one, frames, **how) for one, how in zip(latents, options, strict=True)]
    whole = mix(placed, gains, origin=origin)
    sources = [
        fitted(LatentSource.of(one), frames, **how)
        for one, how in zip(latents, options, strict=True)
    ]
    lazy = mixed(sources, gains, origin=origin)
    assert lazy.shape == (3, frames)
    start = min(at, frames - 1)
    end = min(start + count, frames)
    assert np.allclose(lazy.read(start, end - start), whole[:, start:end], atol=1e-5)


def test_mixes_of_other_shapes_are_refused() -> None:
    one, other = (LatentSource.of(np.zeros((2, n), np.float32)) for n in (3, 4))
    with pytest.raises(ConfigError, match="different shapes"):
        mixed([one, other], [1, 1], origin=None)
    with pytest.raises(ConfigError, match="cannot be changed"):
        fitted(LatentSource.of(np.zeros((2, 2, 3), np.float32)), 4, origin=None)


def blocks_of(audio: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, audio.shape[1], size):
        yield audio[:, start : start + size]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".FLAC"])
def test_files_come_back(store: LatentStore, source: Path, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / f"drums{suffix}"
    key, samples = "south/drums", store.entry("south/drums").num_samples
    blocks = store.decode_blocks(store.source(key), samples)
    written = write_audio(path, blocks, sample_rate=RATE, channels=1, num_samples=samples)
    audio, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    assert soundfile.info(path).subtype == ("FLOAT" if suffix == ".wav" else "PCM_24")
    assert np.abs(audio - waveform(source, key, samples)[0]).max() < 1e-5
    assert (written.path, written.seconds, written.clipped) == (str(path), samples / RATE, 0)
    assert written.peak == pytest.approx(np.abs(audio).max(), abs=1e-6)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_flac_cannot_hold_is_counted(tmp_path: Path) -> None:
    audio = np.array([[0.5, 1.5, -2.0, 1.0]], np.float32)
    for name, clipped in (("a.flac", 2), ("a.wav", 0)):
        written = write_audio(
            tmp_path / name, blocks_of(audio, 3), sample_rate=8000, channels=1, num_samples=4
        )
        assert (written.clipped, written.peak) == (clipped, 2.0)
    assert np.abs(soundfile.read(tmp_path / "a.flac")[0] - [0.5, 1, -1, 1]).max() < 1e-6
    assert np.array_equal(soundfile.read(tmp_path / "a.wav")[0], audio[0])


def test_a_wav_beyond_four_gigabytes_is_rf64(tmp_path: Path) -> None:
    write_audio(
        tmp_path / "long.wav",
        [np.ones((2, 10), np.float32)],
        sample_rate=8000,
        channels=2,
        num_samples=2**30,  # as it would be; what is written here is short
    )
    assert (tmp_path / "long.wav").read_bytes()[:4] in (b"RF64", b"RIFF")
    assert soundfile.read(tmp_path / "long.wav")[0].shape == (10, 2)


def test_a_file_is_whole_or_not_there(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield np.ones((1, 100), np.float32)
        raise StorageError("The disk is gone.")

    (tmp_path / "old.wav").write_text("what was there")
    with pytest.raises(StorageError, match="The disk is gone"):
        write_audio(
            tmp_path / "old.wav", interrupted(), sample_rate=8000, channels=1, num_samples=200
        )
    assert [path.name for path in tmp_path.iterdir()] == ["old.wav"]
    assert (tmp_path / "old.wav").read_text() == "what was there"
    with pytest.raises(ConfigError) as caught:
        write_audio(tmp_path / "a.mp3", [], sample_rate=8000, channels=1, num_samples=0)
    assert "ends in .wav or .flac" in one_sentence(caught.value)


def test_a_file_name_as_long_as_allowed_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".wav")
    write_audio(path, [np.zeros((1, 10), np.float32)], sample_rate=8000, channels=1, num_samples=10)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("key", ["a/b", "../a//./b", f"{'y' * 300}/{'z' * 300}", "\u00e9" * 200])
def test_each_part_of_a_key_becomes_a_name_that_file_systems_take(key: str) -> None:
    name, other = file_name(key, ".flac"), file_name(f"{key}2", ".flac")
    assert name != other
    assert name.endswith(".flac")
    assert all(0 < len(part.encode()) <= 255 and part != ".." for part in name.split("/"))
