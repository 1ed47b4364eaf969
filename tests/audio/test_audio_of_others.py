"""The audio files that other projects' sources carry for their own tests, against ffmpeg."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.against_ffmpeg import by_ffmpeg, by_us, difference

FRAME = 2048
"""Samples by which versions of FFmpeg differ at the end of AAC."""


def audio_files(package: str, folder: Path) -> list[Path]:
    """What a source distribution holds; skips the test where no registry answers."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    found = subprocess.run(
        [*command, "-d", str(folder), package], capture_output=True, text=True, check=False
    )
    archives = list(folder.glob("*.tar.gz"))
    if found.returncode or not archives:
        pytest.skip(f"pip cannot download {package}: {found.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    inside = [path for path in folder.rglob("*") if path.is_file() and "test" in str(path.parent)]
    return [path for path in inside if path.suffix not in (".py", ".txt", ".md", ".gz")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg program")
@pytest.mark.parametrize("package", ["mutagen", "miniaudio", "soundfile"])
def test_files_of_other_projects_are_loaded_as_ffmpeg_loads_them(
    package: str, tmp_path: Path
) -> None:
    """Every file gives FFmpeg's samples, or fails with one line."""
    files, compared, wrong = audio_files(package, tmp_path), 0, []
    for path in files:
        ours, note = by_us(path)
        if ours is None:
            assert note
            assert "\n" not in note
            continue
        theirs = by_ffmpeg(path, ours.shape[0])
        if not theirs.shape[1]:  # big-endian WAV and others that only libsndfile reads
            continue
        compared += 1
        most, first = difference(ours, theirs)
        if path.suffix == ".dsf":  # FFmpeg 8 has another filter for DSD than those before
            first = None
        if first is not None or abs(ours.shape[1] - theirs.shape[1]) > FRAME:
            wrong.append((path.name, ours.shape, theirs.shape, most))
    assert wrong == []
    assert compared > 1
