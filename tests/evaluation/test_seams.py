"""The error at the seams: none for mdct, some for a model that normalises over the chunk."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.evaluation.seams import _measure, measure_seams
from latentmill.storage.storage import Storage
from latentmill.store.index import IndexEntry
from latentmill.store.measurement import read_measurement
from latentmill.store.verify import verify
from support import runs
from support.in_process import in_process
from support.linear_cae_weights import use_cache, write_cache

RATE = 44100


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One item shorter than a chunk of 2 s, three longer ones."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(1)
    for index, seconds in enumerate((1.0, 4.0, 5.1, 6.3)):
        samples = random.standard_normal(round(seconds * RATE)) * 0.1
        soundfile.write(folder / f"{index}.wav", samples, RATE, "FLOAT")
    return folder


SETTINGS = {"dtype": "float32", "chunk_seconds": 2.0, "threads": 1}


@pytest.fixture
def encode(noise: Path, tmp_path: Path, inline: None):
    def run(**options: object) -> lm.LatentStore:
        lm.encode(str(noise), str(tmp_path / "out"), **{**SETTINGS, **options})
        return lm.open(str(tmp_path / "out"))

    return run


@pytest.fixture(scope="module")
def encoded(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "out"
    with in_process():
        lm.encode(str(noise), str(out), **SETTINGS)
    return out


@pytest.fixture
def store(encoded: Path, tmp_path: Path) -> lm.LatentStore:
    """A store of mdct latents, to be written to."""
    return lm.open(str(shutil.copytree(encoded, tmp_path / "out")))


def test_trimmed_mdct_has_no_seams(store: lm.LatentStore) -> None:
    report = measure_seams(store, items=2)
    assert len(report.items) == 2
    assert report.largest < 1e-6
    assert max(one.worst for one in report.items) < 1e-5


def test_only_the_records_that_are_measured_are_looked_up(
    store: lm.LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up all of a large store takes minutes."""
    looked_up, real = [], lm.LatentStore.entry

    def recorded(store: lm.LatentStore, key: str) -> IndexEntry:
        looked_up.append(key)
        return real(store, key)

    monkeypatch.setattr(lm.LatentStore, "entry", recorded)
    report = measure_seams(store, items=1, max_seconds=5.5)  # every second one of 1 and 2
    assert [one.key for one in report.items] == looked_up == ["1"]


def test_items_whose_source_is_missing_are_left_out(
    noise: Path, tmp_path: Path, inline: None, caplog: pytest.LogCaptureFixture, one_sentence
) -> None:
    songs = Path(shutil.copytree(noise, tmp_path / "songs"))
    lm.encode(str(songs), str(tmp_path / "out"), **SETTINGS)
    store = lm.open(str(tmp_path / "out"))
    (songs / "1.wav").unlink()
    report = measure_seams(store, items=2)
    assert [one.key for one in report.items] == ["3", "2"]
    assert "1 source cannot be read, and others are measured (1: " in caplog.text
    for path in songs.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"3 sources of .*/out cannot be read") as error:
        measure_seams(store)
    one_sentence(error.value)


def test_a_model_that_normalises_over_the_chunk_has(
    encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "hf_home")
    use_cache(monkeypatch, tmp_path / "hf_home")
    report = measure_seams(encode(model="lin-cae"), items=3)
    assert [one.key for one in report.items] == ["1", "2", "3"]
    assert 1e-4 < report.median <= report.largest < 1


def test_the_result_has_a_file_of_its_own(store: lm.LatentStore, tmp_path: Path) -> None:
    """dataset.json may be replaced by a run that ends meanwhile: measuring does not touch it."""
    out = tmp_path / "out"
    sealed = (out / "dataset.json").read_bytes()
    (out / "dataset.json").write_bytes(b"sealed again meanwhile")
    report = measure_seams(store)
    assert (out / "dataset.json").read_bytes() == b"sealed again meanwhile"
    (out / "dataset.json").write_bytes(sealed)
    written = json.loads((out / "evaluation/seams.json").read_text())
    assert written["seams"] == {"items": 3, "median": report.median, "largest": report.largest}
    assert written["seal"] == json.loads(sealed)["seal"]
    assert lm.open(str(out)).measured_info.seams is not None
    assert verify(lm.open(str(out))).faults == []
    (out / "dataset.json").write_bytes(sealed.replace(written["seal"].encode(), b"0" * 32))
    assert lm.open(str(out)).measured_info.seams is None  # it was measured before the last seal


