"""Decoding damaged Ogg files: what is lost becomes silence, what follows keeps its place.

FFmpeg drops a damaged page and goes on with the next one as if nothing had been between them.
Here pages are read one by one: a granule position is the number of samples up to the end of its
page, so it says where the page lies in time.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np

from latentmill.audio.ogg import packets_of, whole_pages
from latentmill.audio.with_pyav import AV_ERRORS, PyAVDecoder, silence
from latentmill.record import FloatArray


class OggPageDecoder(PyAVDecoder):
    """An Ogg file of Opus, Vorbis or FLAC that is damaged."""

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        codec = av.CodecContext.create(self._stream.codec.name, "r")
        assert isinstance(codec, av.AudioCodecContext)
        codec.extradata, codec.layout = self._stream.codec_context.extradata, self._layout
        codec.sample_rate = self._stream.codec_context.sample_rate
        packer = av.AudioResampler("flt", self._layout, self.info.sample_rate)
        origin, done, rest, sequence, serial, lost = None, 0, b"", None, None, False
        for page in whole_pages(self._media):
            serial = page.serial if serial is None else serial
            if page.serial != serial:
                continue
            if sequence is not None and page.sequence != sequence:
                codec.flush_buffers()
                rest, lost = b"", True
            sequence = page.sequence + 1
            packets, rest = packets_of(page, rest)
            block = self._decoded(codec, packer, [one for one in packets if _is_audio(one)])
            if page.granule < 0 or (not len(block) and origin is None):
                continue
            if origin is None:  # Opus: the decoder has dropped the pre-skip that it counts
                origin = page.granule - len(block)
            end = page.granule - origin
            if lost and end - len(block) > done:
                yield from silence(end - len(block) - done, self.info.channels)
                done = end - len(block)
            lost = False
            block = block[: max(0, end - done)]  # the last page may count fewer than it holds
            done += len(block)
            yield block

    def _decoded(
        self, codec: av.AudioCodecContext, packer: av.AudioResampler, packets: list[bytes]
    ) -> FloatArray:
        """The samples of some packets, less those of packets that cannot be decoded."""
        found: list[FloatArray] = [np.empty((0, self.info.channels), np.float32)]
        for packet in packets:
            try:
                frames = codec.decode(av.Packet(packet))
            except AV_ERRORS:
                continue
            for frame in frames:
                found += self._packed(packer, frame)
        return np.concatenate(found)


def _is_audio(packet: bytes) -> bool:
    """Whether a packet is none of the headers of Opus, Vorbis and FLAC."""
    if packet.startswith((b"OpusHead", b"OpusTags", b"\x7fFLAC")):
        return False
    return not (packet[1:7] == b"vorbis" and packet[0] & 1)
