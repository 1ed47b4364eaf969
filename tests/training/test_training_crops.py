"""Crops of long items, of which only the crop is loaded."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio.audio_files import with_pyav
from latentmill.audio import open_audio, open_media
from latentmill.sources import reading
from latentmill.sources.folder import FolderSource
from latentmill.sources.manifest import ManifestSource
from latentmill.sources.webdataset import WebDatasetSource
from latentmill.storage.remote import Retries
from latentmill.training import crops as crops_module
from latentmill.training.crops import WHOLE_SECONDS, Crops, list_items
from support.recordings import noise
from support.sources import put, tar_of

RATE = 8000


@pytest.mark.parametrize("declared", [None, WHOLE_SECONDS + 2])
@pytest.mark.parametrize("crop", [WHOLE_SECONDS + 0.98, 1.5 * WHOLE_SECONDS])
def test_crops_up_to_the_end_of_a_long_item_and_beyond(
    tmp_path: Path, crop: float, declared: float | None
) -> None:
    """The last samples of an item are drawn, and one that is shorter than a crop is padded.

    The length that a manifest declares may be rounded up.
    """
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, round((WHOLE_SECONDS + 1) * RATE))
    soundfile.write(tmp_path / "long.flac", sound, RATE)
    written, _ = soundfile.read(tmp_path / "long.flac", dtype="float32")
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "long.flac", "duration": declared}))
    folder, manifest = FolderSource(str(tmp_path), ["flac"]), ManifestSource(f"{tmp_path}/m.jsonl")
    items = list_items(manifest if declared else folder)
    samples = round(crop * RATE)
    crops = Crops(items, sample_rate=RATE, channels=1, samples=samples, batch_size=4)
    batch = crops.batch(0)
    assert batch.audio.shape == (4, 1, samples)
    for audio, name in zip(batch.audio[:, 0].numpy(), batch.names, strict=True):
        first = round(float(name.removeprefix("long at ").removesuffix(" s")) * RATE)
        near = [written[at : at + samples] for at in range(max(first - 50, 0), first + 50)]
        assert any(np.array_equal(audio[: len(one)], one) for one in near)
        assert not audio[len(written) :].any()


def test_a_tar_is_looked_up_once_for_all_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On object storage each look-up is a request."""
    monkeypatch.setattr(crops_module, "WHOLE_SECONDS", 0.5)
    for number in range(3):
        sound = np.random.default_rng(number).uniform(-0.5, 0.5, RATE)
        soundfile.write(tmp_path / f"{number}.wav", sound, RATE)
    members = [(path.name, path.read_bytes()) for path in sorted(tmp_path.glob("*.wav"))]
    url = put(f"{tmp_path}/songs.tar", tar_of(members))
    items = list_items(WebDatasetSource(url, ("wav",)))
    looked_up, real = [], reading.current_version

    def counted(uri: str, *retries: Retries) -> tuple[int, str]:
        looked_up.append(uri)
        return real(uri, *retries)

    monkeypatch.setattr(reading, "current_version", counted)
    crops = Crops(items, sample_rate=RATE, channels=1, samples=RATE // 2, batch_size=8)
    for step in range(3):
        crops.batch(step)
    assert looked_up == [url]


@pytest.mark.parametrize("silence", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("codec", "container", "rate"),
    [
        ("libmp3lame", "mp3", 22050),
        ("aac", "adts", 22050),
        pytest.param("libopus", "webm", 48000, marks=pytest.mark.slow),
        pytest.param("aac", "mpegts", 22050, marks=pytest.mark.slow),
    ],
)
def test_crops_of_a_long_item_whose_header_has_no_exact_length(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    codec: str,
    container: str,
    rate: int,
    silence: int,
) -> None:
    """It is not loaded whole and kept in memory.

    FFmpeg estimates the length from the bit rate of the first frames: 260 s instead of 10 s for
    AAC that begins with silence. The crops are those of the recording all the same, up to its end.
    """
    monkeypatch.setattr(crops_module, "WHOLE_SECONDS", 2.0)
    sound = noise(10, rate)
    sound[: silence * rate] = 0
    options = {"write_xing": "0"} if container == "mp3" else {}
    path = tmp_path / "long.wav"  # the contents decide about the format
    path.write_bytes(with_pyav(sound, rate, codec, container, options, layout="mono"))
    with open_media(str(path)) as media:
        whole = np.concatenate(list(open_audio(media).blocks()), axis=1)[0]

    samples, starts = rate // 4, []
    items = list_items(FolderSource(str(tmp_path), ["wav"]))
    made = {"sample_rate": rate, "channels": 1, "samples": samples, "batch_size": 24}
    crops = Crops(items, **made)
    batch = crops.batch(0)
    for audio, name in zip(batch.audio[:, 0].numpy(), batch.names, strict=True):
        starts.append(float(name.removeprefix("long at ").removesuffix(" s")))
        near = round(starts[-1] * rate) + np.arange(-rate // 200 - 1, rate // 200 + 2)
        assert any(np.array_equal(audio, whole[max(0, at) : at + samples]) for at in near)
    assert (min(starts) < silence + 2, max(starts) > 8.5) == (True, True)
    assert not crops._whole
    assert not caplog.messages
    after, alone = crops.batch(1), Crops(items, **made).batch(1)
    assert after.names == alone.names
    assert torch.equal(after.audio, alone.audio)


@pytest.mark.parametrize("kind", ["mp3", "flac"])
def test_crops_of_joined_files_are_from_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Their header counts the samples of the first file only."""
    monkeypatch.setattr(crops_module, "WHOLE_SECONDS", 1.0)
    path = tmp_path / f"joined.{kind}"
    with path.open("wb") as joined:
        for seconds in (2, 6):
            part = tmp_path / f"part-{seconds}"
            soundfile.write(part, noise(seconds, 22050), 22050, format=kind.upper())
            joined.write(part.read_bytes())
    items = list_items(FolderSource(str(tmp_path), [kind]))
    crops = Crops(items, sample_rate=22050, channels=1, samples=5512, batch_size=24)
    starts = [float(name.split()[2]) for name in crops.batch(0).names]
    assert (min(starts) < 2, max(starts) > 6) == (True, True)


def test_an_item_larger_than_the_cache_removes_none_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("a", 0.5), ("b", 0.4), ("large", 2.0)):
        soundfile.write(tmp_path / f"{name}.wav", noise(seconds, RATE), RATE)
    monkeypatch.setattr(crops_module, "CACHE_BYTES", RATE * 4)  # a second
    items = list_items(FolderSource(str(tmp_path), ["wav"]))
    crops = Crops(items, sample_rate=RATE, channels=1, samples=RATE // 10, batch_size=16)
    assert {name.split()[0] for name in crops.batch(0).names} == {"a", "b", "large"}
    assert set(crops._whole) == {"a", "b"}
    assert crops._size == sum(audio.nbytes for audio in crops._whole.values())


@pytest.mark.parametrize("whole", [WHOLE_SECONDS, 0.5])
def test_an_item_that_could_not_be_read_once_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: float
) -> None:
    """The crops of a step do not depend on errors in the steps before."""
    monkeypatch.setattr(crops_module, "WHOLE_SECONDS", whole)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", noise(1.0, RATE), RATE)
    items = list_items(FolderSource(str(tmp_path), ["wav"]))
    made = {"sample_rate": RATE, "channels": 1, "samples": RATE // 10, "batch_size": 16}
    crops = Crops(items, **made)
    (tmp_path / "b.wav").rename(tmp_path / "elsewhere")
    assert {name.split()[0] for name in crops.batch(0).names} == {"a"}
    (tmp_path / "elsewhere").rename(tmp_path / "b.wav")
    after, alone = crops.batch(1), Crops(items, **made).batch(1)
    assert {name.split()[0] for name in alone.names} == {"a", "b"}
    assert after.names == alone.names
    assert torch.equal(after.audio, alone.audio)


def test_all_threads_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread loads a batch, so as many batches as threads are loaded at the same time."""
    together = threading.Barrier(6)
    monkeypatch.setattr(Crops, "batch", lambda _, step: (together.wait(timeout=30), step)[1])
    crops = Crops([], sample_rate=RATE, channels=1, samples=1, batch_size=1)
    assert list(crops.batches(0, 12, threads=6)) == list(range(12))
