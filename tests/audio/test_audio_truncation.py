import numpy as np
import pytest
from audio_files import ALL, SECONDS, encoded, rate_of

from latentmill.audio import media_from_bytes, open_audio, probe
from latentmill.errors import ItemError

PCM = ["wav", "wav-float", "wav-24", "rf64", "w64", "aiff", "au"]


def decode(data: bytes, *, allow_truncated: bool = False) -> np.ndarray:
    with media_from_bytes(data) as media:
        stream = open_audio(media, allow_truncated=allow_truncated)
        return np.concatenate(list(stream.blocks()), axis=1)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "mp3-without-xing"])
@pytest.mark.parametrize("lost", [1, 100, 0.5])
def test_a_cut_file_fails_in_one_line(kind: str, lost: float) -> None:
    data = encoded(kind).split(b"APETAGEX")[0]  # a lost tag costs no audio
    data = data[: int(len(data) * lost) if lost < 1 else len(data) - int(lost)]
    with pytest.raises(ItemError, match=r"^truncated|^cannot be loaded") as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("m4a", "alac")])
def test_what_is_there_can_be_kept(kind: str) -> None:
    data = encoded(kind)
    whole = decode(data)
    kept = decode(data[: int(len(data) * 0.7)], allow_truncated=True)
    count = kept.shape[1]
    assert 0.3 * whole.shape[1] < count < 0.95 * whole.shape[1]
    sure = count - 4096  # the last frame of a lossy codec leans on what is lost
    assert np.abs(kept[:, :sure] - whole[:, :sure]).max() < 1e-6


@pytest.mark.parametrize("kind", PCM)
def test_the_message_counts_samples(kind: str) -> None:
    data = encoded(kind)
    promised = SECONDS * rate_of(kind)
    with pytest.raises(ItemError) as caught:
        decode(data[: len(data) // 2])
    with media_from_bytes(data[: len(data) // 2]) as media:
        assert probe(media).num_samples == promised
    kept = decode(data[: len(data) // 2], allow_truncated=True).shape[1]
    assert str(caught.value) == (
        f"truncated: the header states {promised} samples, "
        f"{kept} could be loaded (--allow-truncated keeps the readable part)"
    )


def test_an_m4a_whose_index_is_lost_cannot_be_kept() -> None:
    data = encoded("m4a")  # its index lies at the end
    with pytest.raises(ItemError, match=r"bytes are missing at the end; nothing can be loaded$"):
        decode(data[: len(data) // 2], allow_truncated=True)


@pytest.mark.parametrize("kind", ["vorbis", "opus", "ogg-flac"])
def test_a_missing_last_ogg_page_is_noticed(kind: str) -> None:
    data = encoded(kind)
    with pytest.raises(ItemError, match="ends without its last page"):
        decode(data[: data.rfind(b"OggS")])


@pytest.mark.parametrize("kind", ["vorbis", "opus", "ogg-flac"])
def test_a_damaged_ogg_page_is_noticed(kind: str) -> None:
    """The decoders drop such a page and say nothing; what follows moves forward in time."""
    data = bytearray(encoded(kind))
    data[len(data) * 2 // 3] ^= 0x10
    with pytest.raises(ItemError, match=r"the Ogg page at byte [0-9]+ has a wrong checksum"):
        decode(bytes(data))
    assert decode(bytes(data), allow_truncated=True).shape[1] > rate_of(kind) // 2


def test_a_missing_ogg_page_is_noticed() -> None:
    data = encoded("vorbis")
    starts = [at for at in range(len(data)) if data.startswith(b"OggS", at)]
    without = data[: starts[-3]] + data[starts[-2] :]
    with pytest.raises(ItemError, match="Ogg pages are missing before byte"):
        decode(without)


def test_a_damaged_flac_stops_at_its_fault() -> None:
    data = bytearray(encoded("flac"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(ItemError, match=r"stopped at sample [0-9]+ of 88200, .*flac decoder"):
        decode(bytes(data))


@pytest.mark.parametrize(("miscount", "whole"), [(1, True), (2, True), (3, False)])
def test_an_mp3_encoder_may_miscount_by_two_frames(miscount: int, whole: bool) -> None:
    data = bytearray(encoded("mp3"))
    at = max(data.find(b"Xing"), data.find(b"Info"))
    frames = int.from_bytes(data[at + 8 : at + 12], "big") + miscount
    data[at + 8 : at + 12] = frames.to_bytes(4, "big")
    if whole:
        assert decode(bytes(data)).shape[1] >= SECONDS * rate_of("mp3")
    else:
        with pytest.raises(ItemError, match="truncated: the header states"):
            decode(bytes(data))


def test_lost_tags_behind_the_audio_are_no_truncation() -> None:
    data = bytearray(encoded("wav"))
    data += b"LIST" + (1000).to_bytes(4, "little") + b"INFO"
    data[4:8] = (len(data) + 988).to_bytes(4, "little")
    assert np.array_equal(decode(bytes(data)), decode(encoded("wav")))


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_a_chained_ogg_file_is_not_cut_to_its_first_stream(kind: str) -> None:
    with pytest.raises(ItemError, match=r"^chained: a second Ogg stream starts at byte"):
        decode(encoded(kind) + encoded(kind, 30_000))
