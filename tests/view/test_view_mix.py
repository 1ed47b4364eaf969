"""The mixing desk against a computation of its own: mdct is linear, so a mix of latents is the mix
of the waveforms, scaled and shifted."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from view_server import HOP, RATE, STEMS, Site, make_source, make_store, serving

from latentmill.errors import ConfigError
from latentmill.pictures.drawing import heat_map, waveform
from latentmill.store.store import LatentStore
from latentmill.view.desk import Desk
from latentmill.view.query import MAX_SECONDS, Channel, MixRequest

ROUNDING = 2e-3  # of float16 latents, relative to full scale


def expected(folder: Path, channels: list[dict[str, Any]], start: int, samples: int) -> np.ndarray:
    """The sum of the source files, by the definitions in docs/view.md."""
    files = [soundfile.read(folder / f"{c['key']}.wav", always_2d=True)[0].T for c in channels]
    shifts = [c.get("offset", 0) * HOP for c in channels]
    length = max(f.shape[1] + shift for f, shift in zip(files, shifts, strict=True))
    total = np.zeros((files[0].shape[0], max(length, start * HOP + samples)))
    for sound, shift, channel in zip(files, shifts, channels, strict=True):
        if channel.get("mute"):
            continue
        gain = 10 ** (channel.get("gain_db", 0) / 20)
        pan = channel.get("pan", 0)
        gains = np.array([gain * min(1, 1 - pan), gain * min(1, 1 + pan)])[: len(sound), None]
        part = sound[:, max(0, -shift) :]
        begin = max(0, shift)
        total[:, begin : begin + part.shape[1]] += gains * part
    return total[:, start * HOP : start * HOP + samples]


def channel(key: str, **values: Any) -> dict[str, Any]:
    return {"key": key, **values}


MIXES: dict[str, tuple[list[dict[str, Any]], dict[str, int]]] = {
    "one": ([channel("north/bass")], {}),
    "two": ([channel("north/bass"), channel("south/drums")], {}),
    "gains": ([channel("north/bass", gain_db=-6.5), channel("north/drums", gain_db=3)], {}),
    "mute": ([channel("north/bass", mute=True), channel("north/drums")], {}),
    "all muted": ([channel("north/bass", mute=True)], {}),
    "later": ([channel("north/bass"), channel("south/drums", offset=70)], {}),
    "earlier": ([channel("north/bass", offset=-40), channel("south/drums", offset=13)], {}),
    "after a gap": ([channel("south/vocals"), channel("north/bass", offset=400)], {}),
    "only its end": ([channel("north/bass", offset=-150)], {}),
    "the same twice": ([channel("north/bass"), channel("north/bass", offset=1)], {}),
    "a part": ([channel("north/bass"), channel("north/drums")], {"start": 50, "frames": 60}),
    "the end": ([channel("north/bass", gain_db=-3)], {"start": 150, "frames": 10_000}),
    "a part later": ([channel("north/bass", offset=33)], {"start": 20, "frames": 40}),
    "all": ([channel(f"north/{s}", gain_db=-4) for s in STEMS], {}),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("side", ["latent", "decoded", "original"])
def test_the_mix_is_that_of_the_waveforms(name: str, side: str, site: Site, source: Path) -> None:
    channels, part = MIXES[name]
    answer = site.get("audio", mix={"channels": channels, **part}, of=side)
    assert answer.status == 200, answer.body
    audio = answer.audio
    wanted = expected(source, channels, part.get("start", 0), audio.shape[1])
    assert audio.shape == wanted.shape
    assert audio.shape[1] >= 0.5 * min(part.get("frames", 100), 40) * HOP
    assert np.abs(audio - wanted).max() < (1e-6 if side == "original" else ROUNDING)


PANS: dict[str, tuple[list[dict[str, Any]], dict[str, int]]] = {
    "left": ([channel("north/bass", pan=-1)], {}),
    "a little right": ([channel("north/bass", pan=0.3), channel("south/bass", pan=-0.6)], {}),
    "with all": (
        [
            channel("north/bass", pan=0.5, gain_db=-6, offset=20),
            channel("north/drums", pan=-0.25),
            channel("south/drums", mute=True, pan=1),
        ],
        {"start": 10, "frames": 150},
    ),
}


@pytest.mark.parametrize("name", PANS)
@pytest.mark.parametrize("side", ["latent", "decoded", "original"])
def test_pan(name: str, side: str, split_site: Site, split_store: LatentStore) -> None:
    channels, part = PANS[name]
    audio = split_site.get("audio", mix={"channels": channels, **part}, of=side).audio
    folder = Path(split_store.info.source)
    wanted = expected(folder, channels, part.get("start", 0), audio.shape[1])
    assert audio.shape == wanted.shape and len(audio) == 2
    assert np.abs(audio - wanted).max() < (1e-6 if side == "original" else ROUNDING)


@pytest.mark.parametrize("count", [2, 4])
def test_a_model_of_several_channels(count: int, tmp_path: Path) -> None:
    folder = make_source(tmp_path / "music", channels=count)
    options = {"hop": HOP, "sample_rate": RATE, "channels": count}
    store = make_store(tmp_path / "store", folder, model_options=options)
    channels = [channel("north/bass", gain_db=-6), channel("south/drums", offset=9)]
    rows = [soundfile.read(folder / f"{c['key']}.wav", dtype="float32")[0].T for c in channels]
    wanted = np.zeros((count, max(rows[0].shape[1], rows[1].shape[1] + 9 * HOP)))
    wanted[:, : rows[0].shape[1]] += 10 ** (-6 / 20) * rows[0]
    wanted[:, 9 * HOP : 9 * HOP + rows[1].shape[1]] += rows[1]
    with serving(store) as site:
        for side in ("latent", "decoded", "original"):
            audio = site.get("audio", mix={"channels": channels}, of=side).audio
            assert audio.shape == wanted.shape
            assert np.abs(audio - wanted).max() < (1e-6 if side == "original" else ROUNDING)
        for of in ("waveform", "spectrogram", "latent"):
            assert site.get("picture", key="north/bass", of=of).body.startswith(b"\x89PNG")
        panned = site.get("audio", mix={"channels": [channel("north/bass", pan=0.5)]})
        assert panned.status == 400 and "encodes all channels" in panned.json["error"]


@pytest.mark.parametrize("name", ["gains", "mute", "earlier", "a part", "the same twice"])
def test_the_python_lines_make_the_file(name: str, site: Site, tmp_path: Path) -> None:
    channels, part = MIXES[name]
    assert_lines_make(site, {"channels": channels, **part}, tmp_path)


def test_the_python_lines_with_pan(split_site: Site, tmp_path: Path) -> None:
    for channels, part in PANS.values():
        assert_lines_make(split_site, {"channels": channels, **part}, tmp_path)


def assert_lines_make(site: Site, mix: dict[str, Any], folder: Path) -> None:
    lines = site.get("api/python", mix=mix).json["lines"]
    code = lines.replace('"mix.wav"', repr(str(folder / "mix.wav")))
    exec(compile(code, "lines", "exec"), {})
    made, rate = soundfile.read(folder / "mix.wav", dtype="float32", always_2d=True)
    assert rate == RATE
    assert np.array_equal(made.T, site.get("audio", mix=mix, name="mix").audio)


def test_the_python_lines_run_as_a_program(site: Site, tmp_path: Path) -> None:
    channels, part = MIXES["later"]
    mix = {"channels": channels, **part}
    (tmp_path / "mix.py").write_text(site.get("api/python", mix=mix).json["lines"])
    subprocess.run([sys.executable, "mix.py"], cwd=tmp_path, check=True)
    made, _ = soundfile.read(tmp_path / "mix.wav", dtype="float32", always_2d=True)
    assert np.array_equal(made.T, site.get("audio", mix=mix).audio)


def test_a_key_with_quotes_in_the_python_lines(site: Site, tmp_path: Path) -> None:
    assert_lines_make(site, {"channels": [{"key": "<script>alert('key')"}]}, tmp_path)


def test_a_store_of_chunks(source: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", source, stitch="none")
    with serving(store) as site:
        same = [channel("north/bass", gain_db=-6), channel("north/bass", gain_db=-6)]
        audio = site.get("audio", mix={"channels": same}).audio
        wanted = expected(source, same, 0, audio.shape[1])
        assert np.abs(audio - wanted).max() < ROUNDING
        assert_lines_make(site, {"channels": same}, tmp_path)
        moved = [channel("north/bass", offset=1)]
        assert "cannot be moved" in site.get("audio", mix={"channels": moved}).json["error"]
        lengths = [channel("north/bass"), channel("south/bass")]
        assert "different lengths" in site.get("audio", mix={"channels": lengths}).json["error"]
        assert site.get("picture", key="north/bass", of="latent").body.startswith(b"\x89PNG")


def test_a_source_that_is_gone_or_changed(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "music")
    store = make_store(tmp_path / "store", folder)
    soundfile.write(folder / "north/bass.wav", np.zeros(100), RATE)
    (folder / "north/drums.wav").unlink()
    with serving(store) as site:
        for key in ("north/bass", "north/drums"):
            answer = site.get("audio", mix={"channels": [{"key": key}]}, of="original")
            assert answer.status == 400 and "cannot be read" in answer.json["error"]
            assert site.get("audio", mix={"channels": [{"key": key}]}, of="latent").status == 200


def test_codes_are_played_but_not_mixed(source: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", source)
    store._info = store.info.model_copy(update={"model": {**store.info.model, "output": "codes"}})
    with serving(store) as site:
        assert "codes" in site.get("api/store").json["why_no_mix"]
        for channels in (
            [channel("north/bass"), channel("north/drums")],
            [channel("north/bass", gain_db=-6)],
            [channel("north/bass", offset=3)],
            [channel("north/bass", mute=True)],
        ):
            for path in ("audio", "api/python"):
                assert "codes" in site.get(path, mix={"channels": channels}).json["error"]
        alone = [channel("north/bass")]
        lines = site.get("api/python", mix={"channels": alone, "start": 2, "frames": 30}).json
        assert "lm.mix" not in lines["lines"] and "store['north/bass']" in lines["lines"]
        for side in ("latent", "decoded", "original"):
            audio = site.get("audio", mix={"channels": alone}, of=side).audio
            assert np.abs(audio - expected(source, alone, 0, audio.shape[1])).max() < ROUNDING
        for of in ("waveform", "spectrogram", "latent"):
            assert site.get("picture", key="north/bass", of=of).body.startswith(b"\x89PNG")


def test_codes_are_drawn_as_they_are(source: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", source)
    store._info = store.info.model_copy(update={"model": {**store.info.model, "output": "codes"}})
    wanted = heat_map(store["north/bass"].latent).data
    assert Desk(store).latent_picture("north/bass", 60.0) == wanted


def test_the_start_of_chunks_is_drawn(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of other records: a long one must not be read whole."""
    store = make_store(tmp_path / "store", source, stitch="none")
    latent, step = store["north/bass"].latent, store.chunking.step  # 2 s in chunks of 0.5 s
    begun = sum(index * step < RATE for index in range(len(latent)))
    assert 1 < begun < len(latent)
    whole = heat_map(latent, mean=store.mean, deviation=store.std).data
    assert Desk(store).latent_picture("north/bass", 60.0) == whole
    wanted = {
        "latent": heat_map(latent[:begun], mean=store.mean, deviation=store.std).data,
        "waveform": waveform(store.decode("north/bass")[:, :RATE]).data,
    }
    monkeypatch.setattr("latentmill.view.app._PICTURE_SECONDS", 1.0)
    with serving(store) as site:
        for of, picture in wanted.items():
            assert site.get("picture", key="north/bass", of=of).body == picture


