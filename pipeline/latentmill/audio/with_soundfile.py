"""Loads audio with libsndfile.

libsndfile reads from the file descriptor without callbacks into Python, so load threads do not wait
for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf

from latentmill.audio.headers import find_w64_data
from latentmill.audio.media import MediaFile
from latentmill.audio.sniff import Sniffed
from latentmill.audio.stream import BLOCK, AudioInfo, DecodeError
from latentmill.audio.survey import NOTHING, Survey
from latentmill.record import FloatArray

_OTHERWISE = {
    "wav": ("MPEG_LAYER_III", "IMA_ADPCM"),
    "w64": ("IMA_ADPCM",),
    "aiff": ("IMA_ADPCM",),
    "caf": ("ALAC_16", "ALAC_24"),
}
"""Codecs for which libsndfile and FFmpeg give different samples; FFmpeg is used."""

_VORBIS_ORDER = {
    3: (0, 2, 1),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}
"""Positions of channels in Vorbis (Vorbis I, section 4.3.9), in the order of all other formats.

libsndfile does not reorder them; FFmpeg and oggdec do.
"""

_MP3_LEAD = 64 * 1152
"""Samples that are decoded before a seek target in an MP3: frames use bits of earlier frames."""


_EXACT = ("pcm_s8", "pcm_u8", "pcm_16", "pcm_24", "pcm_32", "float", "double")
"""Samples of these codecs, and of FLAC, are independent of the samples before them."""

_INTEGERS = {"PCM_16": np.int16, "PCM_32": np.int32}
"""Integers that numpy converts in a fraction of the time that libsndfile takes, to equal floats."""

_REOPENS = Path("/proc/self/fd").exists()


class _Sequential(sf.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Reads block after block without a seek between them.

    After each `read`, python-soundfile seeks to where a seekable file already is. In an MP3, the
    next samples can be wrong then, because their frames use bits of earlier ones that libsndfile
    has dropped; in a FLAC, frames are decoded again.
    """

    def seekable(self) -> bool:
        return False


class SoundFileDecoder:
    """A file that is open in libsndfile.

    Raises DecodeError if libsndfile cannot load it or finds no samples.
    """

    def __init__(self, media: MediaFile, sniffed: Sniffed, found: Survey = NOTHING) -> None:
        if sniffed.format == "w64" and _is_extensible(media):
            raise DecodeError("libsndfile reads its floats as integers")
        self._media, self._sniffed, self._found = media, sniffed, found
        self._owned: MediaFile | None = None  # closed with the decoder
        self._last_seek = found.last_seek if sniffed.format == "ogg-vorbis" else None
        try:
            self._file = _Sequential(media.rewind(), closefd=False)
        except sf.LibsndfileError as error:
            raise DecodeError(_text(error)) from error
        if not sf.SoundFile.seekable(self._file):  # such as GSM; `tell` would be a seek
            self._file.close()
            raise DecodeError("libsndfile cannot seek in it")
        if self._file.subtype in _OTHERWISE.get(sniffed.format, ()):
            self._file.close()
            raise DecodeError("FFmpeg decodes it")
        if self._file.frames == 0:  # such as a WAV whose writer did not set its size
            self._file.close()
            raise DecodeError("it contains no samples")
        self._frames = self._file.frames
        if sniffed.format == "w64" and (data := find_w64_data(media)) and data.samples:
            self._frames = min(self._frames, data.samples)  # libsndfile reads padding as audio
        self._order: list[int] | None = None
        if sniffed.format == "ogg-vorbis" and self._file.channels in _VORBIS_ORDER:
            self._order = list(_VORBIS_ORDER[self._file.channels])
        self.info = AudioInfo(
            sample_rate=self._file.samplerate,
            channels=self._file.channels,
            num_samples=self._frames,
            format=sniffed.format,
            codec=self._file.subtype.lower(),
            decoder="soundfile",
        )

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        done, integers = self._file.tell(), None
        if self.info.format != "flac" and (kind := _INTEGERS.get(self._file.subtype)):
            shape = min(BLOCK, self._frames), self.info.channels
            integers = np.empty(shape, kind)  # of all blocks, one after the other
        # Reading past the end would return data after the audio, such as a tag.
        while done < self._frames:
            # Blocks end at the same samples wherever reading starts, so that those of pieces need
            # not be copied into blocks of one size.
            count = min(BLOCK - done % BLOCK, self._frames - done)
            if integers is None:
                block = np.empty((count, self.info.channels), np.float32)
            else:
                block = integers[:count]
            try:
                read = len(self._file.read(out=block))
            except sf.LibsndfileError as error:
                kept = min(max(self._file.tell() - done, 0), count)
                yield self._finished(block[:kept])
                raise DecodeError(_text(error)) from error
            if read == 0:
                return
            yield self._finished(block[:read])
            done += read

    def _finished(self, block: npt.NDArray[Any]) -> FloatArray:
        """The samples of a block as floats, in the usual order of channels."""
        if block.dtype != np.float32:
            scale = np.float32(2.0 ** (1 - 8 * block.itemsize))
            floats: FloatArray = np.multiply(block, scale, dtype=np.float32, casting="same_kind")
            return floats
        return block if self._order is None else block[:, self._order]

    def seek(self, sample: int) -> int:
        """Start at a sample, or at an earlier one if libsndfile cannot seek to it."""
        if self._last_seek is not None:
            sample = min(sample, self._last_seek)
        if self.info.codec == "mpeg_layer_iii":
            sample = max(0, sample - _MP3_LEAD)
        try:
            return int(self._file.seek(min(sample, self._frames)))
        except sf.LibsndfileError as error:
            raise DecodeError(_text(error)) from error

    @property
    def divisible(self) -> bool:
        """See `DivisibleDecoder`; the codec of FLAC is that of its samples here."""
        # Without /proc (not Linux), each part would copy the whole file.
        return self.info.codec in _EXACT and _REOPENS

    def part(self, sample: int) -> SoundFileDecoder:
        """A second decoder, which starts at `sample`; see `DivisibleDecoder`."""
        with contextlib.ExitStack() as undo:
            media = undo.enter_context(self._media.reopened())
            decoder = SoundFileDecoder(media, self._sniffed, self._found)
            undo.callback(decoder.close)
            if decoder.seek(sample) != sample:
                raise DecodeError(f"libsndfile cannot seek to sample {sample}")
            decoder._owned = media
            undo.pop_all()
        return decoder

    def close(self) -> None:
        """Release the decoder."""
        self._file.close()
        if self._owned:
            self._owned.close()


def _is_extensible(media: MediaFile) -> bool:
    """Whether the sample format of a Wave64 file is WAVE_FORMAT_EXTENSIBLE."""
    head = media.read_at(0, 4096)
    at = head.find(b"fmt \xf3\xac\xd3\x11")
    return at >= 0 and head[at + 24 : at + 26] == b"\xfe\xff"


def _text(error: sf.LibsndfileError) -> str:
    text = " ".join(str(error.error_string).split())
    return text.removeprefix("Error : ").rstrip(".")
