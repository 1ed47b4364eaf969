"""Files that other projects test themselves with, against the ffmpeg command: fetched, not kept."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from latentmill.audio import open_audio, open_media
from latentmill.errors import ItemError

pytestmark = pytest.mark.slow

FFMPEG = shutil.which("ffmpeg")


@pytest.fixture(scope="session")
def mutagen_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The test data in the source distribution of mutagen."""
    if FFMPEG is None:
        pytest.skip("the ffmpeg command is not installed")
    folder = tmp_path_factory.mktemp("mutagen")
    pip = shutil.which("pip") or shutil.which("pip3")
    command = [pip] if pip else [sys.executable, "-m", "pip"]
    options = ["download", "-q", "--no-deps", "--no-binary", ":all:", "mutagen", "-d", str(folder)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    archive = next(folder.glob("mutagen-*.tar.gz"), None)
    if archive is None:
        pytest.skip(f"the package index does not answer: {done.stderr[-200:]}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return sorted(folder.glob("mutagen-*/tests/data/*"))


# Right values that are not those of ffmpeg 5: newer versions trim the same granule differently.
KNOWN = {"empty.ogg", "multipagecomment.ogg", "audacious-trailing-id32-apev2.mp3"}


def test_samples_are_those_of_ffmpeg_or_the_file_fails_with_a_reason(
    mutagen_files: list[Path],
) -> None:
    wrong, loaded = {}, set()
    for path in mutagen_files:
        try:
            with open_media(str(path)) as media:
                stream = open_audio(media)
                found = np.concatenate(list(stream.blocks()), axis=1).T
        except ItemError as error:
            assert "\n" not in str(error)
            continue
        loaded.add(path.suffix)
        command = [str(FFMPEG), "-v", "error", "-i", str(path), "-map", "0:a:0", "-f", "f32le", "-"]
        done = subprocess.run(command, capture_output=True, check=False)
        wanted = np.frombuffer(done.stdout, np.float32).reshape(-1, found.shape[1])
        begin = 32 if path.suffix in (".dsf", ".dff") else 0  # see test_audio_formats.py
        if len(found) != len(wanted) or np.abs(found - wanted)[begin:].max() > 1e-4:
            wrong[path.name] = (len(found), len(wanted))
    assert {name: lengths for name, lengths in wrong.items() if name not in KNOWN} == {}
    assert {".ape", ".tta", ".tak", ".mpc", ".dsf", ".dff", ".wma", ".ac3", ".eac3"} <= loaded
