"""Blocks of packed floats: in forks of the process, and against the resampler of PyAV."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import with_pyav

from latentmill.audio.decode import open_audio
from latentmill.audio.media import open_media
from latentmill.audio.packing import FramePacker


@pytest.fixture(scope="module")
def adts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AAC, which is decoded packet by packet."""
    path = tmp_path_factory.mktemp("packing") / "sound.aac"
    sound = 0.1 * np.random.default_rng(0).standard_normal((4 * 44100, 2))
    path.write_bytes(with_pyav(sound.astype(np.float32), 44100, "aac", "adts", {}))
    return path


def test_a_fork_frees_what_its_parent_decodes(adts: Path) -> None:
    """As a worker of a DataLoader does, whenever Python collects garbage."""
    with open_media(str(adts)) as media, contextlib.closing(open_audio(media).blocks()) as blocks:
        next(blocks)
        fork = multiprocessing.get_context("fork").Process(target=blocks.close)
        fork.start()
        fork.join(120)
        ended = fork.exitcode
        fork.kill()
        assert ended == 0
        assert len(list(blocks)) > 0


@pytest.mark.parametrize("samples", [0, 1000, 4096])
def test_blocks_are_those_of_pyav_s_resampler(adts: Path, samples: int) -> None:
    with av.open(str(adts)) as container:
        frames = list(container.decode(audio=0))
    layout, rate = frames[0].layout, frames[0].sample_rate
    resampler = av.AudioResampler("flt", layout, rate, samples or None)
    packer = FramePacker(layout, rate, samples)
    for frame in (*frames, None):
        wanted, found = resampler.resample(frame), packer.push(frame)
        assert [one.samples for one in found] == [one.samples for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert np.array_equal(one.to_ndarray(), other.to_ndarray())
    assert packer.push(None) == []


def test_other_frames_are_refused(adts: Path) -> None:
    with av.open(str(adts)) as container:
        frame = next(container.decode(audio=0))
    packer = FramePacker(frame.layout, frame.sample_rate)
    assert packer.push(None) == []
    packer.push(frame)
    other = av.AudioFrame.from_ndarray(np.zeros((1, 100), np.int16), format="s16", layout="mono")
    other.sample_rate = frame.sample_rate
    with pytest.raises(ValueError, match="changes within the file"):
        packer.push(other)
