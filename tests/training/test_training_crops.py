"""Crops of long items, of which only the crop is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.sources import reading
from latentmill.sources.folder import FolderSource
from latentmill.sources.manifest import ManifestSource
from latentmill.sources.webdataset import WebDatasetSource
from latentmill.training import crops as crops_module
from latentmill.training.crops import WHOLE_SECONDS, Crops, list_items
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

    def counted(uri: str) -> tuple[int, str]:
        looked_up.append(uri)
        return real(uri)

    monkeypatch.setattr(reading, "current_version", counted)
    crops = Crops(items, sample_rate=RATE, channels=1, samples=RATE // 2, batch_size=8)
    for step in range(3):
        crops.batch(step)
    assert looked_up == [url]
