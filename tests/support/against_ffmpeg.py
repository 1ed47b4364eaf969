"""Compares what latentmill loads with what FFmpeg decodes, file by file.

    python tests/support/against_ffmpeg.py [--ffmpeg PATH] FILE...

prints a line for each file: samples per channel by ffmpeg, by latentmill, the first sample that
differs by more than the tolerance, the largest difference, or why latentmill refuses the file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from latentmill.audio import open_audio, open_media
from latentmill.errors import ItemError

TOLERANCE = 2e-4
"""Decoders of lossy codecs round differently; a shift by one sample is far larger than this."""


def by_ffmpeg(path: Path, channels: int, ffmpeg: str = "ffmpeg") -> np.ndarray:
    """What `ffmpeg -i PATH -map a:0 -f f32le -` gives, `[channels, n]`."""
    command = [ffmpeg, "-nostdin", "-v", "quiet", "-i", str(path), "-map", "a:0"]
    command += ["-f", "f32le", "-c:a", "pcm_f32le", "-"]
    data = subprocess.run(command, capture_output=True, check=False).stdout
    return (
        np.frombuffer(data[: len(data) // 4 // channels * 4 * channels], "<f4")
        .reshape(-1, channels)
        .T
    )


def by_us(path: Path, **options: bool) -> tuple[np.ndarray | None, str]:
    """Samples `[C, n]`, or None, and decoder or the reason for the failure."""
    try:
        with open_media(str(path)) as media:
            stream = open_audio(media, **options)
            return np.concatenate(list(stream.blocks()), axis=1), stream.info.decoder
    except ItemError as error:
        return None, str(error)


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int | None]:
    """The largest difference, and the first sample where it is more than TOLERANCE."""
    count = min(ours.shape[1], theirs.shape[1])
    distance = np.abs(ours[:, :count] - theirs[:, :count]).max(axis=0, initial=0)
    beyond = distance > TOLERANCE
    return float(distance.max(initial=0)), int(np.argmax(beyond)) if beyond.any() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ffmpeg", default="ffmpeg")
    parser.add_argument("--allow-truncated", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    for path in options.files:
        ours, note = by_us(path, allow_truncated=options.allow_truncated)
        if ours is None:
            theirs = by_ffmpeg(path, 2, options.ffmpeg)
            print(f"{path.name:28} refused {theirs.shape[1]:>9} {note}")
            continue
        theirs = by_ffmpeg(path, ours.shape[0], options.ffmpeg)
        most, first = difference(ours, theirs)
        lengths = f"{theirs.shape[1]:>9} {ours.shape[1]:>9}"
        same = ours.shape == theirs.shape and first is None
        where = f" differs from {first}" if first is not None else ""
        print(
            f"{path.name:28} {'same   ' if same else 'OTHER  '} {lengths} {note} {most:.1e}{where}"
        )


if __name__ == "__main__":
    sys.exit(main())
