"""Excerpts, the stem mix and the map, against the source files and numpy."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.reporting.charts import durations, loudness, silence
from latentmill.reporting.columns import Field, RecordColumns, read_columns
from latentmill.reporting.corpus_map import corpus_map, principal
from latentmill.reporting.excerpts import ExcerptRange, Excerpts
from latentmill.reporting.listening import stem_mix
from latentmill.reporting.media import Budget
from latentmill.store.store import LatentStore
from reporting.conftest import HOP, RATE, SETTINGS
from store.store_files import write_store
from support.elsewhere import sources_elsewhere
from support.latent_store import write_latents
from support.stem_files import write_segments, write_stem_store, write_stems


def snr(found: np.ndarray, wanted: np.ndarray) -> float:
    return 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum())


def test_an_excerpt_is_the_loudest_part(report_store: LatentStore, report_source: Path) -> None:
    one = Excerpts(report_store).of("late", 5.0)
    assert 12 <= one.start <= 15.1
    audio, _ = soundfile.read(report_source / "late.wav", dtype="float32")
    start = round(one.start * RATE)
    wanted = audio[start : start + round(one.seconds * RATE)]
    assert one.seconds == pytest.approx(5, abs=0.02)
    assert one.original is not None
    assert one.reconstruction is not None
    np.testing.assert_array_equal(one.original[0], wanted)
    assert snr(one.reconstruction[0], wanted) > 100
    assert one.latent is not None
    whole = report_store["late"].latent
    first = start // HOP
    np.testing.assert_array_equal(one.latent, whole[:, first : first + one.latent.shape[1]])


def test_the_latent_mix_is_the_mix_of_the_waveforms(report_store: LatentStore) -> None:
    keys = [f"north/{role}" for role in ("bass", "drums", "keys")]
    mix = stem_mix(Excerpts(report_store), Budget(), "north", keys)
    assert mix is not None
    assert mix.sources
    assert mix.snr is not None
    assert mix.snr > 100
    assert set(mix.players) == set(mix.pictures) == {"waveforms", "latents"}
    assert [key for key, *_ in mix.stems] == keys


def test_a_missing_source_is_counted(report_store: LatentStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, RATE)
    for name in ("gone", "changed"):
        soundfile.write(source / f"{name}.wav", noise, RATE)
    store = write_store(str(tmp_path / "store"), source, **SETTINGS)
    (source / "gone.wav").unlink()
    soundfile.write(source / "changed.wav", noise / 2, RATE)
    excerpts = Excerpts(store)
    for key in store.keys():  # noqa: SIM118
        one = excerpts.of(key, 5.0, reconstructed=False)
        assert one.original is None
        assert one.reconstruction is not None
    assert dict(excerpts.without_original) == {
        "there is no such file": 1,
        "the source has changed since it was encoded": 1,
    }


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"/{'x' * 300}/a.wav", "File name too long"),
        (f"/{'x' * 300}/a.tar#bytes=0-99", "File name too long"),
        ("/nowhere/a\0.parquet#cell=0,0,audio", "null byte"),
        ("/nowhere/a.tar#bytes=0-99", "there is no such file"),
        ("/dev/zero#bytes=0-99", "not a regular file"),
        ("/dev/zero#cell=0,0,audio", "not a regular file"),
        ("http://[::1/a.wav", "at another address"),
    ],
)
def test_an_address_that_cannot_be_opened_is_counted(
    address: str, reason: str, report_store: LatentStore
) -> None:
    excerpts = Excerpts(report_store)
    record = dataclasses.replace(excerpts.record("late"), source_uri=address)
    assert excerpts.original(record, ExcerptRange(0, 8, 0, 8 * HOP)) is None
    ((counted, number),) = excerpts.without_original.items()
    assert reason in counted
    assert number == 1


def test_a_file_url_is_on_this_machine(report_store: LatentStore) -> None:
    excerpts = Excerpts(report_store)
    record = excerpts.record("late")
    record = dataclasses.replace(record, source_uri=f"file://{record.source_uri}")
    assert excerpts.original(record, ExcerptRange(0, 8, 0, 8 * HOP)) is not None


def test_a_source_without_permission_is_counted(
    report_store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    excerpts = Excerpts(report_store)
    record = excerpts.record("late")
    monkeypatch.setattr(Path, "stat", denied)
    assert excerpts.original(record, ExcerptRange(0, 8, 0, 8 * HOP)) is None
    assert dict(excerpts.without_original) == {"no permission to read the file": 1}


def test_addresses_that_a_store_names_are_not_requested(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    source = tmp_path / "source"
    source.mkdir()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, RATE)
    soundfile.write(source / "a.wav", noise, RATE)
    write_store(str(tmp_path / "store"), source, **SETTINGS)
    with sources_elsewhere(tmp_path / "store", source) as (store, requests):
        assert store.without_latent("a").source_uri.startswith("http://127.0.0.1:")
        excerpts = Excerpts(store)
        assert excerpts.of("a", 1.0).original is None
        assert excerpts.without_original["at another address"] == 1
        assert not requests
        original = Excerpts(store, remote_sources=True).of("a", 1.0).original
        assert requests
        assert original is not None
        assert original.shape[1] <= store.without_latent("a").num_samples


@pytest.mark.parametrize("kind", ["sealed", "earlier version"])
def test_columns_are_those_of_the_records(
    kind: str, report_store: LatentStore, tmp_path: Path
) -> None:
    """Each unit has one record, so the stems of a group are in different shards."""
    folder = Path(shutil.copytree(report_store.url, tmp_path / "store"))
    if kind == "earlier version":
        path = folder / "dataset.json"
        document = json.loads(path.read_text())
        del document["metadata"], document["metadata_hash"]
        path.write_text(json.dumps(document))
    store = lm.open(folder)
    columns = read_columns(store, 4)
    records = list(store)
    assert columns.seconds.tolist() == [one.duration for one in records]
    for level, record in zip(columns.rms_db, records, strict=True):
        assert level == pytest.approx(20 * math.log10(record.rms) if record.rms else -math.inf)
    silent = [np.mean([(v - 255) / 2 < -60 for v in one.levels or b""]) for one in records]
    assert columns.silence.tolist() == pytest.approx(silent)
    fields = {field.name: field.values for field in columns.fields}
    sample = [records[at] for at in columns.sample]
    assert fields["duration in s"] == [round(one.duration, 2) for one in sample]
    assert fields["role"] == [one.role for one in sample]
    assert fields["metadata bpm"] == [one.metadata.get("bpm") for one in sample]
    assert columns.group == ("north", [one.key for one in records if one.group == "north"])


def test_the_group_of_segments_begins_at_one_time(tmp_path: Path) -> None:
    source = write_stems(tmp_path / "songs")
    manifest = write_segments(source / "segments.jsonl", source, 0.5)
    columns = read_columns(write_stem_store(tmp_path / "store", manifest), 4)
    keys = ["bass#0.00002-0.50002", "drums#0-0.5", "keys#0-0.5"]
    assert columns.group == ("north#0", [f"north/{key}" for key in keys])


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"duration": [1.0, 1.0], "bpm": [90.5, 91.0], "genre": ["a", "b"]}, "genre"),
        ({"duration": [1.0, 1.0], "genre": ["a", "b"], "role": ["a", None]}, "genre"),
        ({"duration": [1.0, 1.0], "genre": ["a", "b"], "role": ["a", "b"]}, "role"),
        ({"duration": [1.0, 1.0], "bpm": [90.5, 91.0]}, "bpm"),
        ({"duration": [1.0, 1.0]}, "duration"),
    ],
)
def test_the_map_is_first_coloured_by_a_field_with_several_values(
    values: dict[str, list], first: str
) -> None:
    fields = tuple(Field(name, column) for name, column in values.items())
    none = np.zeros(0)
    columns = RecordColumns(none, none, none, np.zeros(0, np.int64), fields, None)
    assert fields[columns.first_field].name == first


def test_principal_components_are_those_of_the_svd() -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((200, 3)) @ random.standard_normal((3, 40))
    values = (values + 0.01 * random.standard_normal(values.shape)).astype(np.float32)
    standard = (values - values.mean(axis=0)) / values.std(axis=0)
    left, sizes, _ = np.linalg.svd(standard.astype(np.float64), full_matrices=False)
    points, shares = principal(values)
    np.testing.assert_allclose(abs(points), abs(left[:, :2] * sizes[:2]), rtol=0.02, atol=0.02)
    assert shares == pytest.approx(np.square(sizes[:2]) / np.square(sizes).sum(), rel=1e-3)


def test_similar_records_are_close_on_the_map(report_store: LatentStore) -> None:
    keys = list(report_store.keys())
    placed = corpus_map(report_store, np.arange(len(keys)))
    assert placed is not None
    assert placed.points.min() == -1
    assert placed.points.max() == 1
    at = {key: placed.points[number] for number, key in enumerate(keys)}
    same = np.linalg.norm(at["same 1"] - at["same 2"])
    assert same < 1e-4
    assert np.linalg.norm(at["silent"] - at["same 1"]) > 0.5


def test_padding_of_chunks_has_no_place_on_the_map(tmp_path: Path) -> None:
    """The same sound, in a chunk of its own and in one that is padded."""
    random = np.random.default_rng(0)
    latents = [random.standard_normal((1, 4, 16)).astype(np.float16) for _ in range(4)]
    latents.append(latents[0].copy())
    for latent in (latents[0], latents[4]):
        latent[0, :, 1:] = latent[0, :, :1]  # constant, so its mean does not depend on the length
    latents[4][0, :, 8:] = 0
    store = write_latents(
        str(tmp_path / "store"), [16, 16, 16, 16, 8], stitch="none", channels=4, latents=latents
    )
    placed = corpus_map(store, np.arange(5))
    assert placed is not None
    assert np.linalg.norm(placed.points[0] - placed.points[4]) < 1e-3


@pytest.mark.parametrize(
    ("count", "values"),
    [
        (durations, np.array([0.01, 0.1, 0.3, 59.9, 60.0, 1e6])),
        (loudness, np.array([-np.inf, -61, -60, -12.5, 0, 3])),
        (silence, np.array([0, 0.05, 0.1, 0.95, 1, 1, np.nan])),
    ],
)
def test_every_value_is_in_one_bin(count, values: np.ndarray) -> None:
    chart = count(values)
    assert sum(chart.counts) + chart.missing == len(values)
    assert len(chart.labels) == len(chart.counts)
    assert chart.counts[0] > 0
    assert chart.counts[-1] > 0
    assert all(0 < at < 100 for at, _ in chart.ticks)


def test_limits_of_bins_belong_to_the_upper_one() -> None:
    chart = durations(np.array([0.1, 0.3, 59.9, 60.0]))
    counts = dict(zip(chart.labels, chart.counts, strict=True))
    assert counts["0.1 s to 0.2 s"] == counts["0.2 s to 0.5 s"] == counts["30 s to 1 min"] == 1
    assert counts["1 min to 2 min"] == 1
