"""Writes a corpus for `gpu.py`: true stereo FLAC at the bit rates of music, in mixed lengths."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 44100
SYNTHESISED = "synthesised"
SUFFIXES = (".flac", ".ogg", ".wav")
# With white noise of this level (dBFS), 16-bit FLAC has about the bit rate of real recordings.
NOISE_DBFS = -64.0
LAP = 20.0  # seconds of noise before it repeats, at a different position of the music
PEAK = 0.4


@dataclass(frozen=True)
class Corpus:
    """Description of the files.

    Attributes:
        audio: Source of the audio.
        files: Number of file names; many are hard links to the distinct files.
        seconds: Length of the audio of all file names.
        distinct_files: Number of distinct files.
        distinct_seconds: Length of the audio of the distinct files.
        distinct_bytes: Size of the distinct files.
        kbit_per_second: Bit rate of the distinct files; real music in 16-bit stereo FLAC has 600
            to 900.
        side_over_mid: RMS of L - R divided by RMS of L + R; 0 for mono.
        lengths_seconds: Shortest, median and longest file.
    """

    audio: str
    files: int
    seconds: float
    distinct_files: int
    distinct_seconds: float
    distinct_bytes: int
    kbit_per_second: float
    side_over_mid: float
    lengths_seconds: tuple[float, float, float]

    def document(self) -> dict[str, Any]:
        """Return the fields for the JSON result."""
        return asdict(self)


def write_corpus(
    folder: Path,
    source: Path | None,
    *,
    distinct: int,
    shortest: float,
    longest: float,
    hours: float,
    threads: int,
) -> Corpus:
    """Write FLAC files into a new `folder`, with lengths evenly spaced on a logarithmic scale.

    Args:
        folder: The folder to create.
        source: Folder of recordings; None for synthesised music.
        distinct: Number of distinct files.
        shortest: Length of the shortest file in seconds.
        longest: Length of the longest file in seconds.
        hours: Total length of all file names.
        threads: Number of files encoded in parallel.
    """
    folder.mkdir(parents=True)
    music = synthesised() if source is None else recordings(source)
    lengths = np.geomspace(shortest, longest, distinct)
    order = random.Random(0)
    paths = [folder / f"{zlib.crc32(bytes([n])):08x}-0000.flac" for n in range(distinct)]

    def write(number: int) -> None:
        wanted = round(lengths[number] * RATE)
        start = number * 7919 * 31 % music.shape[0]
        with soundfile.SoundFile(paths[number], "w", RATE, 2, "PCM_16", format="FLAC") as file:
            while wanted:
                block = music[start : start + min(wanted, 60 * RATE)]
                file.write(block)
                wanted, start = wanted - len(block), (start + len(block)) % music.shape[0]

    with ThreadPoolExecutor(threads) as pool:  # the encoder releases the GIL
        list(pool.map(write, reversed(range(distinct))))
    size = sum(path.stat().st_size for path in paths)
    seconds = float(lengths.sum())
    rounds = max(1, round(hours * 3600 / seconds))
    for turn in range(
        1, rounds
    ):  # names start with random digits, so that sorting mixes the lengths
        for path in paths:
            (folder / f"{order.getrandbits(32):08x}-{turn:04d}.flac").hardlink_to(path)
    mid, side = music.sum(axis=1), music[:, 0] - music[:, 1]
    return Corpus(
        audio=SYNTHESISED if source is None else "recordings",
        files=rounds * distinct,
        seconds=round(rounds * seconds, 1),
        distinct_files=distinct,
        distinct_seconds=round(seconds, 1),
        distinct_bytes=size,
        kbit_per_second=round(8 * size / seconds / 1000, 1),
        side_over_mid=round(float(side.std() / mid.std()), 3),
        lengths_seconds=(shortest, round(float(np.median(lengths)), 1), longest),
    )


def synthesised() -> np.ndarray:
    """The demo's songs with reverberation-like noise that differs between the channels, `[T, 2]`.

    Without noise they would need only 200 kbit/s; real recordings contain breath, room sound and
    cymbals.
    """
    from latentmill.demo.corpus import SONGS
    from latentmill.demo.synth import stems

    songs = [np.sum(list(stems(song.score, RATE, 2).values()), axis=0) for song in SONGS]
    music = np.concatenate(songs, axis=1).T  # [T, 2]
    noise = np.random.default_rng(0).standard_normal((round(LAP * RATE), 3)).astype(np.float32)
    noise = (noise[:, :2] + noise[:, 2:]) / np.float32(
        2**0.5
    )  # half of the noise is common to both channels
    noise = np.resize(noise, music.shape)
    # Louder passages have more noise, like the breath noise of instruments.
    step = RATE // 50
    level = np.abs(music).max(axis=1)
    level = np.repeat(level[: len(level) // step * step].reshape(-1, step).max(axis=1), step)
    level = np.resize(0.3 + level, len(music))[:, None]
    music = music + np.float32(10 ** (NOISE_DBFS / 20)) * level.astype(np.float32) * noise
    return np.asarray(PEAK / np.abs(music).max() * music, np.float32)


def recordings(folder: Path) -> np.ndarray:
    """Load all recordings of a folder, concatenated, as true stereo `[T, 2]`.

    The two channels are the whole material with different offsets, panned left and right. Otherwise
    mono files would make long passages with equal channels.
    """
    import soxr

    parts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES:
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            audio = np.repeat(audio, 2, axis=1)[:, [0, -1]]
            parts.append(audio if rate == RATE else soxr.resample(audio, rate, RATE))
    if not parts:
        raise SystemExit(
            f"{folder} contains no FLAC, Ogg or WAV files: set --audio to another folder"
        )
    first = np.concatenate(parts)
    second = np.roll(first, len(first) // 3, axis=0)
    left = 0.7 * first[:, 0] + 0.3 * second[:, 0]
    right = 0.3 * first[:, 1] + 0.7 * second[:, 1]
    music = np.stack([left, right], axis=1)
    return np.asarray(PEAK / np.abs(music).max() * music, np.float32)
