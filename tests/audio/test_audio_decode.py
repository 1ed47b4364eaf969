import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audio_files import (
    ALL,
    PYAV,
    RATE,
    SECONDS,
    SOUNDFILE,
    encoded,
    music,
    rate_of,
    sound,
    with_pyav,
)

from latentmill.audio import AudioInfo, media_from_bytes, open_audio, open_media, prepare, probe
from latentmill.audio.headers import Shortage, find_shortage
from latentmill.audio.ogg import first_packets
from latentmill.audio.sniff import sniff
from latentmill.errors import ItemError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "audio"
ID3 = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
LOSSLESS = ("wav", "rf64", "w64", "aiff", "au", "caf", "flac", "alac", "ogg-flac")


def decode(data: bytes, **options: bool) -> np.ndarray:
    with media_from_bytes(data) as media:
        return np.concatenate(list(open_audio(media, **options).blocks()), axis=1)


def info(data: bytes) -> AudioInfo:
    with media_from_bytes(data) as media:
        return probe(media)


@pytest.mark.parametrize("kind", ALL)
def test_every_format_comes_back_on_its_own_time_line(kind: str) -> None:
    signal = music(SECONDS * rate_of(kind), rate_of(kind)).T
    audio = decode(encoded(kind))
    assert audio.dtype == np.float32
    start = {"adts": 1024, "mp3-without-xing": 1105}.get(kind, 0)  # no place to write the delay
    if not start:
        assert audio.shape == signal.shape
    audio = audio[:, start : start + signal.shape[1]]
    if kind in LOSSLESS:
        assert np.abs(audio - signal).max() <= 2**-15
    part = signal[0, 20_000:40_000]
    fit = [np.dot(part, audio[0, 20_000 + lag : 40_000 + lag]) for lag in range(-200, 201)]
    assert np.argmax(fit) == 200
    assert np.dot(part, audio[0, 20_000:40_000]) == pytest.approx(np.dot(part, part), rel=0.1)


