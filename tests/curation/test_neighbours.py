"""The nearest records in the space of pooled latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.curation import field_vectors
from latentmill.errors import ConfigError, ModelError, SourceError, StoreError
from latentmill.evaluation.shard_pass import RecordTable, ShardPass
from latentmill.evaluation.statistics import measure_statistics
from latentmill.evaluation.vectors import _BLOCK, StoredVectors
from latentmill.export.export import Target, export_store
from latentmill.store.store import LatentStore
from store.store_files import write_store
from support.field_stores import write_fields
from support.latent_store import write_again, write_latents
from support.runs import call

RATE = 22050


def tone(pitch: float, seconds: float, seed: int) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return 0.3 * np.sin(2 * np.pi * pitch * time) + 0.003 * noise


SOUNDS = {"low": 200.0, "middle": 900.0, "high": 4000.0}


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of sounds, four of each, and a silent one."""
    folder = tmp_path_factory.mktemp("neighbours")
    for kind, pitch in SOUNDS.items():
        for number in range(4):
            sound = tone(pitch * 1.02**number, 1 + 0.2 * number, number)
            soundfile.write(folder / f"{kind}{number}.wav", sound, RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    return folder


@pytest.fixture(scope="module", params=["trim", "none"])
def store(
    audio: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> LatentStore:
    url = str(tmp_path_factory.mktemp("neighbours") / "s")
    store = write_store(url, audio, stitch=request.param, chunk_seconds=0.5)
    measure_statistics(store)
    return store


def test_records_of_the_same_kind_are_nearest(store: LatentStore) -> None:
    for kind in SOUNDS:
        found = lm.neighbours(store, f"{kind}0", 3)
        assert {one.key for one in found} == {f"{kind}{number}" for number in (1, 2, 3)}
        assert all(one.duration == pytest.approx(store[one.key].duration) for one in found)
        similarities = [one.similarity for one in found]
        assert similarities == sorted(similarities, reverse=True)
        assert similarities[0] > 0.5
    every = lm.neighbours(store.url, "low0", 100)
    assert {one.key for one in every} == set(store.keys()) - {"low0"}


def test_similarities_are_the_mean_of_two_cosines(store: LatentStore) -> None:
    """Of the vectors of the statistics, for every pair, in float64."""
    shard_pass = ShardPass(store)
    table = RecordTable.of(len(store), shard_pass.pooling)
    for shard in range(len(shard_pass.rows.paths)):
        found = shard_pass(shard)
        table.fill(found.at, found.records)
    keys = list(store.keys())
    sounding = [key != "silent" for key in keys]
    shapes = table.shapes.astype(np.float64)
    shapes -= shapes[sounding].mean(axis=0)
    row = keys.index("high2")
    for one in lm.neighbours(store, "high2", 100):
        other = keys.index(one.key)
        pairs = ((v[row], v[other]) for v in (table.positions.astype(np.float64), shapes))
        cosines = [a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) for a, b in pairs]
        wanted = 0 if one.key == "silent" else sum(cosines) / 2
        assert one.similarity == pytest.approx(wanted, abs=2e-3)


def test_an_audio_file(store: LatentStore, audio: Path, tmp_path: Path) -> None:
    """Encoded as a run would do it, so its own record is at a similarity of 1."""
    (first, *_) = lm.neighbours(store, audio / "middle3.wav")
    assert (first.key, first.similarity) == ("middle3", pytest.approx(1, abs=2e-3))
    soundfile.write(tmp_path / "new.flac", tone(4100, 2, 9), RATE)
    found = lm.neighbours(store, tmp_path / "new.flac", 4)
    assert {one.key for one in found} == {f"high{number}" for number in range(4)}


def test_what_has_no_neighbours_is_one_sentence(
    store: LatentStore, audio: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"this is not audio")
    for query, kind, message in (
        ("z" * 300, ConfigError, "has no record zzz+, and there is no audio file zzz+: check"),
        ("zzz", ConfigError, "has no record zzz, and there is no audio file zzz"),
        ("silent", ConfigError, "silent is silent, so it has no neighbours"),
        (audio / "silent.wav", ConfigError, "is silent, so it has no neighbours"),
        (tmp_path / "broken.wav", SourceError, r"broken\.wav cannot be encoded \("),
    ):
        with pytest.raises(kind, match=message) as error:
            lm.neighbours(store, query)
        one_sentence(error.value)


def test_a_store_without_current_statistics(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    latents = [
        np.random.default_rng(n).standard_normal((4, 20)).astype(np.float16) for n in range(6)
    ]
    store = write_latents(str(tmp_path / "s"), [20] * 6, latents=latents, per_unit=2)
    hint = "has no pooled latents of its records: run `latentmill evaluate .*s --only statistics`"

    def refused() -> None:
        with pytest.raises(StoreError, match=hint) as error:
            lm.neighbours(store.url, "item/00000")
        one_sentence(error.value)

    refused()
    measure_statistics(store, record=False)
    refused()
    measure_statistics(store)
    found = lm.neighbours(store.url, "item/00000")
    assert len(found) == 5
    (tmp_path / "f.csv").write_text("key,a\nitem/00001,1\n")
    lm.annotate(store, tmp_path / "f.csv")  # the latents are the same
    assert lm.neighbours(store.url, "item/00000") == found
    export_store(store, str(tmp_path / "e"), Target.WEBDATASET)
    exported = json.loads((tmp_path / "e/evaluation/statistics.json").read_text())
    assert "vectors" not in exported["statistics"]  # the file is not copied
    store = write_again(store.url, [0], latents)
    refused()
    files = sorted(path.name for path in (tmp_path / "s/evaluation").iterdir())
    measure_statistics(store)
    assert lm.neighbours(store.url, "item/00000") == found
    # Equal vectors have an equal name; those of other latents replace them.
    assert sorted(path.name for path in (tmp_path / "s/evaluation").iterdir()) == files
    store = write_again(store.url, [0], [latents[5], *latents[1:]])
    measure_statistics(store)
    assert lm.neighbours(store.url, "item/00000", 1)[0].key == "item/00005"
    assert len(list((tmp_path / "s/evaluation").glob("vectors.*"))) == 1
    assert not (tmp_path / "s/tmp").exists()


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "longer", "changed", "no array", "no header"]
)
def test_damaged_vectors_are_one_sentence(
    tmp_path: Path, damage: str, one_sentence: Callable[[BaseException], str]
) -> None:
    store = write_latents(str(tmp_path / "s"), [20] * 6)
    measure_statistics(store)
    (file,) = (tmp_path / "s/evaluation").glob("vectors.*")
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        changed = {
            "truncated": data[:-1],
            "longer": data + b"x",
            "changed": data[:-1] + bytes([data[-1] ^ 1]),
            "no array": b"x" * len(data),
            "no header": data[:10] + b"(" * (len(data) - 10),
        }
        file.write_bytes(changed[damage])
    message = r"vectors\.\w+\.npy is missing or damaged: run `latentmill evaluate .* --only stat"
    with pytest.raises(StoreError, match=message) as error:
        lm.neighbours(store, "item/00003")
    one_sentence(error.value)
    measure_statistics(store)
    assert len(lm.neighbours(store, "item/00003")) == 5


