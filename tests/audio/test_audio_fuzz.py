"""Garbage never crashes: it decodes, or it is an ItemError of one line."""

import random

import numpy as np
import pytest
from audio_files import ALL, encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.audio import media_from_bytes, open_audio, probe
from latentmill.audio.headers import find_shortage
from latentmill.audio.sniff import sniff
from latentmill.errors import ItemError

MUTATIONS = 24  # of each of 20 formats, twice


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


@pytest.mark.parametrize("kind", ALL)
def test_mutations(kind: str) -> None:
    original = encoded(kind, 9000)
    assert survives(original, allow_truncated=False)
    rng = random.Random(kind)
    for number in range(MUTATIONS):
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
    b"",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MAGICS), st.binary(max_size=200))
def test_magic_words_with_garbage_behind(magic: bytes, garbage: bytes) -> None:
    survives(magic + garbage, allow_truncated=False)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.data())
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
