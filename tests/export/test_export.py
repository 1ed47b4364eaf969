"""Exports: what stable-audio-tools reads, and stores of the other format."""

from __future__ import annotations

import json
import shutil
import sys
import types
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

import latentmill as lm
from latentmill.errors import ConfigError, StoreError
from latentmill.export.export import Target, export_store
from latentmill.export.stable_audio import StableAudio
from latentmill.run.run import encode
from latentmill.storage.storage import Storage
from latentmill.store.measurement import write_measurement
from latentmill.store.results import SeamEntry
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from store.store_files import MODEL_OPTIONS, write_corpus, write_store
from support import runs
from support.in_process import in_process
from support.latent_store import latent_of, write_latents
from support.rounds import shard_rounds

FORMATS = ["parquet", "webdataset"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=FORMATS)
def store(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> LatentStore:
    return write_store(str(tmp_path_factory.mktemp("store")), source, format=request.param)


def assert_equal(one: LatentStore, other: LatentStore) -> None:
    assert list(one.keys()) == list(other.keys())
    for key in one.keys():  # noqa: SIM118
        ours, theirs = one[key], other[key]
        assert ours.latent.dtype == theirs.latent.dtype
        assert np.array_equal(ours.latent, theirs.latent)
        for name in {field.name for field in fields(ours)} - {"latent"}:
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("to", FORMATS)
def test_a_store_of_another_format_is_whole(store: LatentStore, to: str, tmp_path: Path) -> None:
    summary = export_store(store, str(tmp_path / "new"), Target(to))
    new = LatentStore(str(tmp_path / "new"), device="cpu")
    assert (summary.records, summary.failures) == (len(store), ())
    assert verify(new, decode=2).faults == []
    assert new.info.format == to
    assert_equal(store, new)
    for name in ("fingerprint", "items", "failed", "skipped", "frames", "mean", "std", "hours"):
        assert getattr(new.info, name) == getattr(store.info, name), name
    assert new.plan.units == store.plan.units
    same, back = (  # the same records give the same bytes
        LatentStore(export_store(one, str(tmp_path / name), Target(store.info.format)).dest)
        for one, name in ((store, "same"), (new, "back"))
    )
    assert [shard.hash for shard in back.info.shards] == [s.hash for s in same.info.shards]


def test_chunks_kept_apart_are_converted_too(source: Path, tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "old"), source, stitch="none", chunk_seconds=0.5)
    new = LatentStore(export_store(store, str(tmp_path / "new"), Target.WEBDATASET).dest)
    assert verify(new).faults == []
    assert_equal(store, new)


def test_an_interrupted_export_goes_on(store: LatentStore, tmp_path: Path) -> None:
    to = Target.PARQUET if store.info.format == "webdataset" else Target.WEBDATASET
    new = tmp_path / "new"
    export_store(store, str(new), to)
    dataset = json.loads((new / "dataset.json").read_text())
    commits = runs.commits(new)
    first, *rest = sorted(commits)
    for name in rest:
        (new / "commits" / name).unlink()
    (new / "dataset.json").unlink()
    before = (new / "commits" / first).stat().st_mtime_ns
    export_store(store, str(new), to)
    assert (new / "commits" / first).stat().st_mtime_ns == before
    assert verify(LatentStore(str(new))).faults == []
    again = json.loads((new / "dataset.json").read_text())
    names = ("encoded", "failed", "mean", "std", "fingerprint")
    assert {name: again[name] for name in names} == {name: dataset[name] for name in names}
    hashes = [[shard["hash"] for shard in one["shards"]] for one in (again, dataset)]
    assert hashes[0] == hashes[1]


TARGETS = [Target.PARQUET, Target.WEBDATASET, Target.STABLE_AUDIO_TOOLS]


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the commits, which tell when they were written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "commits"
    }


