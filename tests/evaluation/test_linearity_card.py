"""The linearity card: none for mdct, some for a model that is not linear; and its warning."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.evaluation import tracks
from latentmill.evaluation.linearity import StoreCodec, measure_linearity
from latentmill.evaluation.seams import measure_seams
from latentmill.evaluation.tracks import UnreadSources
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source, verify
from support import runs
from support.small_memory import SmallMemory
from support.stem_files import write_segments, write_stem_store, write_stems


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_stems(tmp_path_factory.mktemp("songs"))
    soundfile.write(folder / "silence.wav", np.zeros(3200), 3200)
    return folder


@pytest.fixture
def store(source: Path, tmp_path: Path) -> LatentStore:
    return write_stem_store(tmp_path / "store", source)


class Bent:
    """The mdct of a store, followed by something that is not linear."""

    def __init__(self, store: LatentStore, bend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._model, self._bend = store.model(), bend
        self.spec, self.decode = self._model.spec, self._model.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        return self._bend(self._model.encode(audio))


def bend(
    store: LatentStore,
    monkeypatch: pytest.MonkeyPatch,
    by: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = Bent(store, by)
    monkeypatch.setattr(store, "model", lambda: model)


def test_mdct_is_linear(store: LatentStore) -> None:
    report = measure_linearity(store, items=4)
    card = report.card
    assert card.tracks == ["north", "south"]  # a song of one stem is not a group
    assert (card.items, card.pairs, card.grouped) == (2, 2, True)
    assert card.removal is not None
    assert min(card.removal, card.removal_raw) > 100
    for score in card.scores:
        if score.measure.startswith("relative_l2") and score.form in ("origin", "raw"):
            assert score.high < 1e-5, score
        if score.measure in ("snr", "si_sdr") and score.form in ("origin", "raw"):
            assert score.low > 100, score
        if score.measure in ("level", "mr_stft", "log_mel") and score.form in ("origin", "raw"):
            assert max(map(abs, score.values)) < 1e-3, score
    assert max(card.homogeneity, card.homogeneity_raw, card.additivity, card.additivity_raw) < 1e-5
    assert list(card.by_gain) == ["0.25", "0.5", "0.75", "1.1"]
    assert report.poor == ()
    written = json.loads((Path(store.url) / "evaluation/linearity.json").read_text())
    assert written["linearity"] == card.model_dump(exclude_none=True)
    again = LatentStore(store.url)
    assert verify(again).faults == []
    assert again.origin.linearity == lm.Linearity(
        *(card.homogeneity, card.homogeneity_raw, card.additivity, card.additivity_raw),
        *(card.removal, card.removal_raw),
    )


def test_segments_that_begin_together_are_a_track(source: Path, tmp_path: Path) -> None:
    manifest = write_segments(tmp_path / "segments.jsonl", source, 1.0625)
    store = write_stem_store(tmp_path / "store", manifest)
    found = dict(tracks.stem_groups(store, 10))
    roles = {name: sorted(store[key].role for key in keys) for name, keys in found.items()}
    three = ["bass", "drums", "keys"]
    assert roles == dict.fromkeys(
        [f"{song}#{s}" for song in ("north", "south") for s in (0, 1.0625)], three
    )
    for name, keys in found.items():
        for key in keys:
            start = float(key.partition("#")[2].partition("-")[0])
            assert start == pytest.approx(float(name.partition("#")[2]), abs=1e-3)


def test_a_target_that_is_too_quiet_is_not_scored(tmp_path: Path) -> None:
    """At least -50 dBFS, and at least -30 dB of the mix: `hum` is 31 dB below it."""
    rms = 0.2 / 3**0.5
    amplitudes = {"lead": 0.2, "bass": 0.2, "hum": 0.2 * 10 ** (-31 / 20), "air": 0.0}
    song = tmp_path / "song"
    song.mkdir()
    for number, (role, amplitude) in enumerate(amplitudes.items()):
        noise = np.random.default_rng(number).uniform(-1, 1, 3200)
        soundfile.write(song / f"{role}.wav", amplitude * noise, 3200, subtype="FLOAT")
        (song / f"{role}.json").write_text(json.dumps({"group": "song", "role": role}))
    card = measure_linearity(write_stem_store(tmp_path / "store", tmp_path), record=False).card
    assert (card.grouped, card.silent) == (True, 2)
    removals = {len(e.values) for e in card.scores if e.metric == "removal"}
    assert removals == {2}  # the lead and the bass
    for path in song.glob("*.wav"):  # the same song, 40 dB below full scale and more
        audio, _ = soundfile.read(path)
        soundfile.write(path, audio * (10 ** (-51 / 20) / rms / 2**0.5), 3200, subtype="FLOAT")
    quiet = write_stem_store(tmp_path / "quiet", tmp_path)
    with pytest.raises(ConfigError, match="fewer than two items that are not silent"):
        measure_linearity(quiet)


def test_stems_that_begin_late_are_compared_where_they_are_heard(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, 3200)
        soundfile.write(tmp_path / "late" / f"{number}.wav", np.append(np.zeros(3200), noise), 3200)
    card = measure_linearity(write_stem_store(tmp_path / "store", tmp_path / "late")).card
    assert (card.items, card.pairs) == (2, 2)


def on_a_gpu(store: LatentStore, monkeypatch: pytest.MonkeyPatch, fits: int) -> SmallMemory:
    """Let a store's model run in larger batches, on the CPU."""
    model = SmallMemory(store.model(), fits)
    monkeypatch.setattr(store, "model", lambda: model)
    monkeypatch.setattr(LatentStore, "device", "cuda")
    return model


