"""Whole files are decoded in one go, without Python between packets; all else packet by packet."""

import io
import random

import av
import numpy as np
import pytest
from audio_files import RATE, encoded, music, with_pyav

from latentmill.audio import media_from_bytes, open_audio
from latentmill.audio import with_pyav as decoder
from latentmill.errors import ItemError
from support.open_files import open_files

LENGTH = 200_001  # several blocks


def result(data: bytes, *, keep: bool = False) -> tuple[np.ndarray, str]:
    """The samples `[C, n]` up to the fault, and what was said of it."""
    blocks, fault = [], ""
    with media_from_bytes(data) as media:
        try:
            blocks += list(open_audio(media, allow_truncated=keep).blocks())
        except ItemError as error:
            fault = str(error)
    return np.concatenate(blocks, axis=1) if blocks else np.empty((0, 0)), fault


def assert_as_by_packet(data: bytes, monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> str:
    found, fault = result(data, keep=keep)

    def refuse(_: object) -> None:
        raise decoder.DecodeError("not in one go")

    with monkeypatch.context() as patch:
        patch.setattr(decoder.PyAVDecoder, "_in_one_go", refuse)
        expected, expected_fault = result(data, keep=keep)
    assert fault == expected_fault
    assert np.array_equal(found, expected)
    return fault


def surround(channels: int, layout: str) -> bytes:
    signal = np.repeat(music(LENGTH)[:, :1], channels, axis=1)
    return with_pyav(signal, RATE, "aac", "mp4", {}, layout=layout)


def with_a_picture() -> bytes:
    """Video in front: the audio is the second stream."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        video = output.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = output.add_stream("aac", rate=RATE)
        audio.layout = "stereo"
        for _ in range(20):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            output.mux(video.encode(picture))
        signal = music(LENGTH).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(signal, format="flt", layout="stereo")
        frame.sample_rate = RATE
        output.mux([*audio.encode(frame), *audio.encode(None), *video.encode(None)])
    return target.getvalue()


@pytest.mark.parametrize("kind", ["m4a", "m4a-faststart", "alac", "opus", "mono", "7.1", "video"])
def test_whole_files_are_decoded_in_one_go_bit_for_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        "mono": lambda: surround(1, "mono"),
        "7.1": lambda: surround(8, "7.1"),
        "video": with_a_picture,
    }
    data = made[kind]() if kind in made else encoded(kind, LENGTH)
    assert assert_as_by_packet(data, monkeypatch, keep=False) == ""

    def refuse(_: object) -> None:
        raise AssertionError("packet by packet, where threads wait for each other")

    monkeypatch.setattr(decoder.PyAVDecoder, "_by_packet", refuse)
    samples, fault = result(data)
    assert (abs(samples.shape[1] - LENGTH) <= 2048, fault) == (True, "")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["m4a-faststart", "alac", "opus"])
def test_damage_is_reported_and_kept_as_by_packet(
    kind: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(kind, LENGTH)
    faults = [assert_as_by_packet(whole[:-100], monkeypatch, keep=keep)]
    faults += [assert_as_by_packet(whole[: len(whole) // 2], monkeypatch, keep=keep)]
    generator = random.Random(3)
    for _ in range(8):
        data = bytearray(whole)
        for _ in range(20):
            data[generator.randrange(2000, len(data))] ^= 1 << generator.randrange(8)
        faults.append(assert_as_by_packet(bytes(data), monkeypatch, keep=keep))
    assert keep or faults[0].startswith("truncated")


def test_a_stream_that_is_left_early_leaves_no_descriptor() -> None:
    before = open_files()
    for kind in ("m4a", "opus"):
        with media_from_bytes(encoded(kind, LENGTH)) as media, open_audio(media) as stream:
            assert next(stream.blocks()).shape[1] > 0
    assert open_files() <= before