@pytest.mark.parametrize("to", TARGETS)
def test_a_second_export_follows_its_store(source: Path, to: Target, tmp_path: Path) -> None:
    """Items that were fixed since, items that are skipped now, a shard or file that was cut."""
    songs = Path(shutil.copytree(source, tmp_path / "songs"))
    with in_process():
        options = {"model_options": MODEL_OPTIONS, "device": "cpu", "unit_seconds": 0.5}
        out, dest = tmp_path / "store", tmp_path / "dest"
        encode(str(songs), str(out), min_seconds=0.001, **options)
        first = export_store(LatentStore(str(out)), str(dest), to)
        shutil.copy(songs / "drums.wav", songs / "broken.wav")
        soundfile.write(songs / "many" / "03.wav", np.zeros(3), 8000)  # shorter than min_seconds
        (songs / "many" / "04.txt").write_text("a caption")
        for settings in ({"retry_failed": True}, {"extend": True, "retry_changed": True}):
            encode(str(songs), str(out), min_seconds=0.001, **options, **settings)
    largest = max(
        (p for p in dest.rglob("*") if p.suffix != ".json"), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:1000])
    store = LatentStore(str(out))
    assert store["broken"].num_samples == store["drums"].num_samples
    assert "many/03" not in store
    again = export_store(store, str(dest), to)
    assert (again.records, first.records) == (len(store), len(store))
    export_store(store, str(tmp_path / "fresh"), to)
    if to == Target.STABLE_AUDIO_TOOLS:
        found = files(dest)
        config = json.loads(found.pop("dataset_config.json"))
        assert config["datasets"][0]["path"] == str(dest)
        fresh = files(tmp_path / "fresh")
        del fresh["dataset_config.json"]
        assert found == fresh
    else:
        exported = LatentStore(str(dest), device="cpu")
        assert verify(exported).faults == []
        assert_equal(store, exported)
        assert (exported.info.failed, exported.info.encoded) == (store.info.failed, len(store))
    assert not (dest / "tmp").exists()


def test_an_export_of_a_part_follows_the_view_that_it_is_a_part_of(tmp_path: Path) -> None:
    write_latents(str(tmp_path / "store"), [5] * 20)
    clean, parts, dest = (str(tmp_path / name) for name in ("clean", "parts", "dest"))
    for least in (2, 10):
        lm.select(str(tmp_path / "store"), clean, where=f"number >= {least}", overwrite=True)
        lm.split(clean, parts, {"train": 0.6, "valid": 0.4}, by="key", overwrite=True)
        train = lm.open(f"{parts}/train")
        export_store(train, dest, Target.STABLE_AUDIO_TOOLS)
        names = {f"item/{path.stem}" for path in Path(dest).rglob("0*.npy")}
        assert names == set(train.keys())


@pytest.mark.parametrize("to", TARGETS)
def test_an_export_goes_on_where_another_was_killed_before_its_plan(
    store: LatentStore, to: Target, tmp_path: Path
) -> None:
    (tmp_path / "dest/tmp").mkdir(parents=True)
    (tmp_path / f"dest/tmp/{'0f' * 16}.plan.items.parquet").write_text("half")
    (tmp_path / "dest/.lock").touch()
    if to != Target.STABLE_AUDIO_TOOLS:
        (tmp_path / "dest/plan").mkdir()
        (tmp_path / "dest/plan/items.parquet").write_text("half")
    assert export_store(store, str(tmp_path / "dest"), to).records == len(store)
    if to != Target.STABLE_AUDIO_TOOLS:
        assert verify(LatentStore(str(tmp_path / "dest"))).faults == []
        assert not (tmp_path / "dest/tmp").exists()


def test_an_export_of_another_store_is_left_alone(
    store: LatentStore, source: Path, tmp_path: Path
) -> None:
    other = write_store(str(tmp_path / "other"), source, chunk_seconds=1.0)
    for to in TARGETS:
        dest = tmp_path / to
        export_store(store, str(dest), to)
        before = files(dest)
        assert "another store" in refusal(
            lambda dest=dest, to=to: export_store(other, str(dest), to)
        )
        assert files(dest) == before


def test_an_export_of_another_store_of_the_same_model_is_left_alone(tmp_path: Path) -> None:
    """Its files would be mixed with the others', and those of a view's other records removed."""
    one, to = tmp_path / "one", Target.STABLE_AUDIO_TOOLS
    write_latents(str(one), [5] * 40)
    other = write_latents(str(tmp_path / "other"), [6] * 12, prefix="other")
    lm.split(str(one), tmp_path / "parts", {"train": 0.7, "valid": 0.3}, by="key")
    train, valid = (LatentStore(str(tmp_path / "parts" / part)) for part in ("train", "valid"))
    for first, second in ((LatentStore(str(one)), other), (train, valid), (train, other)):
        dest = tmp_path / "dest"
        export_store(first, str(dest), to)
        before = files(dest)
        with pytest.raises(ConfigError, match="another store"):
            export_store(second, str(dest), to)
        assert files(dest) == before
        shutil.rmtree(dest)


