"""Loads damaged Ogg files: lost samples become silence, and later samples keep their time.

FFmpeg drops a damaged page and continues with the next one without a gap. Here pages are read one
by one, and their granule positions (the number of samples up to the end of the page) give their
times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np

from latentmill.audio import vorbis
from latentmill.audio.ogg import Page, all_pages, packets_of
from latentmill.audio.packing import FramePacker
from latentmill.audio.stream import silence
from latentmill.audio.with_pyav import AV_ERRORS, PyAVDecoder
from latentmill.record import FloatArray

_LONGEST_PACKET = 5760
"""Samples of an Opus packet; a Vorbis packet has at most 4,096."""


@dataclass
class _TimeLine:
    """Maps pages to samples.

    Attributes:
        begin: Samples that granule positions count before the first sample: Opus's pre-skip.
        origin: The granule position of the first sample, if known.
        last: The granule position of the last intact page.
    """

    begin: int
    origin: int | None = None
    last: int | None = None

    def place(self, page: Page, held: tuple[int, int], lost: int, before: int | None) -> int:
        """The number of the first sample of a page.

        A granule position counts to the end of its page. The last one may be smaller than the end
        of the page, so the last page starts at the end of the page before, if known. `held` are
        the samples of the page and of one of its packets, `lost` the number of missing pages before
        it, and `before` the end of the damaged page before it, according to that page's header.
        """
        samples, each = held
        if self.origin is None:
            self.origin = page.granule - samples
            # If the first pages are lost, the audio began at 0, unless that is too long ago.
            if 0 <= self.origin - self.begin <= lost * 255 * each:
                self.origin = self.begin
        start = page.granule - samples
        if (
            lost
            and page.flags & 4
            and before is not None
            and start <= before <= start + _LONGEST_PACKET
        ):
            start = before
        self.last = page.granule
        return start - self.origin


class OggPageDecoder(PyAVDecoder):
    """A damaged Ogg file of Opus, Vorbis or FLAC."""

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        codec = av.CodecContext.create(self._stream.codec.name, "r")
        assert isinstance(codec, av.AudioCodecContext)
        extradata = self._stream.codec_context.extradata
        codec.extradata, codec.layout = extradata, self._layout
        codec.sample_rate = self._stream.codec_context.sample_rate
        packer = FramePacker(self._layout, self.info.sample_rate)
        opus = self._format == "ogg-opus"
        time = _TimeLine(int.from_bytes((extradata or b"")[10:12], "little") if opus else 0)
        done, rest, lost, headers = 0, bytearray(), 0, list[bytes]()
        previous: Page | None = None  # the last intact page
        broken: Page | None = None
        for page in all_pages(self._media):
            if previous is not None and page.serial != previous.serial:
                continue
            if not page.whole:
                broken = page
                continue
            if previous is not None and page.sequence != previous.sequence + 1:
                codec.flush_buffers()
                rest.clear()
                lost = max(1, page.sequence - previous.sequence - 1)
            previous = page
            packets = packets_of(page, rest)
            headers += [one for one in packets if not _is_audio(one)]
            packets = [one for one in packets if _is_audio(one)]
            block = self._decoded(codec, packer, packets)
            if page.granule < 0 or (not len(block) and time.origin is None):
                continue
            before = None
            if broken is not None and broken.sequence == page.sequence - 1 and packets:
                before = broken.granule + self._withheld(packets[0], headers)
            elif opus and time.last is not None and packets:
                each = round(len(block) / len(packets))
                before = page.granule - len(block) + (time.last - page.granule) % each
            start = time.place(
                page, (len(block), len(block) // max(1, len(packets)) + 1), lost, before
            )
            if lost and start > done:
                yield from silence(start - done, self.info.channels)
                done = start
            lost = 0
            end = page.granule - (time.origin or 0)
            block = block[: max(0, end - done)]  # the last page may count fewer samples
            done += len(block)
            yield block

    def _withheld(self, packet: bytes, headers: list[bytes]) -> int:
        """Samples lost with the first packet after a gap, because Vorbis overlaps packets."""
        sizes = vorbis.block_sizes(headers) if self._format == "ogg-vorbis" else None
        return vorbis.given_by(packet, sizes) if sizes and packet else 0

    def _decoded(
        self, codec: av.AudioCodecContext, packer: FramePacker, packets: list[bytes]
    ) -> FloatArray:
        """The samples of some packets; packets that cannot be decoded are skipped."""
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
    """Whether a packet is not a header of Opus, Vorbis or FLAC."""
    if packet.startswith((b"OpusHead", b"OpusTags", b"\x7fFLAC")):
        return False
    return not (packet[1:7] == b"vorbis" and packet[0] & 1)