def test_the_longest_part(source: Path, tmp_path: Path) -> None:
    """The page asks for the frames that cover the length in its field, and one more."""
    hop = 36  # does not divide the samples
    store = make_store(tmp_path / "s", source, model_options={"hop": hop, "sample_rate": RATE})
    desk, long = Desk(store), Channel(key="south/bass", offset=100_000)
    most = math.ceil(MAX_SECONDS * RATE / hop)
    part = desk.part(MixRequest(channels=(long,), frames=most + 1))
    assert MAX_SECONDS <= part.seconds < MAX_SECONDS + 2 * hop / RATE
    with pytest.raises(ConfigError, match="at most 120 s"):
        desk.part(MixRequest(channels=(long,), frames=most + 4))


def test_a_long_decode_does_not_block_a_search(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released = threading.Event(), threading.Event()
    audio = Desk.audio

    def slow(*args: Any) -> np.ndarray:
        begun.set()
        assert released.wait(60)
        return audio(*args)

    monkeypatch.setattr(Desk, "audio", slow)
    mix = {"channels": [{"key": "north/bass"}]}
    answers: list[int] = []
    with serving(store) as site:
        thread = threading.Thread(target=lambda: answers.append(site.get("audio", mix=mix).status))
        thread.start()
        assert begun.wait(60)
        assert site.get("api/search", key="bass").json["total"] == 2
        assert not answers
        released.set()
        thread.join(60)
    assert answers == [200]


def test_decoding_stops_between_windows(store: LatentStore) -> None:
    """When nobody waits for the result any more."""
    desk, calls = Desk(store), []

    class StopError(Exception):
        pass

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise StopError

    mix = MixRequest(channels=(Channel(key="north/bass"), Channel(key="south/bass", offset=600)))
    with pytest.raises(StopError):
        desk.audio(mix, "latent", check)
    assert desk.audio(mix, "latent").shape[1] > 600 * HOP