def test_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the number of records that are read at once."""
    store = write_latents(str(tmp_path / "s"), list(range(9, 39)), per_unit=8)
    measure_statistics(store)
    whole = lm.neighbours(store, "item/00011", 7)
    assert len(store) < _BLOCK
    monkeypatch.setattr("latentmill.evaluation.vectors._BLOCK", 4)
    assert [start for start, _ in StoredVectors(store).blocks()] == list(range(0, 30, 4))
    assert lm.neighbours(store, "item/00011", 7) == whole


def test_vectors_of_a_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(field_vectors, "_SPAN", 100)  # less than a shard
    store = write_latents(str(tmp_path / "s"), [4] * 20)
    write_fields(store, [4] * 20, names=["clap", "windows", "text"])
    for name in ("clap", "windows"):
        values = [one.latent.astype(np.float64).mean(1) for one in store.field(name)]
        vectors = np.array([one / np.linalg.norm(one) for one in values])
        similarities = vectors @ vectors[3]
        similarities[3] = -np.inf
        best = np.argsort(-similarities)[:5]
        found = lm.neighbours(store, "item/00003", 5, field=name)
        assert [one.key for one in found] == [f"item/{number:05d}" for number in best]
        np.testing.assert_allclose([one.similarity for one in found], similarities[best], atol=1e-3)
    out = call(capsys, "neighbours", store.url, "item/00003", "--field=windows", "--count=5")
    assert out.out.split()[-1] == found[-1].key
    with pytest.raises(ConfigError, match=r"field text of .* has tokens, not vectors"):
        lm.neighbours(store, "item/00003", field="text")
    with pytest.raises(ConfigError, match="field clap has no vector of item/99999"):
        lm.neighbours(store, "item/99999", field="clap")
    with pytest.raises(StoreError, match="has no field 'mert'"):
        lm.neighbours(store, "item/00003", field="mert")


def test_codes_and_models_of_others_are_refused(
    tmp_path: Path, audio: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    codes = write_latents(str(tmp_path / "c"), [9] * 3, model={"output": "codes"})
    with pytest.raises(ConfigError, match="contains codes, which have no neighbours") as error:
        lm.neighbours(codes, "item/00000")
    one_sentence(error.value)
    name = "python:support.batch_model:build"
    store = write_latents(str(tmp_path / "s"), [9] * 3)
    document = json.loads(Path(store.url, "dataset.json").read_text())
    document["model"]["asked"] = name
    Path(store.url, "dataset.json").write_text(json.dumps(document))
    measure_statistics(LatentStore(store.url))
    assert len(lm.neighbours(store.url, "item/00000")) == 2
    with pytest.raises(ModelError, match="trust"):
        lm.neighbours(store.url, audio / "low0.wav")


def test_the_command(
    store: LatentStore, audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "neighbours", store.url, "low0", "--count", 2)
    found = lm.neighbours(store, "low0", 2)
    assert (done.code, done.out.splitlines()) == (
        0,
        [f"{one.similarity:8.4f} {one.duration:9.2f} s  {one.key}" for one in found],
    )
    printed = call(capsys, "neighbours", store.url, audio / "low0.wav", "--json", "--device", "cpu")
    assert json.loads(printed.out)[0]["key"] == "low0"
    copy = Path(shutil.copytree(store.url, tmp_path / "copy"))
    shutil.rmtree(copy / "evaluation")
    refused = call(capsys, "neighbours", copy, "low0")
    assert (refused.code, refused.err) == (
        5,
        f"latentmill: {copy} has no pooled latents of its records: run `latentmill evaluate {copy} "
        "--only statistics` first.\n",
    )
    assert call(capsys, "evaluate", copy, "--only", "statistics").code == 0
    assert call(capsys, "neighbours", copy, "low0", "--count", 2).out == done.out
