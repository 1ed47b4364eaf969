"""Damaged recordings through the encoder of a unit, in a process of their own.

    python -m support.fuzz_units FOLDER COUNT SEED

Writes COUNT damaged files into FOLDER, encodes them as the units of a run are, with an address
space of limited size, and prints what became of them and what it cost, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "audio"))

import torch
from audio_files import encoded

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.models import registry
from latentmill.sources.base import Item

KINDS = ("wav", "wav-float", "flac", "vorbis", "mp3", "mp3-without-xing", "m4a", "opus")
KINDS += ("wma", "tta", "avi", "mpegts", "ac3")
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".txt", "")
SAMPLES = 30_000
HEADROOM = 3 << 30  # bytes of address space beyond what is taken before the first file
UNIT = 50

Damage = Callable[[bytearray, random.Random], bytes]


def cut_anywhere(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def cut_in_header(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(min(len(data), 200))])


def cut_the_start(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[rng.randrange(1, len(data)) :])


def lose_a_piece(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 5000)]
    return bytes(data)


def flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 10, 500))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_header(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 3, 12))):
        data[rng.randrange(min(len(data), 300))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(data)


def zero_a_piece(data: bytearray, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.randrange(1, 20_000)
    data[start : start + length] = bytes(min(length, len(data) - start))
    return bytes(data)


def nothing(data: bytearray, rng: random.Random) -> bytes:
    return bytes(rng.choice((0, 1, 44, 70_000)))


def noise(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(16)]) + rng.randbytes(rng.randrange(20_000))


def huge_numbers(data: bytearray, rng: random.Random) -> bytes:
    """Lengths, rates and sizes in the header that no file can keep."""
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(0, min(len(data), 120) - 4)
        data[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(data)


def absurd_wav(data: bytearray, rng: random.Random) -> bytes:
    channels = rng.choice((0, 1, 2, 300, 65535))
    rate = rng.choice((0, 1, 99, 44100, 2_000_000, 0xFFFF_FFFF))
    bits, align = rng.choice((0, 1, 8, 16, 64, 65535)), rng.choice((0, 1, 4, 65535))
    size = rng.choice((0, 100, 0x7FFF_FFFF, 0xFFFF_FFFE))
    fmt = struct.pack("<HHIIHH", rng.choice((0, 1, 3, 85)), channels, rate, rate, align, bits)
    head = b"RIFF" + struct.pack("<I", size) + b"WAVEfmt \x10\0\0\0" + fmt
    return head + b"data" + struct.pack("<I", size) + rng.randbytes(4000)


def absurd_flac(data: bytearray, rng: random.Random) -> bytes:
    """Rate, channels, bits and length of STREAMINFO drawn at random (RFC 9639, section 8.2)."""
    flac = bytearray(encoded("flac", SAMPLES))
    flac[18:26] = rng.randbytes(8)
    return bytes(flac)


def long_tag(data: bytearray, rng: random.Random) -> bytes:
    """An ID3 tag that claims up to 256 MB."""
    size = bytes(rng.randrange(128) for _ in range(4))
    return b"ID3\x04\0\0" + size + bytes(data)


def two_files(data: bytearray, rng: random.Random) -> bytes:
    other = encoded(rng.choice(KINDS), SAMPLES)
    return bytes(data[: rng.randrange(len(data))]) + other


def whole(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data)


DAMAGES: tuple[Damage, ...] = (
    *(cut_anywhere, cut_in_header, cut_the_start, lose_a_piece, flip, flip_header, zero_a_piece),
    *(nothing, noise, huge_numbers, absurd_wav, absurd_flac, long_tag, two_files, whole),
)


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names, with an extension that is often wrong, and contents."""
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        damage = DAMAGES[number % len(DAMAGES)]
        kind = KINDS[number // len(DAMAGES) % len(KINDS)]
        name = f"{number:04d}.{damage.__name__}.{kind}{rng.choice(EXTENSIONS)}"
        yield name, damage(bytearray(encoded(kind, SAMPLES)), rng)


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    items = []
    for name, data in damaged(count, seed):
        (folder / name).write_bytes(data)
        items.append(Item(key=name, uri=str(folder / name), size=len(data), version=""))
    model = registry.resolve("mdct").load("cpu")
    chunking = Chunking.for_model(model.spec)

    def encode(
        unit: list[Item], *, allow_truncated: bool = False
    ) -> Iterator[tuple[str, str, str]]:
        settings = EncodeSettings(allow_truncated=allow_truncated, load_timeout=30)
        audio = LocalAudio(unit, Loading(model.spec, chunking, settings), Timings())
        with closing(audio):
            for outcome in UnitEncoder(model, chunking, settings).encode(audio):
                yield outcome.key, outcome.status, outcome.reason or ""

    warm = [item for item in items if ".whole." in item.key]
    list(encode(warm))  # the threads and libraries that stay
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM, taken + HEADROOM))
    before = {"threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}  # noqa: PTH208
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, outcomes = 0.0, []
    for allow_truncated in (False, True):
        for start in range(0, count, UNIT):
            began = time.monotonic()
            unit = items[start : start + UNIT]
            outcomes += encode(unit, allow_truncated=allow_truncated)
            slowest = max(slowest, time.monotonic() - began)
    result = {
        "outcomes": outcomes,
        "damages": Counter(key.split(".")[1] for key, status, _ in outcomes if status == "encoded"),
        "slowest_unit_seconds": slowest,
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
        "before": before,
        "after": {
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
