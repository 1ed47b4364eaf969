"""Latents to audio files of any length, and mixes of records that are read as they are decoded."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import xxhash

from latentmill.decoding.decoder import LatentSource
from latentmill.errors import ConfigError, StorageError
from latentmill.ops import Origin, fit, mix
from latentmill.record import FloatArray, Latent

# What a file is by its suffix: format and sample type. FLAC knows no floats.
FILE_TYPES = {".wav": ("WAV", "FLOAT"), ".flac": ("FLAC", "PCM_24")}
LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""

# A WAV file's size is a 32-bit number; RF64 is the same with a larger one.
_LARGEST_WAV = 2**32 - 2**16
_LARGE_WAV = "RF64"


@dataclass(frozen=True)
class WrittenAudio:
    """An audio file that was written.

    Attributes:
        path: Where it is.
        seconds: Its length.
        peak: The largest absolute sample before it was written.
        clipped: Samples beyond full scale that the file could not hold; 0 in WAV, which holds
            floats.
    """

    path: str
    seconds: float
    peak: float
    clipped: int


def file_name(key: str, suffix: str) -> str:
    """A key as a relative path that stays below its folder and that file systems take."""
    parts = [part for part in key.replace("\0", "").split("/") if part not in ("", ".", "..")]
    *folders, last = parts or [""]
    return "/".join([*map(_shortened, folders), _shortened(last, suffix)])


def _shortened(name: str, suffix: str = "") -> str:
    """A name with a suffix; if it is too long, its beginning and a hash of all of it."""
    encoded = os.fsencode(name)
    room = LONGEST_NAME - len(os.fsencode(suffix))
    if len(encoded) > room:
        kept = encoded[: room - 17].decode(errors="ignore")
        name = f"{kept}~{xxhash.xxh3_64_hexdigest(encoded)}"
    return name + suffix


def check_file_type(path: Path) -> None:
    """Refuse a file name that is no audio file's.

    Raises:
        ConfigError: Its suffix is neither .wav nor .flac.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"Cannot write {path}: use a file name that ends in .wav or .flac.")


def write_audio(
    path: Path, blocks: Iterable[FloatArray], *, sample_rate: int, channels: int, num_samples: int
) -> WrittenAudio:
    """Write audio to a WAV (float32) or FLAC (24 bit) file as it comes, whole or not at all.

    Args:
        path: The file; its suffix says which type. Its folder is made.
        blocks: The audio in order, `[C, n]` each, such as `LatentStore.decode_blocks` gives it.
        sample_rate: Hz.
        channels: Audio channels.
        num_samples: What the blocks hold together, to choose the kind of WAV file.

    Raises:
        ConfigError: The suffix is another one.
        StorageError: The file cannot be written; nothing of it stays.
    """
    check_file_type(path)
    kind, subtype = FILE_TYPES[path.suffix.lower()]
    if kind == "WAV" and 4 * channels * num_samples > _LARGEST_WAV:
        kind = _LARGE_WAV
    partial = path.with_name(
        f".latentmill-{uuid.uuid4().hex}.part"
    )  # `path` may be as long as allowed
    samples, peak, clipped = 0, 0.0, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return WrittenAudio(str(path), samples / sample_rate, peak, clipped)


def fitted(source: LatentSource, frames: int, *, origin: Origin | None) -> LatentSource:
    """A latent cut, or continued by silence, to `frames` frames; see `ops.fit`."""
    if len(source.shape) != 2:
        raise ConfigError("Latents stored as chunks (stitch none) cannot be cut or continued.")
    have = source.shape[1]

    def read(start: int, count: int) -> Latent:
        there = max(0, min(have - start, count))
        piece = source.read(start, there) if there else np.zeros((source.shape[0], 0), np.float32)
        result = fit(piece, count, origin=None)
        if origin is not None and there < count:
            result[:, there:] = origin.crop(frames, start + there, count - there)
        return result

    return LatentSource((source.shape[0], frames), read)


def mixed(
    sources: Sequence[LatentSource], gains: Sequence[float], *, origin: Origin | None
) -> LatentSource:
    """A mix of latents that is computed as it is read; see `ops.mix`.

    Raises:
        ConfigError: As `ops.mix`, when the mix is read; at once where the shapes differ.
    """
    shapes = {source.shape for source in sources}
    if len(shapes) > 1:
        listed = ", ".join(str(shape) for shape in sorted(shapes))
        raise ConfigError(
            f"Latents of different shapes cannot be mixed: {listed}; bring them to one length "
            "(on the command line --length shortest or longest)."
        )
    shape = sources[0].shape

    def read(start: int, count: int) -> Latent:
        here = origin
        if origin is not None and len(shape) == 2:
            here = origin.at(shape[1], start)
        return mix([source.read(start, count) for source in sources], gains, origin=here)

    return LatentSource(shape, read)