@pytest.mark.parametrize("to", TARGETS)
def test_an_export_of_another_copy_of_the_same_store_is_left_alone(
    to: Target, tmp_path: Path
) -> None:
    one = write_latents(str(tmp_path / "one"), [5] * 6).url
    keys, dest = list(LatentStore(one).keys()), tmp_path / "dest"
    first, second = (
        lm.select(one, tmp_path / name, keys=some, copy=True).dest
        for name, some in (("first", keys[:3]), ("second", keys[3:]))
    )
    for _ in range(2):  # and again
        export_store(LatentStore(first), str(dest), to)
    before = files(dest)
    with pytest.raises(ConfigError, match="another store"):
        export_store(LatentStore(second), str(dest), to)
    assert files(dest) == before


def test_a_store_that_was_moved_is_the_same_store(tmp_path: Path) -> None:
    dest, to = str(tmp_path / "dest"), Target.STABLE_AUDIO_TOOLS
    write_latents(str(tmp_path / "one"), [5] * 12)
    export_store(LatentStore(str(tmp_path / "one")), dest, to)
    (tmp_path / "one").rename(tmp_path / "moved")
    export_store(LatentStore(str(tmp_path / "moved")), dest, to)

    view, dest = str(tmp_path / "view"), str(tmp_path / "of view")
    for records in (5, 3):
        lm.select(tmp_path / "moved", view, sample=records, overwrite=True)
        export_store(LatentStore(view), dest, to)
    assert len([*Path(dest, "item").glob("*.npy")]) == 3
    Path(view).rename(tmp_path / "view moved")
    assert export_store(LatentStore(str(tmp_path / "view moved")), dest, to).records == 3


def test_an_export_of_an_earlier_version_is_known_by_its_address(tmp_path: Path) -> None:
    dest, to = tmp_path / "dest", Target.STABLE_AUDIO_TOOLS
    store = write_latents(str(tmp_path / "one"), [5] * 12)
    export_store(store, str(dest), to)
    details = json.loads((dest / "details.json").read_text())
    del details["identity"]
    (dest / "details.json").write_text(json.dumps(details))
    other = write_latents(str(tmp_path / "other"), [6] * 12, prefix="other")
    assert "another store" in refusal(lambda: export_store(other, str(dest), to))
    assert export_store(store, str(dest), to).records == 12


def test_what_was_measured_comes_along(store: LatentStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.url, tmp_path / "copy"))
    seams = SeamEntry(items=1, median=0.1, largest=0.2)
    write_measurement(Storage(str(copy)), store.info, seams)
    new = export_store(LatentStore(str(copy)), str(tmp_path / "new"), Target.PARQUET).dest
    assert LatentStore(new).measured_info.seams == seams
    assert verify(LatentStore(new)).faults == []