@pytest.mark.parametrize("container", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
@pytest.mark.parametrize("bits", [16, 32])
def test_integers_are_divided_by_full_scale(container: str, bits: int) -> None:
    """To the bit, as a division in float64 that is rounded to float32 once."""
    full = 2 ** (bits - 1)
    drawn = np.random.default_rng(bits).integers(-full, full, (140_000, 2))  # over one block
    drawn[:4] = [[-full, full - 1], [0, -1], [1, full // 3], [-full + 1, full - 2]]
    signal = drawn.astype(f"int{bits}")
    audio = decode(sound(signal, RATE, container, f"PCM_{bits}"))
    assert np.array_equal(audio, (drawn / full).astype(np.float32).T)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wav", ("wav", "pcm_16", "soundfile")),
        ("wav-24", ("wav", "pcm_24", "soundfile")),
        ("rf64", ("rf64", "pcm_16", "soundfile")),
        ("aiff", ("aiff", "pcm_16", "soundfile")),
        ("flac", ("flac", "pcm_16", "soundfile")),
        ("vorbis", ("ogg-vorbis", "vorbis", "soundfile")),
        ("mp3", ("mp3", "mpeg_layer_iii", "soundfile")),
        ("mp3-without-xing", ("mp3", "mp3", "pyav")),
        ("m4a", ("mp4", "aac", "pyav")),
        ("adts", ("aac", "aac", "pyav")),
        ("opus", ("ogg-opus", "opus", "pyav")),
        ("webm", ("matroska", "opus", "pyav")),
        ("ogg-flac", ("ogg-flac", "flac", "pyav")),
        ("wavpack", ("wavpack", "wavpack", "pyav")),
    ],
)
def test_probe_and_routing(kind: str, expected: tuple[str, str, str]) -> None:
    found = info(encoded(kind))
    assert (found.format, found.codec, found.decoder) == expected
    assert (found.sample_rate, found.channels) == (rate_of(kind), 2)
    unknown = kind in ("mp3-without-xing", "adts", "webm")
    assert found.num_samples == (None if unknown else SECONDS * rate_of(kind))


@pytest.mark.parametrize("kind", ["flac", "mp3", "mp3-without-xing", "adts"])
def test_tags_in_front_and_behind_change_nothing(kind: str) -> None:
    data = encoded(kind)
    plain = decode(data)
    assert np.array_equal(decode(ID3 + ID3 + data), plain)
    if kind != "adts":
        assert np.array_equal(decode(data + b"TAG" + bytes(125)), plain)
    with media_from_bytes(ID3 + data) as tagged, media_from_bytes(data) as bare:
        assert sniff(tagged).offset == len(ID3) + sniff(bare).offset


@pytest.mark.parametrize("kind", ["wav", "wav-24", "rf64", "w64", "aiff", "au", "caf"])
def test_the_samples_that_a_header_promises_are_counted(kind: str) -> None:
    data = encoded(kind)
    with media_from_bytes(data[: len(data) // 2]) as media:
        shortage = find_shortage(media, sniff(media))
    assert shortage is not None
    assert shortage.num_samples == SECONDS * RATE


@pytest.mark.parametrize("frames_per_packet", [0, 4096])
def test_packets_of_caf_that_hold_more_than_a_sample_are_not_counted(
    frames_per_packet: int,
) -> None:
    data = bytearray(encoded("caf"))
    at = data.index(b"desc") + 12 + 20
    assert data[at : at + 4] == (1).to_bytes(4, "big")
    data[at : at + 4] = frames_per_packet.to_bytes(4, "big")
    with media_from_bytes(bytes(data[:-1000])) as media:
        assert find_shortage(media, sniff(media)) == Shortage("1000 bytes are missing at the end")


@pytest.mark.parametrize(
    ("subtype", "counted"),
    [(one, True) for one in ("ULAW", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")]
    + [("ALAW", True), ("G721_32", False)],  # 4 bits each: samples have no fixed size in bytes
)
def test_the_samples_that_an_au_header_promises_are_counted(subtype: str, counted: bool) -> None:
    data = sound(np.linspace(-1, 1, 2000)[:, None], RATE, "AU", subtype)
    with media_from_bytes(data[:-100]) as media:
        shortage = find_shortage(media, sniff(media))
    wanted = Shortage("100 bytes are missing at the end", 2000 if counted else None)
    assert shortage == wanted


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x8000_0000])
def test_a_wav_of_a_stream_may_be_longer_than_4_gib(tmp_path: Path, size: int) -> None:
    data = bytearray(encoded("wav")[:1000])
    assert data[36:40] == b"data"
    data[40:44] = size.to_bytes(4, "little")
    path = tmp_path / "long.wav"
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(8 << 30)  # takes no space
    with open_media(str(path)) as media:
        assert find_shortage(media, sniff(media)) is None


def test_mp3_with_zeros_behind_is_whole_but_damage_inside_is_not() -> None:
    data = encoded("mp3-without-xing")
    assert np.array_equal(decode(data + bytes(4000)), decode(data))
    damaged = data[:9000] + bytes(byte ^ 0x5A for byte in data[9000:9400]) + data[9400:]
    with pytest.raises(ItemError, match="truncated or damaged: loading stopped at sample"):
        decode(damaged)


def test_flac_of_unknown_length() -> None:
    data = bytearray(encoded("flac"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    found = info(bytes(data))
    assert (found.num_samples, found.decoder) == (None, "pyav")
    assert np.array_equal(decode(bytes(data)), decode(encoded("flac")))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_both_decoders_scale_alike(subtype: str) -> None:
    signal = np.linspace(-1, 1, 2001)[:, None].repeat(2, axis=1)
    data = sound(signal, RATE, "WAV", subtype)
    from latentmill.audio.with_pyav import PyAVDecoder

    with media_from_bytes(data) as media:
        decoder = PyAVDecoder(media, sniff(media))
        other = np.concatenate(list(decoder.blocks())).T
        decoder.close()
    audio = decode(data)
    assert np.array_equal(audio, other)
    assert audio.min() == -1
    assert np.abs(audio[:, :-1] - signal.T[:, :-1].astype(np.float32)).max() <= 2**-7


@pytest.mark.parametrize(("layout", "channels"), [("5.1", 6), ("7.1", 8), ("hexadecagonal", 16)])
def test_many_channels(layout: str, channels: int) -> None:
    signal = (np.arange(9000)[None] * np.arange(1, channels + 1)[:, None] % 991 / 991).astype("f4")
    audio = decode(with_pyav(signal.T, RATE, "wavpack", "wv", {}, layout=layout, sample="fltp"))
    assert np.abs(audio - signal).max() < 1e-6


def test_soundfile_refuses_and_pyav_retries() -> None:
    """BW64 is RF64 under another name, which libsndfile does not know."""
    data = b"BW64" + encoded("rf64")[4:]
    assert info(data).decoder == "pyav"
    assert np.array_equal(decode(data), decode(encoded("rf64")))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_has_no_length_to_miss(size: int) -> None:
    data = encoded("wav")
    streamed = data[:40] + size.to_bytes(4, "little") + data[44:]
    streamed = streamed[:4] + min(size + 36, 0xFFFFFFFF).to_bytes(4, "little") + streamed[8:]
    assert np.array_equal(decode(streamed), decode(data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"hello world, not audio", "not a known audio format .*68 65 6c 6c 6f"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "not a known audio format"),
        (b"\xff" * 5000, "not a known audio format"),
        (bytes(5000), "not a known audio format"),
        (ID3, "the file has no audio after its ID3 tag"),
        (b"RIFF\x24\0\0\0WAVE", "cannot be loaded as wav"),
        (b"OggS" + bytes(40), "truncated|cannot be loaded"),
        (sound(np.zeros((0, 2)), RATE), "cannot be loaded as wav: it contains no samples"),
        (sound(np.zeros((10, 65)), RATE), "invalid number of channels 65"),
        (sound(np.zeros((10, 1)), 2_000_000), "2000000 Hz"),
        (sound(np.zeros((10, 1)), 50), "50 Hz"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_is_no_audio_is_refused_in_one_line(data: bytes, text: str) -> None:
    with pytest.raises(ItemError, match=text) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found_where_they_are(value: float) -> None:
    signal = music(5 * RATE)
    signal[200_000, 1] = signal[210_000, 0] = value
    with pytest.raises(ItemError, match=r"^NaN or Inf .* first at sample 200000 \(4\.535 s\)$"):
        decode(sound(signal, RATE))


def test_a_ten_minute_wav_is_decoded_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    minute = (music(60 * RATE) * 32767).astype("<i2").tobytes()
    header = bytearray(encoded("wav")[:44])
    header[4:8] = (36 + 10 * len(minute)).to_bytes(4, "little")
    header[40:44] = (10 * len(minute)).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(header)
        for _ in range(10):
            file.write(minute)
    tracemalloc.start()
    with open_media(str(path)) as media:
        waveform = prepare(open_audio(media), sample_rate=48000, channels=1)
        lengths = [block.shape[1] for block in waveform.blocks()]
        assert media.content_hash.startswith("xxh3:")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == 600 * 48000
    assert peak < 16 << 20  # the file has 106 MB


def test_two_threads_do_not_disturb_each_other() -> None:
    kinds = ["wav", "flac", "vorbis", "mp3", "m4a", "opus", "webm", "alac"]
    expected = [decode(encoded(kind)) for kind in kinds]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(decode, [encoded(kind) for kind in kinds] * 3))
    for index, audio in enumerate(found):
        assert np.array_equal(audio, expected[index % len(kinds)])


def test_one_file_can_be_opened_again() -> None:
    with media_from_bytes(encoded("vorbis")) as media:
        first = [block.sum() for block in open_audio(media).blocks()]
        probe(media)
        assert [block.sum() for block in open_audio(media).blocks()] == first


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recordings in ../shared/audio")
@pytest.mark.parametrize("folder", ["flac", "ogg", "stems"])
def test_real_recordings_have_the_length_they_promise(folder: str) -> None:
    paths = sorted(p for p in (SHARED / folder).rglob("*.*") if p.suffix not in (".txt", ".md"))
    lengths = set()
    for path in paths[:2] if folder == "stems" else paths:
        with open_media(str(path)) as media:
            stream = open_audio(media)
            assert sum(block.shape[1] for block in stream.blocks()) == stream.info.num_samples
            lengths.add(stream.info.num_samples)
    assert paths
    if folder == "stems":  # four minutes of AAC each, on one time line
        assert len(lengths) == 1


def test_decoding_has_a_time_limit(monkeypatch) -> None:
    from latentmill.audio.with_soundfile import SoundFileDecoder

    data = encoded("wav")
    clock = [0.0]
    monkeypatch.setattr("latentmill.audio.stream.time.monotonic", lambda: clock[0])
    plain = SoundFileDecoder.blocks

    def slow(self: SoundFileDecoder):
        for block in plain(self):
            for start in range(0, len(block), 8820):  # 0.2 s
                clock[0] += 2.0
                yield block[start : start + 8820]

    monkeypatch.setattr(SoundFileDecoder, "blocks", slow)
    with media_from_bytes(data) as media:
        total = 0
        for block in open_audio(media, time_limit=18.1).blocks():
            clock[0] += 1000.0  # whoever takes the blocks may take his time
            total += block.shape[1]
        assert total == SECONDS * RATE
        with pytest.raises(
            ItemError, match=r"^loading took 14 s for 1 s of audio, .*--load-timeout 12 allows$"
        ):
            list(open_audio(media, time_limit=12).blocks())


def test_a_file_of_nothing_but_tags_is_soon_given_up() -> None:
    tag = b"ID3\4\0\0\0\0\0\0"
    flac = encoded("flac")
    assert np.array_equal(decode(tag * 3 + flac), decode(flac))
    with (
        media_from_bytes(tag * 5000 + flac) as media,
        pytest.raises(ItemError, match="not a known audio format"),
    ):
        open_audio(media)


@pytest.mark.parametrize("kind", ["m4a", "m4a-faststart", "alac", "mp3", "vorbis", "flac", "opus"])
def test_clicks_stay_where_they_are(kind: str) -> None:
    """An encoder's delay (priming, pre-skip, LAME's gap) is dropped to the sample."""
    rate = rate_of(kind)
    signal = np.zeros((rate, 2), np.float32)
    at = 20_000
    signal[at] = 0.9
    if kind in SOUNDFILE:
        data = sound(signal, rate, *SOUNDFILE[kind])
    else:
        data = with_pyav(signal, rate, *PYAV[kind])
    audio = decode(data)
    assert audio.shape == (2, rate)
    assert int(np.abs(audio[0]).argmax()) == at


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return (8 + len(body)).to_bytes(4, "big") + name + body


def test_the_gap_that_itunes_writes_is_dropped() -> None:
    """Without an edit list the delay is in a tag, of which FFmpeg takes the delay alone."""
    signal = np.zeros((SECONDS * RATE, 2), np.float32)
    signal[20_000] = 0.9
    data = with_pyav(signal, RATE, "aac", "mp4", {"use_editlist": "0"})
    gap = f" 00000000 {1024:08X} 00000000 {len(signal):016X}"
    zero = bytes(4)
    tag = box(
        b"----",
        box(b"mean", zero, b"com.apple.iTunes"),
        box(b"name", zero, b"iTunSMPB"),
        box(b"data", b"\0\0\0\1", zero, gap.encode()),
    )
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    moov = data.rindex(b"moov") - 4  # the last box; in it `udta` is last
    udta = data.index(b"udta", moov) - 4
    tags = box(b"udta", box(b"meta", zero, handler, box(b"ilst", tag)))
    tagged = data[:moov] + box(b"moov", data[moov + 8 : udta], tags)
    audio = decode(tagged)
    assert audio.shape == (2, len(signal))
    assert int(np.abs(audio[0]).argmax()) == 20_000


def ogg_page(number: int, sizes: list[int], body: bytes) -> bytes:
    """An Ogg page without a checksum (RFC 3533)."""
    assert len(body) == sum(sizes)
    head = struct.pack("<BqIIIB", 0, 0, 7, number, 0, len(sizes))
    return b"OggS\0" + head + bytes(sizes) + body


@pytest.mark.parametrize("pages", [3, 400])
def test_a_comment_with_a_large_picture_is_read_in_linear_time(pages: int) -> None:
    """26 MB took several minutes."""
    whole = np.random.default_rng(0).bytes(255 * 255)
    written = [ogg_page(0, [30], b"i" * 30)]
    written += [ogg_page(1 + n, [255] * 255, whole) for n in range(pages)]
    written.append(ogg_page(1 + pages, [1, 40], b"c" + b"s" * 40))
    written.append(ogg_page(2 + pages, [255, 5, 3], b"a" * 260 + b"b" * 3))
    with media_from_bytes(b"".join(written)) as media:
        found = first_packets(media, 0, headers=3)
    assert found is not None
    assert found.packets == [b"a" * 260, b"b" * 3]
    identification, comment, setup = found.headers
    assert (identification, setup) == (b"i" * 30, b"s" * 40)
    if pages == 3:
        assert comment == whole * 3 + b"c"
    else:  # the beginning of it, in bounded memory
        assert len(comment) < 17 << 20
