"""Latents to audio files of any length, and mixes that are computed while they are decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import xxhash

from latentmill.decoding.decoder import LatentSource
from latentmill.errors import ConfigError, StorageError
from latentmill.ops import Origin, mix
from latentmill.ops.time import span
from latentmill.record import FloatArray, Latent
from latentmill.storage.scratch import partial_file

# Format and sample type by file name suffix. FLAC does not support floats.
FILE_TYPES = {".wav": ("WAV", "FLOAT"), ".flac": ("FLAC", "PCM_24")}
LONGEST_NAME = 255
"""Maximum length of a file name in bytes, on all common file systems."""

# The size field of a WAV file has 32 bits; RF64 is the same format with a larger field.
_LARGEST_WAV = 2**32 - 2**16
_LARGE_WAV = "RF64"


@dataclass(frozen=True)
class WrittenAudio:
    """An audio file that was written.

    Attributes:
        path: Path of the file.
        seconds: Length in seconds.
        peak: Largest absolute sample of the audio, before clipping.
        clipped: Number of clipped samples; 0 for WAV, which stores floats.
    """

    path: str
    seconds: float
    peak: float
    clipped: int


def file_name(key: str, suffix: str) -> str:
    """Convert a key to a relative file path that is valid and stays inside its folder."""
    parts = [part for part in key.replace("\0", "").split("/") if part not in ("", ".", "..")]
    *folders, last = parts or [""]
    return "/".join([*map(_shortened, folders), _shortened(last, suffix)])


def _shortened(name: str, suffix: str = "") -> str:
    """Append a suffix; if the name is too long, keep its beginning and a hash of the whole name."""
    encoded = os.fsencode(name)
    longest = LONGEST_NAME - len(os.fsencode(suffix))
    if len(encoded) > longest:
        kept = encoded[: longest - 17].decode(errors="ignore")
        name = f"{kept}~{xxhash.xxh3_64_hexdigest(encoded)}"
    return name + suffix


def check_file_type(path: Path) -> None:
    """Raise `ConfigError` unless the file name ends in .wav or .flac."""
    if path.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"Cannot write {path}: use a file name that ends in .wav or .flac.")


def write_audio(
    path: Path, blocks: Iterable[FloatArray], *, sample_rate: int, channels: int, num_samples: int
) -> WrittenAudio:
    """Write blocks `[C, n]` of audio to a WAV (float32) or FLAC (24 bit) file.

    The suffix of the path determines the format. The file appears when it is complete; if writing
    fails, nothing remains. `num_samples` is the total length of the blocks: files too large for WAV
    are written as RF64.
    """
    check_file_type(path)
    kind, subtype = FILE_TYPES[path.suffix.lower()]
    if kind == "WAV" and 4 * channels * num_samples > _LARGEST_WAV:
        kind = _LARGE_WAV
    samples, peak, clipped = 0, 0.0, 0
    try:
        with partial_file(path) as partial:
            with soundfile.SoundFile(
                partial, "w", sample_rate, channels, subtype=subtype, format=kind
            ) as file:
                for block in blocks:
                    file.write(block.T)
                    samples += block.shape[1]
                    level = np.abs(block)
                    peak = max(peak, float(level.max(initial=0)))
                    clipped += int(np.count_nonzero(level > 1)) if kind == "FLAC" else 0
            partial.replace(path)
    except (OSError, soundfile.LibsndfileError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"Cannot write {path}: {cause}.") from error
    return WrittenAudio(str(path), samples / sample_rate, peak, clipped)


def fitted(
    source: LatentSource, frames: int, *, origin: Origin | None, offset: int = 0
) -> LatentSource:
    """A sound in `frames` frames that begins at frame `offset`; see `ops.fit`."""
    if len(source.shape) != 2:
        raise ConfigError(
            "The length of latents stored as chunks (stitch none) cannot be changed: encode with "
            "another stitch."
        )
    first, last = span(source.shape[1], frames, offset)

    def read(start: int, count: int) -> Latent:
        end = start + count
        begin, stop = min(max(start, first), end), max(min(end, last), start)
        result: FloatArray = np.zeros((source.shape[0], count), np.float32)
        if begin < stop:
            result[:, begin - start : stop - start] = source.read(begin - offset, stop - begin)
        else:
            begin = stop = start
        if origin is not None:
            result[:, : begin - start] = origin.crop(frames, start, begin - start)
            result[:, stop - start :] = origin.crop(frames, stop, end - stop)
        return result

    return LatentSource((source.shape[0], frames), read)


def mixed(
    sources: Sequence[LatentSource], gains: Sequence[float], *, origin: Origin | None
) -> LatentSource:
    """A mix of latents that is computed while it is read; see `ops.mix`."""
    shapes = {source.shape for source in sources}
    if len(shapes) > 1:
        listed = ", ".join(str(shape) for shape in sorted(shapes))
        raise ConfigError(
            f"Latents of different shapes cannot be mixed: {listed}; make them equally long (on "
            "the command line with --length shortest or --length longest)."
        )
    shape = sources[0].shape

    def read(start: int, count: int) -> Latent:
        here = origin
        if origin is not None and len(shape) == 2:
            here = origin.at(shape[1], start)
        return mix([source.read(start, count) for source in sources], gains, origin=here)

    return LatentSource(shape, read)