@pytest.mark.parametrize("fits", [4, 1])
def test_batches_on_a_gpu(fits: int, store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_a_gpu(store, monkeypatch, fits)
    codec = StoreCodec(store)
    sounds = [torch.rand(1, 150) for _ in range(6)]
    latents = codec.encode(sounds)
    decoded = codec.decode(latents, 150, 0)
    assert max(model.sizes) == 4
    for sound, found in zip(sounds, decoded, strict=True):
        assert float((sound - found).abs().max()) < 1e-5


@pytest.mark.parametrize(("most", "size"), [(320, 2), (640, 4), (319, 1)])
def test_a_batch_is_not_larger_than_the_model_allows(
    most: int, size: int, store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_a_gpu(store, monkeypatch, 4)
    model.spec = dataclasses.replace(model.spec, max_batch_samples=most)
    codec = StoreCodec(store)
    latents = codec.encode([torch.rand(1, 160) for _ in range(6)])
    codec.decode(latents, 160, 0)
    assert max(model.sizes) == size


def test_windows_that_are_decoded_at_once(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_a_gpu(store, monkeypatch, 4)
    monkeypatch.setattr("latentmill.store.decoder.pick_device", lambda _: "cuda")
    for most, size in ((None, 4), (3 * store.chunking.samples, 3), (1, 1)):
        model.spec = dataclasses.replace(model.spec, max_batch_samples=most)
        model.sizes.clear()
        store.decode("north/drums")  # 2 s in windows of 0.5 s
        assert max(model.sizes) == size


def test_seams_of_items_that_the_model_encodes_whole(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_a_gpu(store, monkeypatch, 4)
    monkeypatch.setattr("latentmill.evaluation.seams.numeric_mode", lambda *_: nullcontext())
    model.spec = dataclasses.replace(model.spec, max_batch_samples=round(1.5 * 3200))
    seconds = [one.seconds for one in measure_seams(store, record=False).items]
    assert sorted(seconds) == [0.6, 1.2, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("part", ["linearity", "seams"])
def test_a_sound_that_is_too_long_for_the_model(
    part: str,
    store: LatentStore,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    model = on_a_gpu(store, monkeypatch, 4)
    model.spec = dataclasses.replace(model.spec, max_batch_samples=3200)
    measure = {"linearity": measure_linearity, "seams": measure_seams}[part]
    monkeypatch.setattr(f"latentmill.evaluation.{part}.numeric_mode", lambda *_: nullcontext())
    with pytest.raises(ConfigError) as caught:
        measure(store, max_seconds=2.0)
    assert "too long for mdct in one piece on a GPU (maximum 1 s)" in one_sentence(caught.value)
    model.spec = dataclasses.replace(model.spec, max_batch_samples=None)
    model.fits = 0
    with pytest.raises(ConfigError) as no_memory:
        measure(store, max_seconds=2.0)
    assert "use --device cpu" in one_sentence(no_memory.value)


@pytest.mark.parametrize("grouped", [False, True])
def test_sounds_whose_source_is_missing_are_left_out(
    grouped: bool, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_sentence
) -> None:
    songs = Path(shutil.copytree(source, tmp_path / "songs"))
    if not grouped:
        for path in songs.rglob("*.json"):
            path.unlink()
    store = write_stem_store(tmp_path / "store", songs)
    missing = store.index.key(2)
    (songs / f"{missing}.wav").unlink()
    found = measure_linearity(store, items=4).card
    assert found.grouped == grouped
    assert not [name for name in found.tracks if missing in name]
    assert len(found.tracks) >= 2
    assert "1 source cannot be read, and others are measured (1: " in caplog.text
    for path in songs.rglob("*.wav"):
        path.unlink()
    with pytest.raises(ConfigError, match="cannot be read, and nothing else can be") as error:
        measure_linearity(store, items=4)
    one_sentence(error.value)


@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_recording_only_the_sounds_are_kept(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings: list[weakref.ref[np.ndarray]] = []

    def read(*args: Any) -> np.ndarray:
        audio = read_source(*args)
        recordings.append(weakref.ref(audio if audio.base is None else audio.base))
        return audio

    monkeypatch.setattr(tracks, "read_source", read)
    (tmp_path / "in").mkdir()
    for number in range(3):
        audio = np.random.default_rng(number).uniform(-0.3, 0.3, (32_000, channels))
        soundfile.write(tmp_path / "in" / f"{number}.wav", audio, 3200, subtype="FLOAT")
    options = {"hop": 32, "sample_rate": 3200, "channels": channels}
    store = write_stem_store(tmp_path / "store", tmp_path / "in", model_options=options)
    kept = tracks.pair_tracks(store, 3, 1600, UnreadSources(store.url))
    assert {sound.shape for track in kept for sound in track.stems} == {(channels, 1600)}
    assert [one() for one in recordings] == [None] * 3


@pytest.mark.parametrize("grouped", [False, True])
def test_only_the_start_of_a_recording_is_loaded(
    grouped: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 minutes of it, or as much as is used."""
    loaded: list[int] = []

    def read(*args: Any) -> np.ndarray:
        loaded.append((audio := read_source(*args)).shape[1])
        return audio

    monkeypatch.setattr(tracks, "read_source", read)
    monkeypatch.setattr(tracks, "LOADED_SECONDS", 1.25)
    store = write_stem_store(tmp_path / "store", source)
    for longest, most in ((1600, 4000), (4800, 4800)):
        loaded.clear()
        if grouped:
            tracks.stem_tracks(store, 2, longest, UnreadSources(store.url))
        else:
            tracks.pair_tracks(store, 3, longest, UnreadSources(store.url))
        assert max(loaded) == most


def test_of_a_large_group_only_some_stems_are_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of all records of an artist, which do not fit into memory."""
    loaded: list[str] = []

    def read(record: Any, *args: Any) -> np.ndarray:
        loaded.append(record.key)
        return read_source(record, *args)

    monkeypatch.setattr(tracks, "read_source", read)
    monkeypatch.setattr(tracks, "MAX_STEMS", 2)
    store = write_stem_store(tmp_path / "store", source)
    groups = dict(tracks.stem_groups(store, 2))
    assert all(len(keys) > 2 for keys in groups.values())
    tracks.stem_tracks(store, 2, 1600, UnreadSources(store.url))
    assert loaded == [key for keys in groups.values() for key in keys[:2]]


def test_an_affine_encoder_needs_its_origin(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(store, monkeypatch, lambda latent: latent + 0.2)
    card = measure_linearity(store, items=3, record=False).card
    assert card.homogeneity < 1e-5
    assert card.additivity < 1e-5
    assert card.homogeneity_raw > 0.05
    assert card.additivity_raw > 0.05
    assert LatentStore(store.url).info.linearity is None


def test_a_poor_encoder_is_warned_of(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bend(store, monkeypatch, lambda latent: latent.sign() * latent.abs().sqrt())
    report = measure_linearity(store, items=4, gains=(2.0, 0.1))
    # The root of a quarter is a half: relL2 of E(x / 4) = E(x) / 2 against E(x) / 4 is 1.
    assert report.card.by_gain["0.25"] == pytest.approx(1.0, abs=1e-3)
    assert report.card.by_gain["2"] == pytest.approx(1 - 0.5**0.5, abs=1e-3)
    assert list(report.card.by_gain) == ["0.1", "0.25", "0.5", "0.75", "1.1", "2"]
    assert report.poor == ("scaling", "adding", "subtracting")
    opened = LatentStore(store.url)
    latent = opened["south/drums"].latent
    with pytest.warns(lm.LinearityWarning, match="Adding latents is poor"):
        lm.mix([latent, latent], origin=opened.origin)


def test_a_large_origin_does_not_hide_that_an_encoder_is_poor(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(store, monkeypatch, lambda latent: latent.sign() * latent.abs().sqrt() + 10)
    report = measure_linearity(store, items=4, record=False)
    assert report.card.by_gain["0.25"] == pytest.approx(1.0, abs=1e-3)
    assert report.poor[:2] == ("scaling", "adding")
    assert report.card.homogeneity_raw_norm is not None
    assert report.card.homogeneity_raw_norm < 0.1
    # Of the gains 0.25, 0.5, 0.75, 1.1 the errors are |sqrt(a) / a - 1|, of every item.
    errors = [abs(gain**-0.5 - 1) for gain in (0.25, 0.5, 0.75, 1.1)]
    assert report.card.homogeneity_mean == pytest.approx(np.mean(errors), abs=1e-3)
    assert report.card.homogeneity == pytest.approx(np.median(errors), abs=1e-3)


def test_it_is_measured_in_the_numeric_mode_of_the_store(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = store.plan
    document = {**plan.fingerprint, "numeric": {"precision": "bf16"}}
    monkeypatch.setitem(store.__dict__, "plan", dataclasses.replace(plan, fingerprint=document))
    seen = []
    bend(store, monkeypatch, lambda latent: seen.append(torch.is_autocast_enabled("cpu")) or latent)
    measure_linearity(store, items=2, record=False)
    assert set(seen) == {True}


def test_of_a_posterior_the_means_are_compared(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(store, monkeypatch, lambda latent: torch.cat((latent, latent.abs().sqrt()), dim=1))
    origin = Path(store.url) / "origin.npy"
    np.save(origin, np.tile(np.load(origin), (2, 1)))
    model = {**store.info.model, "posterior": "mean+std", "latent_channels": 64}
    monkeypatch.setattr(store, "_info", store.info.model_copy(update={"model": model}))
    monkeypatch.setattr(
        store.model(),
        "spec",
        store.model().spec.__class__(**{**vars(store.model().spec), "latent_channels": 64}),
    )
    decode = store.model().decode
    only_means = lambda z, *args, **options: decode(z[:, :32], *args, **options)  # noqa: E731
    monkeypatch.setattr(store.model(), "decode", only_means)
    assert store.origin.deviations == 32
    assert measure_linearity(store, items=2, record=False).card.additivity < 1e-5


def test_what_cannot_be_measured_is_said(
    store: LatentStore,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            measure_linearity(store)
        return one_sentence(caught.value)

    codes = store.info.model_copy(update={"model": {**store.info.model, "output": "codes"}})
    with monkeypatch.context() as patch:
        patch.setattr(store, "_info", codes)
        assert "contains codes" in refusal()
    store.__dict__.pop("origin")
    silent = tmp_path / "silent"
    silent.mkdir()
    for name in ("a", "b"):
        soundfile.write(silent / f"{name}.wav", np.zeros(3200), 3200)
    store = write_stem_store(tmp_path / "quiet", silent)
    assert "fewer than two items that are not silent" in refusal()


def test_the_warning_of_ops_rests_on_the_recorded_card(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = measure_linearity(store, items=2).card.model_dump() | {"scores": []}
    assert parsed == runs.outcome(runs.call(capsys, "info", store.url, "--json"))["linearity"]
    poor = {**parsed, "additivity": 0.5}
    measured = Path(store.url) / "evaluation/linearity.json"
    measured.write_text(json.dumps({**json.loads(measured.read_text()), "linearity": poor}))
    mix = ["mix", store.url, "south/drums", "south/bass:0.5", "-o", tmp_path / "mix.flac"]
    with warnings.catch_warnings(record=True):
        result = runs.call(capsys, *mix)
    assert (result.code, result.out) == (0, f"{tmp_path}/mix.flac\n")
    assert result.err == (
        "latentmill: warning: Adding latents is poor for this model: the relative error measured "
        "on the store's audio is 0.50 (limit 0.25).\n"
    )
