"""Counts the samples of Vorbis pages in Ogg (Vorbis I, sections 4.2 and 4.3).

A stream that was split without re-encoding begins with a page that has more samples than its
granule position counts. libvorbis and `oggdec` drop the last block of that page and continue
counting at the granule position; libsndfile then stops as many samples too early.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from latentmill.audio.media import MediaFile
from latentmill.audio.ogg import first_packets, last_granules

_MODE_BITS = 41
_LONGEST_BLOCK = 8192


@dataclass(frozen=True)
class Start:
    """The first page with audio.

    Attributes:
        samples: Samples per channel of its packets.
        granule: Samples according to its granule position.
        last: Samples of its last packet.
        ends: Whether it is also the last page, which may count fewer.
    """

    samples: int
    granule: int
    last: int
    ends: bool

    @property
    def dropped(self) -> int:
        """Samples at the end of the page that libvorbis drops: at most the last block."""
        extra = self.samples - self.granule
        if self.ends and extra <= self.last:  # the usual end of a short file: decoders trim it
            return 0
        return max(0, min(extra, self.last))


def read_start(media: MediaFile, offset: int) -> Start | None:
    """The first page with audio of a Vorbis stream; None if it cannot be parsed."""
    found = first_packets(media, offset, headers=3)
    if found is None or len(found.headers) < 3 or not found.packets:
        return None
    sizes = block_sizes(found.headers)
    if sizes is None:
        return None
    blocks, mask = [], (1 << (len(sizes) - 1).bit_length()) - 1
    for packet in found.packets:
        if not packet or packet[0] & 1:
            return None
        mode = packet[0] >> 1 & mask
        if mode >= len(sizes):
            return None
        blocks.append(sizes[mode])
    given = [(a + b) // 4 for a, b in itertools.pairwise(blocks)]
    return Start(sum(given), found.granule, given[-1] if given else 0, found.ends)


def last_safe_seek(media: MediaFile, start: Start) -> int:
    """The last sample that libsndfile can seek to; it is before the last page.

    In the last page libsndfile counts backwards from a granule position that is too small.
    """
    granules = last_granules(media)
    if len(granules) < 2:
        return 0
    return max(0, granules[-2] - _LONGEST_BLOCK - max(0, start.granule - start.samples))


def given_by(packet: bytes, sizes: list[int]) -> int:
    """Number of samples that an audio packet completes together with the packet before it.

    A long block has the size of the block before; a short block is assumed to follow a short one.
    """
    bits = (len(sizes) - 1).bit_length()
    mode = packet[0] >> 1 & (1 << bits) - 1
    size = sizes[mode] if mode < len(sizes) else min(sizes)
    before = size if size == min(sizes) or packet[0] >> 1 + bits & 1 else min(sizes)
    return (size + before) // 4


def block_sizes(headers: list[bytes]) -> list[int] | None:
    """The block size of each mode. Modes end the setup header, so they are read backwards."""
    if len(headers) < 3:
        return None
    identification, _, setup = headers[:3]
    if len(identification) < 29:
        return None
    short, long = 1 << (identification[28] & 15), 1 << (identification[28] >> 4)
    bits = int.from_bytes(setup, "little")
    end, flags, modes = bits.bit_length() - 1, list[int](), None
    while len(flags) < 64:  # the framing bit is at `end`
        at = end - _MODE_BITS * (len(flags) + 1)
        if at < 6 or bits >> at + 1 & 0xFFFF_FFFF:  # window and transform types are 0
            break
        flags.insert(0, bits >> at & 1)
        if bits >> at - 6 & 63 == len(flags) - 1:
            modes = [long if flag else short for flag in flags]
    return modes
