"""Garbage never crashes: it decodes, or it is an ItemError of one line."""

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from audio_files import ALL, RARE, encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.audio import media_from_bytes, open_audio, probe
from latentmill.audio.headers import find_shortage
from latentmill.audio.sniff import sniff
from latentmill.errors import ItemError

MUTATIONS = 24  # of each format, twice; of the rare ones a third


def survives(data: bytes, *, allow_truncated: bool) -> bool:
    """Whether `data` decodes; anything but audio or an ItemError fails the test."""
    try:
        with media_from_bytes(data) as media:
            probe(media)
            for block in open_audio(media, allow_truncated=allow_truncated).blocks():
                assert block.dtype == np.float32
                assert block.ndim == 2
                assert np.isfinite(block).all()
    except ItemError as error:
        assert str(error)
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("kind", [*ALL, *RARE])
def test_mutations(kind: str) -> None:
    original = encoded(kind, 9000)
    assert survives(original, allow_truncated=False)
    rng = random.Random(kind)
    for number in range(MUTATIONS if kind in ALL else MUTATIONS // 3):
        data = bytearray(original)
        span = len(data) if number % 2 else min(len(data), 300)  # headers get their share
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(span)
            data[at] = rng.choice((0, 255, rng.randrange(256), data[at] ^ 1 << rng.randrange(8)))
        if number % 3 == 0:
            start = rng.randrange(len(data))
            del data[start : start + rng.randrange(1, 200)]
        for allow in (False, True):
            survives(bytes(data), allow_truncated=allow)


MAGICS = [
    b"RIFF\0\0\0\0WAVEfmt ",
    b"RF64\xff\xff\xff\xffWAVEds64",
    b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb",
    b"FORM\0\0\0\0AIFFCOMM",
    b"caff\0\1\0\0",
    b".snd",
    b"fLaC\0\0\0\x22",
    b"OggS\0\2",
    b"ID3\4\0\0\0\0\0\0",
    b"\xff\xfb\x90\0",
    b"\xff\xf1\x50\x80",
    b"\0\0\0\x18ftypM4A ",
    b"\x1a\x45\xdf\xa3",
    b"wvpk",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    b"RIFF\0\0\0\0AVI LIST",
    b"FLV\x01\x05\0\0\0\x09",
    b"FRM8\0\0\0\0\0\0\0\x09DSD ",
    b"DSD \x1c\0\0\0\0\0\0\0",
    b"TTA1\1\0\2\0",
    b"MAC \x96\x0f\0\0",
    b"MP+\x17",
    b"MPCKSH\x0e",
    b"tBaK",
    b"ajkg\2",
    b"#!AMR\n",
    b"\x0b\x77\0\0\x14\x40",
    b".RMF\0\0\0\x12",
    b"NIST_1A\n   1024\n",
    b"Creative Voice File\x1a",
    b"qoaf\0\0\1\0",
    b"\0\0\x01\xba",
    b"\x7f\xfe\x80\x01",
    b"\xf8\x72\x6f\xba\xf8\x72\x6f\xba",
    b"",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MAGICS), st.binary(max_size=200))
def test_magic_words_with_garbage_behind(magic: bytes, garbage: bytes) -> None:
    survives(magic + garbage, allow_truncated=False)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*ALL, *RARE]), st.data())
def test_no_whole_file_is_called_short_and_a_cut_one_never_crashes(kind: str, data) -> None:
    original = encoded(kind, 9000)
    cut = data.draw(st.integers(1, len(original)))
    with media_from_bytes(original) as media:
        assert find_shortage(media, sniff(media)) is None
    with media_from_bytes(original[:cut]) as media:
        try:
            find_shortage(media, sniff(media))
        except ItemError as error:
            assert "audio" in str(error)  # too little is left to know the format


def box(name: bytes, *content: bytes) -> bytes:
    """An MP4 box."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def one_track() -> bytes:
    """The `moov` of an MP4 with one audio track and no samples."""
    number, rate = struct.pack(">I", 1), struct.pack(">I", 44_100)
    tables = box(b"stbl", box(b"stsz", bytes(12)), box(b"stts", bytes(8)))
    sound = box(b"hdlr", bytes(8), b"soun", bytes(12))
    media = box(b"mdia", box(b"mdhd", bytes(12), rate, bytes(8)), sound, box(b"minf", tables))
    return box(b"moov", box(b"trak", box(b"tkhd", bytes(12), number, bytes(68)), media))


CLAIMS = {
    "samples of a fragment": box(
        b"moof",
        box(
            b"traf",
            box(b"tfhd", struct.pack(">II", 0, 1)),
            box(b"trun", struct.pack(">II", 0, 1 << 26)),
        ),
    ),
    "bytes of an index": struct.pack(">I4sQ", 1, b"sidx", 1 << 28) + bytes(100),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_much_costs_no_memory(claim: str) -> None:
    data = box(b"ftyp", b"M4A ", bytes(8)) + one_track() + CLAIMS[claim]
    tracemalloc.start()
    try:
        assert not survives(data, allow_truncated=False)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_are_encoded_or_fail_with_a_reason(tmp_path: Path, count: int) -> None:
    """Through the encoder of units, in a process whose crash would be seen here."""
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent / "pipeline"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz_units", str(tmp_path), str(count), "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=280 if count < 1000 else 1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    outcomes = result["outcomes"]
    assert len(outcomes) == 2 * count
    for key, status, reason in outcomes:
        assert status in ("encoded", "failed"), key
        assert bool(reason) == (status == "failed"), key
        assert "\n" not in reason
        assert "while reading" not in reason, (key, reason)  # an error that nobody expected
        assert str(tmp_path) not in reason
    statuses = Counter(status for _, status, _ in outcomes)
    assert statuses["failed"] > count / 2
    assert all(status == "encoded" for key, status, _ in outcomes if ".whole." in key)
    assert all(status == "failed" for key, status, _ in outcomes if ".nothing." in key)
    assert result["after"] == result["before"]  # threads and open files
    assert result["grown_mib"] < 300
    assert result["slowest_unit_seconds"] < 120