def refusal(action: Callable[[], object], error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


def test_what_cannot_be_exported_is_refused(
    store: LatentStore, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    (tmp_path / "home" / "tmp" / "letters").mkdir(parents=True)
    for to in TARGETS:
        assert "not empty" in refusal(lambda to=to: export_store(store, str(tmp_path / "home"), to))
        assert [path.name for path in (tmp_path / "home").rglob("*")] == ["tmp", "letters"]
        assert "not empty" in refusal(lambda to=to: export_store(store, str(tmp_path / "full"), to))
        inside = f"{store.url}/inside"
        assert "is inside the store" in refusal(lambda to=to: export_store(store, inside, to))  # noqa: B023
        link = tmp_path / f"link {to}"
        link.symlink_to(store.url)
        assert "is inside the store" in refusal(lambda to=to: export_store(store, str(link), to))  # noqa: B023
    other = write_store(str(tmp_path / "other"), source, chunk_seconds=1.0)
    assert "another store" in refusal(
        lambda: export_store(store, other.url, Target(other.info.format))
    )
    assert "no effect with --to parquet" in refusal(
        lambda: export_store(store, str(tmp_path / "new"), Target.PARQUET, frames=3)
    )
    partial = write_store(str(tmp_path / "partial"), source, sealed=False)
    assert "not complete" in refusal(
        lambda: export_store(partial, str(tmp_path / "new"), Target.PARQUET), StoreError
    )
    chunks = write_store(str(tmp_path / "chunks"), source, stitch="none", chunk_seconds=0.5)
    assert "overlapping chunks" in refusal(
        lambda: export_store(chunks, str(tmp_path / "new"), Target.STABLE_AUDIO_TOOLS)
    )
    assert ".npy in its name" in refusal(
        lambda: export_store(store, str(tmp_path / "a.npy.d"), Target.STABLE_AUDIO_TOOLS)
    )
    assert not (tmp_path / "new").exists()


hard = st.text(st.sampled_from("a./%é n p y\t\n"), min_size=1, max_size=12) | st.just("x.npy/.npy")


@given(hard)
@example("..")
@example("../up")
@example("/root")
@example("a//b/.hidden/")
@example("details")
@example("dataset_config")
@example("silence")
@example("song/silence")
@example("\ttab\nline\r")
def test_file_names_can_be_turned_back(key: str) -> None:
    name = StableAudio.name(key)
    assert unquote(name) == key
    parts = name.split("/")
    assert all(part and not part.startswith(".") for part in parts)
    assert ".npy" not in name
    assert name not in ("details", "dataset_config")  # the export's own files
    assert parts[-1] != "silence"  # which Stable Audio 3 pads with
    assert [line.strip() for line in f"{name}.npy\n".splitlines()] == [f"{name}.npy"]


@pytest.fixture(params=[None, 40])
def exported(
    request: pytest.FixtureRequest, store: LatentStore, tmp_path: Path
) -> tuple[LatentStore, Path, int | None]:
    dest = tmp_path / "sat"
    export_store(store, str(dest), Target.STABLE_AUDIO_TOOLS, frames=request.param)
    return store, dest, request.param


def test_the_files_of_stable_audio_tools(
    exported: tuple[LatentStore, Path, int | None], source: Path
) -> None:
    store, dest, frames = exported
    files = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    names = {StableAudio.name(key) for key in store.keys()}  # noqa: SIM118
    expected = {f"{name}{end}" for name in names for end in (".npy", ".json")}
    own = {"details.json", "dataset_config.json", "silence.npy", "filelist.txt"}
    assert files == expected | own
    listed = (dest / "filelist.txt").read_text().splitlines()
    assert sorted(listed) == sorted(f"{name}.npy" for name in names)
    silence = np.load(dest / "silence.npy")  # [1, C, T], as Stable Audio 3's own encoder writes it
    longest = max(frames or 0, *(record.frames for record in store))
    assert silence.shape == (1, store.info.model["latent_channels"], longest)
    assert silence.dtype == np.float32
    assert np.array_equal(silence[0], store.origin.of_length(longest))
    for record in store:
        latent = np.load(dest / f"{StableAudio.name(record.key)}.npy")
        length = max(record.frames, frames or 0)
        assert (latent.shape, latent.dtype) == ((record.channels, length), np.float32)
        assert np.array_equal(latent[:, : record.frames], record.latent.astype(np.float32))
        silence = store.origin.of_length(length)[:, record.frames :]
        assert np.array_equal(latent[:, record.frames :], silence)
        info = json.loads((dest / f"{StableAudio.name(record.key)}.json").read_text())
        assert info["padding_mask"] == [1] * record.frames + [0] * (length - record.frames)
        assert (info["seconds_start"], info["seconds_total"]) == (0, record.duration)
        assert info["relpath"] == record.key
    info = json.loads((dest / "album one/été.json").read_text())
    assert info["prompt"] == "a caption — with a dash"
    assert info["bpm"] == 127.5
    config = json.loads((dest / "dataset_config.json").read_text())
    assert config["datasets"] == [{"id": "latentmill", "path": str(dest)}]
    assert config.get("latent_crop_length") == frames


@pytest.fixture
def stable_audio_dataset(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the published package that reads pre-encoded latents.

    The package pins pandas 2.0.2 and others, which fit no environment of ours:
    `pip install --no-deps --target FOLDER stable-audio-tools` and `PYTHONPATH=FOLDER` let this run.
    Its `data` package needs torchaudio for audio files only, which are not read here.
    """
    import importlib
    import importlib.util

    spec = importlib.util.find_spec("stable_audio_tools")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs stable-audio-tools (pip install --no-deps stable-audio-tools)")
    folder = spec.submodule_search_locations[0]
    # The package's own __init__ imports all of its models; an empty one leads to the same files.
    package = types.ModuleType("stable_audio_tools")
    package.__path__ = [folder]
    monkeypatch.setitem(sys.modules, "stable_audio_tools", package)
    if importlib.util.find_spec("torchaudio") is None:
        torchaudio = types.ModuleType("torchaudio")
        torchaudio.transforms = types.ModuleType("torchaudio.transforms")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
        monkeypatch.setitem(sys.modules, "torchaudio.transforms", torchaudio.transforms)
    module = importlib.import_module("stable_audio_tools.data.dataset")
    yield module
    for name in [name for name in sys.modules if name.startswith("stable_audio_tools")]:
        monkeypatch.delitem(sys.modules, name)


def test_stable_audio_tools_reads_them(
    exported: tuple[LatentStore, Path, int | None], stable_audio_dataset: Any, capsys: Any
) -> None:
    store, dest, frames = exported
    config = json.loads((dest / "dataset_config.json").read_text())
    local = stable_audio_dataset.LocalDatasetConfig(**config["datasets"][0])
    dataset = stable_audio_dataset.PreEncodedDataset(
        [local], latent_crop_length=config.get("latent_crop_length"), random_crop=True
    )
    assert len(dataset) == len(store)
    seen = set()
    for number in range(len(dataset)):
        latents, info = dataset[number]
        record = store[info["relpath"]]
        seen.add(record.key)
        start = info.get("latent_crop_start", 0)
        length = frames or record.frames
        assert tuple(latents.shape) == (record.channels, length)
        part = record.latent[:, start : start + length].astype(np.float32)
        assert np.array_equal(latents.numpy()[:, : part.shape[1]], part)
        assert info["padding_mask"][0].tolist() == [1] * part.shape[1] + [0] * (
            length - part.shape[1]
        )
        assert info["seconds_total"] == record.duration
    assert seen == set(store.keys())  # it replaces what it cannot read by something else
    assert "Couldn't load" not in capsys.readouterr().out
    if frames is not None:  # as its `train.py --dataset-config` does
        loader = stable_audio_dataset.create_dataloader_from_config(
            config, batch_size=4, sample_size=0, sample_rate=0, num_workers=1
        )
        latents, info = next(iter(loader))
        assert tuple(latents.shape) == (4, record.channels, frames)
        assert all(isinstance(one["prompt"], str) for one in info)


def test_the_command(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    result = runs.call(capsys, "export", store.url, new, "--to", "webdataset", "--json")
    assert result.code == 0
    assert runs.outcome(result) == {
        "dest": str(new),
        "to": "webdataset",
        "records": len(store),
        "escaped": 0,
        "failures": [],
    }
    result = runs.call(
        capsys, "export", store.url, tmp_path / "sat", "--to", "stable-audio-tools", "--frames", 9
    )
    assert (result.code, result.out) == (
        0,
        f"{tmp_path}/sat: {len(store)} records for stable-audio-tools\n",
    )
    result = runs.call(capsys, "export", store.url, tmp_path / "x", "--to", "zip")
    assert (result.code, result.err) == (
        2,
        "latentmill: invalid --to 'zip': use one of stable-audio-tools, ltx2, ace-step, "
        "webdataset, parquet.\n",
    )


def test_a_name_that_no_file_can_have_is_left_out_and_the_rest_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "corpus")
    long = "x" * 251
    soundfile.write(folder / f"{long}.wav", np.zeros(9000), 8000)
    store = write_store(str(tmp_path / "store"), folder)
    assert long in store
    dest = tmp_path / "sat"
    result = runs.call(capsys, "export", store.url, dest, "--to", "stable-audio-tools")
    assert result.code == 3
    assert f"{len(store) - 1} records" in result.out
    assert long in result.out
    assert len(list(dest.rglob("*.npy"))) == len(store) - 1 + len(["silence.npy"])


def test_keys_that_are_too_long_for_a_wav_are_decoded_to_shorter_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    keys = ["x" * 251 + "1", "x" * 251 + "2", "\u00e9" * 126]  # with `.au` as long as allowed
    for key in keys:
        soundfile.write(folder / f"{key}.au", np.zeros(9000), 8000)
    store = write_store(str(tmp_path / "store"), folder)
    result = runs.call(capsys, "decode", store.url, "--all", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == len(keys)
    assert [name[:100] for name in names] == ["x" * 100, "x" * 100, "\u00e9" * 100]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_reads_a_shard_in_a_few_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, format_name: str
) -> None:
    """Of a store in a bucket, and of a view of it."""
    url, count = f"memory://{uuid.uuid4().hex}", 80
    store = write_latents(url, [4] * count, per_unit=40, format_name=format_name)
    view = lm.open(lm.select(url, tmp_path / "view").dest)
    rounds = shard_rounds(monkeypatch, url)
    other = Target.PARQUET if format_name == "webdataset" else Target.WEBDATASET
    converted = lm.open(export_store(store, str(tmp_path / "store"), other).dest)
    latents = [latent_of(number, 4) for number in range(count)]
    assert [record.latent.tobytes() for record in converted] == [one.tobytes() for one in latents]
    for name, exported in {"files": store, "files of the view": view}.items():
        export_store(exported, str(tmp_path / name), Target.STABLE_AUDIO_TOOLS)
        for number, latent in enumerate(latents):
            found = np.load(tmp_path / name / f"item/{number:05d}.npy")
            assert np.array_equal(found, latent.astype(np.float32))
    assert 0 < len(rounds) <= 3 * count / 4
