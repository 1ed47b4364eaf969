"""Statistics of a store: a planted corpus, and every figure against numpy."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.evaluation import statistics
from latentmill.evaluation.channels import LAGS
from latentmill.evaluation.shard_pass import ShardPass, ShardResult
from latentmill.evaluation.similarity import near_groups
from latentmill.evaluation.statistics import measure_statistics
from latentmill.reporting.media import Budget
from latentmill.reporting.report import render
from latentmill.store.measurement import current_result, write_measurement
from latentmill.store.results import StoreStatistics
from latentmill.store.store import LatentStore
from store.store_files import write_store
from support import runs, saturated_model
from support.latent_store import latent_of, write_again, write_latents
from support.stem_files import write_stem_store, write_stems

RATE = 22050
SONGS = 16


def song(number: int) -> np.ndarray:
    """Some seconds of decaying harmonic notes with noisy attacks, in a key and a tempo."""
    random = np.random.default_rng(number)
    samples = int(RATE * random.uniform(3, 6))
    audio = np.zeros(samples + RATE)
    tempo, key, colour = random.uniform(0.2, 0.5), random.uniform(40, 60), random.uniform(1.3, 2.5)
    for start in np.arange(0, samples, tempo * RATE).astype(int):
        pitch = key + random.choice([0, 2, 4, 5, 7, 9, 11]) + 12 * random.integers(2)
        time = np.arange(int(RATE * random.uniform(0.3, 1))) / RATE
        phase = 2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time
        note = sum(np.sin(h * phase) / h**colour for h in range(1, 7)) * np.exp(-3 * time)
        audio[start : start + len(note)] += random.uniform(0.3, 1) * note
        if random.random() < 0.5:
            hit = 0.2 * random.standard_normal(2000) * np.exp(-np.arange(2000) / 400)
            audio[start : start + 2000] += hit
    return 0.3 * audio[:samples] / np.abs(audio).max()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    folder = tmp_path_factory.mktemp("planted") / "in"
    folder.mkdir()
    for number in range(SONGS):
        soundfile.write(folder / f"song{number:02d}.wav", song(number), RATE, subtype="PCM_16")
    for number in range(3):
        shutil.copy(folder / f"song{number:02d}.wav", folder / f"copy{number}.wav")
    soundfile.write(folder / "lossy3.ogg", song(3), RATE)
    soundfile.write(folder / "lossy4.mp3", song(4), RATE)
    audio, _ = soundfile.read(folder / "song05.wav", dtype="int16")
    soundfile.write(folder / "lossless5.flac", audio, RATE)
    soundfile.write(folder / "quiet6.wav", song(6) / 2, RATE, subtype="PCM_16")
    for name in ("a", "b"):
        soundfile.write(folder / f"silent {name}.wav", np.zeros(2 * RATE), RATE)
    noise = 0.1 * np.random.default_rng(99).standard_normal(4 * RATE)
    soundfile.write(folder / "noise.wav", noise, RATE)
    return write_store(
        str(folder.parent / "store"),
        folder,
        model="python:support.saturated_model:build",
        model_options={},
        unit_seconds=20,
    )


def test_what_is_planted_is_found_and_nothing_else(planted: LatentStore) -> None:
    found = measure_statistics(planted)
    assert found.records == SONGS + 10
    assert found.same_file == [[f"copy{n}", f"song0{n}"] for n in range(3)]
    assert found.same_audio == [["lossless5", "song05"]]
    near = sorted(one.keys for one in found.near_duplicates)
    assert near == [["lossy3", "song03"], ["lossy4", "song04"], ["quiet6", "song06"]]
    assert all(one.distance < 0.002 for one in found.near_duplicates)
    assert [one.key for one in found.outliers] == ["noise"]
    assert (found.silent, found.silent_records) == (["silent a", "silent b"], 2)
    assert found.saturated_channels == [saturated_model.CHANNEL]
    assert found.constant_channels == []
    assert found.formats == {"wav": SONGS + 7, "ogg": 1, "mp3": 1, "flac": 1}
    assert found.sample_rates == {str(RATE): SONGS + 10}
    assert found.source_channels == {"1": SONGS + 10}


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_silence_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("take #1", "take #2"):  # what follows the # is not a place in the file
        soundfile.write(tmp_path / "in" / f"{name}.wav", np.zeros(6400), 3200)
    store = write_stem_store(tmp_path / "store", tmp_path / "in")
    result = runs.call(capsys, "evaluate", store.url, "--only", "statistics")
    assert result.code == 0, result.err
    assert "silence   100.0% of the frames, 2 records" in result.out
    assert "formats   2 x wav" in result.out
    assert "constant channels: 0, 1, 2," in result.out
    assert f" and {store.origin.frames.shape[0] - 20} more" in result.out


def test_every_figure_is_its_formula(planted: LatentStore) -> None:
    found = measure_statistics(planted)
    records = list(planted)
    latents = [record.latent.astype(np.float64) for record in records]
    frames = np.concatenate(latents, axis=1)
    mean, std = frames.mean(axis=1), frames.std(axis=1)
    assert found.frames == frames.shape[1]
    assert np.allclose(found.mean, mean, atol=1e-9)
    assert np.allclose(found.std, std, rtol=1e-6)
    assert np.array_equal(found.low, frames.min(axis=1))
    assert np.array_equal(found.high, frames.max(axis=1))
    assert found.suggested_scale == pytest.approx(1 / frames.std(), rel=1e-6)
    loud = np.concatenate([z for z in latents if z.any()], axis=1)
    extreme = (loud == loud.min(axis=1, keepdims=True)) | (loud == loud.max(axis=1, keepdims=True))
    assert np.allclose(found.saturation, extreme.mean(axis=1))
    share = np.linalg.eigvalsh(np.cov(frames, bias=True)).clip(min=0)
    share = share[share > 0] / share.sum()
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-3)
    assert list(found.autocorrelation) == [str(lag) for lag in LAGS]
    for lag in LAGS:
        pairs = [(z[:, lag:] - mean[:, None]) * (z[:, :-lag] - mean[:, None]) for z in latents]
        wanted = np.concatenate(pairs, axis=1).mean(axis=1) / std**2
        assert np.allclose(found.autocorrelation[str(lag)], wanted, atol=1e-4)
    seconds = [soundfile.info(record.source_uri).duration for record in records]
    assert found.seconds["median"] == pytest.approx(np.median(seconds), abs=0.05)
    assert found.hours == pytest.approx(sum(seconds) / 3600, rel=0.01)
    levels = [20 * np.log10(r.rms) for r in records if r.rms > 0]
    assert found.rms_db["95 %"] == pytest.approx(np.quantile(levels, 0.95))
    quiet = [np.frombuffer(r.levels, np.uint8) < 255 - 120 for r in records]
    assert found.silence == pytest.approx(np.concatenate(quiet).mean())


def test_integrated_loudness_is_that_of_the_library(planted: LatentStore) -> None:
    pyloudnorm = pytest.importorskip("pyloudnorm")
    found = measure_statistics(planted, items=100)
    assert found.lufs_records == SONGS + 8  # not of silence
    values = []
    for record in planted:
        audio, rate = soundfile.read(record.source_uri)
        if audio.any():
            values.append(pyloudnorm.Meter(rate).integrated_loudness(audio))
    assert found.lufs is not None
    assert found.lufs["median"] == pytest.approx(np.median(values), abs=0.01)
    assert found.lufs["least"] == pytest.approx(min(values), abs=0.01)


def test_large_stores_are_searched_by_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 vectors in four clusters, 100 have a near duplicate."""
    random = np.random.default_rng(1)
    vectors = random.standard_normal((4, 64)).repeat(750, 0) + random.standard_normal((3000, 64))
    vectors[2900:] = vectors[:100] + 0.02 * random.standard_normal((100, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    frames, use = np.full(3000, 100), np.ones(3000, bool)
    planted = [[n, 2900 + n] for n in range(100)]
    stored = vectors.astype(np.float16)
    assert [group for group, _ in near_groups(stored, frames, use)] == planted
    monkeypatch.setattr("latentmill.evaluation.similarity.EXACT_RECORDS", 0)
    assert [group for group, _ in near_groups(stored, frames, use)] == planted
    frames[:50] = 90  # of another length
    assert len(near_groups(stored, frames, use)) == 50


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_both_formats(format_name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = [1, 3, 40, 25, 7, 300, 12, 9, 30]
    latents = [random.standard_normal((4, n)).astype(np.float16) for n in lengths]
    options = {"latents": latents, "per_unit": 4, "format_name": format_name}
    store = write_latents(str(tmp_path / "store"), lengths, **options)
    found = measure_statistics(store)
    frames = np.concatenate(latents, axis=1).astype(np.float64)
    assert (found.records, found.frames) == (9, frames.shape[1])
    assert np.array_equal(found.high, frames.max(axis=1))
    assert found.effective_rank == pytest.approx(4, abs=0.1)


def test_standard_deviations_do_not_count_for_scale_and_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of latents of means and standard deviations, both are those of the means."""
    random = np.random.default_rng(0)
    size = np.array([[1.0], [3.0], [0.5]])
    means = [size * random.standard_normal((3, n)) + 0.5 for n in (300, 500)]
    latents = [np.concatenate([z, 0.2 + 0.3 * random.random(z.shape)]) for z in means]
    store = write_latents(
        str(tmp_path / "store"),
        [300, 500],
        channels=6,
        latents=[z.astype(np.float16) for z in latents],
        model={"posterior": "mean+std"},
    )
    found = measure_statistics(store)
    stored = np.concatenate([z.astype(np.float16) for z in means], axis=1).astype(np.float64)
    assert found.suggested_scale == pytest.approx(1 / stored.std(), rel=1e-6)
    share = np.linalg.eigvalsh(np.cov(stored, bias=True))
    share /= share.sum()
    rank = np.exp(-np.sum(share * np.log(share)))
    assert found.effective_rank == pytest.approx(rank, rel=1e-3)
    assert (len(found.mean), len(found.high), found.deviations) == (6, 6, 3)
    text = runs.call(capsys, "evaluate", store.url, "--only", "statistics").out
    assert f"effective rank {rank:.3g} of 3 channels\n" in text
    scale = 1 / stored.std()
    assert (
        f"multiply the stored latents by {scale:.4g} for a standard deviation of the means" in text
    )
    page = render(store, Budget(), items=0)
    assert "effective rank, of 3<" in page
    assert "Multiplied by the scale factor, the means have a standard deviation of 1." in page


def test_a_long_recording_and_large_latents_are_printed_without_an_exponent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = 20_000
    latents = [np.full((4, n), value, np.float16) for n, value in ((30, -2), (frames, 32000))]
    store = write_latents(str(tmp_path / "store"), [30, frames], latents=latents)
    text = runs.call(capsys, "evaluate", store.url, "--only", "statistics").out
    assert f"duration  2.79 to {frames * 4096 / 44100:.0f} s, median 930\n" in text
    assert "range     -2 to 32000\n" in text


def test_few_frames_are_not_saturated(tmp_path: Path) -> None:
    """One of ten is the largest, and one the smallest."""
    latents = [np.random.default_rng(0).standard_normal((4, 10)).astype(np.float16)]
    store = write_latents(str(tmp_path / "store"), [10], latents=latents)
    found = measure_statistics(store)
    assert found.saturation == [0.2] * len(found.mean)
    assert found.saturated_channels == []


def test_overlapping_chunks(tmp_path: Path) -> None:
    source = write_stems(tmp_path / "songs")
    store = write_stem_store(tmp_path / "store", source, stitch="none")
    found = measure_statistics(store, items=1)
    chunks = [record.latent.astype(np.float64) for record in store]
    values = np.concatenate([c.transpose(1, 0, 2).reshape(c.shape[1], -1) for c in chunks], axis=1)
    assert np.array_equal(found.low, values.min(axis=1))
    covariance = np.cov(values, bias=True)
    share = np.linalg.eigvalsh(covariance) / np.trace(covariance)
    entropy = -np.sum(share * np.log(share))
    assert found.effective_rank == pytest.approx(np.exp(entropy), rel=0.02)
    assert found.silence == 0  # not measured for overlapping chunks


def test_it_is_recorded_and_printed(
    planted: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(planted.url, tmp_path / "copy")
    result = runs.call(capsys, "evaluate", copy, "--only", "statistics")
    assert result.code == 0
    assert "multiply the stored latents by" in result.out
    assert "same file: copy0, song00" in result.out
    assert "unlike the others: noise" in result.out
    assert f"saturated channels: {saturated_model.CHANNEL}" in result.out
    written = json.loads((copy / "evaluation/statistics.json").read_text())
    assert written["statistics"]["silent_records"] == 2
    again = lm.evaluate(str(copy), only=["statistics"]).statistics
    assert again is not None
    assert again.model_dump(exclude_none=True) == written["statistics"]


def test_a_cluster_finds_the_same(planted: LatentStore, ray_session: Path) -> None:
    alone = measure_statistics(planted, items=1, record=False)
    assert measure_statistics(planted, items=1, record=False, address="auto") == alone


def test_a_cluster_reads_no_store_that_changed_meanwhile(
    planted: LatentStore, tmp_path: Path
) -> None:
    store = lm.open(shutil.copytree(planted.url, tmp_path / "copy"))
    pickled = pickle.dumps(ShardPass(store))
    assert len(pickle.loads(pickled)(0).at)
    document = json.loads((tmp_path / "copy/dataset.json").read_text())
    document["index_hash"] = "xxh3:" + "0" * 16
    (tmp_path / "copy/dataset.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="was changed while it was read"):
        pickle.loads(pickled)
    (tmp_path / "copy/dataset.json").unlink()
    with (
        pytest.warns(lm.IncompleteStoreWarning),
        pytest.raises(ConfigError, match="is not sealed yet"),
    ):
        measure_statistics(lm.open(store.url), address="auto")


def test_a_store_that_is_sealed_with_other_items_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its shards were read, an item that had failed is encoded: all later rows move."""
    pytest.importorskip("pyloudnorm")
    url, latents = str(tmp_path / "store"), [latent_of(n, 30) for n in range(16)]
    store, read = write_latents(url, [30] * 16, failed=[2]), statistics._results

    def then_sealed(*arguments: Any) -> Iterator[ShardResult]:
        yield from read(*arguments)
        write_again(url, [0, 1], latents)

    monkeypatch.setattr(statistics, "_results", then_sealed)
    with pytest.raises(StoreError, match="was changed while it was read: run the command again"):
        measure_statistics(store)
    assert not Path(url, "evaluation").exists()


def test_statistics_without_loudness_and_scale_can_be_read_again(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [20, 30, 40])
    result = measure_statistics(store, record=False)
    result = result.model_copy(update={"lufs": None, "suggested_scale": None})
    write_measurement(store.storage, store.info, result)
    assert current_result(store.storage, store.info, "statistics") == result


@pytest.mark.parametrize("size", [0, 1000])
def test_a_cut_shard_ends_in_one_sentence(size: int, tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [5, 6, 7])
    shard = next(Path(store.url, "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(StorageError, match="is damaged"):
        measure_statistics(store)


def test_more_repeats_than_are_listed_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of earlier versions have no totals."""
    random = np.random.default_rng(0)
    shape = np.array([[1.0], [2.0], [0.5], [1.5]])
    latents = [shape * random.standard_normal((4, 20 + 10 * n)) for n in range(60)]
    for number in range(55, 60):  # unlike the others
        latents[number] *= np.array([[9.0], [0.1], [9.0], [0.1]])
    latents += latents[:15]  # 12 of the same file, 3 of the same audio
    latents += [np.pad(latent, ((0, 0), (0, 1)), "edge") for latent in latents[30:33]]
    hashes = [f"xxh3:{n}" for n in (*range(60), *range(12), *range(100, 106))]
    stored = [latent.astype(np.float16) for latent in latents]
    lengths = [latent.shape[1] for latent in latents]
    store = write_latents(str(tmp_path / "store"), lengths, latents=stored, content_hashes=hashes)

    whole = measure_statistics(store, record=False)
    near, unusual = len(whole.near_duplicates), len(whole.outliers)
    assert (len(whole.same_file), len(whole.same_audio)) == (12, 3)
    assert min(near, unusual) >= 3
    monkeypatch.setattr("latentmill.evaluation.statistics.MAX_LISTED", 2)
    found = measure_statistics(store)
    totals = [found.same_file_groups, found.same_audio_groups]
    assert [*totals, found.near_duplicate_groups, found.outlier_records] == [12, 3, near, unusual]
    lists = (found.same_file, found.same_audio, found.near_duplicates, found.outliers)
    assert [len(entries) for entries in lists] == [2, 2, 2, 2]

    monkeypatch.setattr("latentmill.cli.show_evaluation._MOST_LINES", 3)
    text = runs.call(capsys, "evaluate", store.url, "--only", "statistics").out
    assert (
        "listed    12 groups of the same file, 3 groups of the same audio, "
        f"{near} groups almost the same, {unusual} records unlike the others\n"
    ) in text
    assert f"... and {15 + near + unusual - 3} more, see --json (at most 1,000 of each)\n" in text
    page = render(store, Budget(), items=0)
    assert f"12 of the same file, 3 of the same audio in other files, {near} almost" in page
    assert f"{unusual} records unlike the others" in page

    file = tmp_path / "store/evaluation/statistics.json"
    document = json.loads(file.read_text())
    for name in (*(n for n in document["statistics"] if n.endswith("_groups")), "outlier_records"):
        del document["statistics"][name]
    file.write_text(json.dumps(document))
    earlier = current_result(store.storage, store.info, "statistics")
    assert isinstance(earlier, StoreStatistics)
    assert (earlier.same_file_groups, earlier.outlier_records) == (2, 2)