@pytest.mark.slow
def test_what_was_measured_is_not_current_after_a_longer_plan(
    encode, noise: Path, tmp_path: Path
) -> None:
    measure_seams(encode())
    before = lm.open(str(tmp_path / "out")).measured_info
    assert before.seams is not None
    source, out = str(noise), str(tmp_path / "out")
    (noise / "new.wav").write_bytes((noise / "1.wav").read_bytes())
    try:
        lm.encode(source, out, dtype="float32", chunk_seconds=2.0, threads=1, extend=True)
    finally:
        (noise / "new.wav").unlink()
    after = lm.open(out).measured_info
    assert (after.items, after.seams) == (before.items + 1, None)
    assert read_measurement(Storage(out), after, "seams") is not None


def test_silence_says_nothing_and_does_no_harm(tmp_path: Path, inline: None, one_sentence) -> None:
    """Its latents are zeros with mdct; a NaN in dataset.json would be a damaged store."""
    source, out = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    soundfile.write(source / "a.wav", np.zeros(3 * RATE), RATE)
    soundfile.write(source / "b.wav", np.random.default_rng(1).normal(0, 0.1, 4 * RATE), RATE)
    lm.encode(str(source), out, chunk_seconds=2.0, threads=1)
    assert [one.key for one in measure_seams(lm.open(out)).items] == ["b"]
    with pytest.raises(ConfigError) as caught:
        measure_seams(lm.open(out), max_seconds=3.5)
    assert "only zeros" in one_sentence(caught.value)


def test_what_cannot_be_measured_is_said(
    store: lm.LatentStore, one_sentence, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_seams(store, max_seconds=3.0)
    assert "no items with seams of at most 3 s" in one_sentence(caught.value)
    chunking = replace(store.chunking, samples=60 * RATE)  # as of mimi
    monkeypatch.setattr(lm.LatentStore, "chunking", chunking)
    with pytest.raises(ConfigError, match=r"every item fits in one chunk \(60\.0 s\)"):
        measure_seams(store)


def test_chunks_that_are_kept_apart_have_no_seams(encode) -> None:
    with pytest.raises(ConfigError, match="stitch none"):
        measure_seams(encode(stitch="none"))


@pytest.mark.slow
def test_codes_have_no_distance(encode, tmp_path: Path, one_sentence) -> None:
    from support.tiny_models import write_dac

    write_dac(tmp_path / "dac", downsampling_ratios=[2, 4, 8, 8], sampling_rate=44100)
    store = encode(model=f"dac:{tmp_path / 'dac'}", model_options={"output": "codes"})
    with pytest.raises(ConfigError) as caught:
        measure_seams(store)
    assert "contains codes" in one_sentence(caught.value)


@pytest.mark.slow
def test_whole_items_are_encoded_in_the_store_s_numeric_mode(
    encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "hf_home")
    use_cache(monkeypatch, tmp_path / "hf_home")
    store = encode(model="lin-cae", precision="bf16", chunk_seconds=20.0)
    same = _measure(store, store["3"])  # one chunk: it is the whole item
    monkeypatch.setattr("latentmill.evaluation.seams.numeric_mode", lambda *_: nullcontext())
    other = _measure(store, store["3"])
    assert same is not None
    assert other is not None
    assert same.error < 1e-6 < 1e-3 < other.error


def test_the_command_shows_a_model_as_it_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = runs.call(capsys, "models", "mdct", "--json")
    assert json.loads(shown.out)["context"] == {"left": 1, "right": 1}
    split = runs.call(capsys, "models", "mdct", "--channels", "split", "--json")
    spec = json.loads(split.out)
    assert (spec["channels"], spec["latent_channels"]) == (2, 1024)
    wrong = runs.call(capsys, "models", "mdct", "--channels", "left")
    assert wrong.err == "latentmill: Invalid channels 'left': use mono or split.\n"
    shown = runs.call(capsys, "models", "mdct")
    assert "the first 1 and last 1 frames of a chunk depend on its edges" in shown.out
