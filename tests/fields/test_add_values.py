"""Fields from texts, latents and files: `add --from`."""

from __future__ import annotations

import json
import pickle
import sys
import tracemalloc
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import latentmill as lm
from latentmill.cli import show
from latentmill.config import load_config
from latentmill.engine import values_worker
from latentmill.errors import ConfigError, LatentmillError, ModelError, StoreError
from latentmill.fields.imported import ImportedValues
from latentmill.fields.status import field_states
from latentmill.fields.values import values_of
from latentmill.models import embedder as protocol
from latentmill.models.embedder import EmbedderSpec
from latentmill.models.registry import resolve_embedder
from latentmill.plan import load
from latentmill.run.add_values import default_batch_size
from latentmill.run.run import RunSummary
from latentmill.run.with_fields import wanted_fields
from latentmill.storage.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.schema import Commit, ItemEntry
from latentmill.store.seal import read_origin
from latentmill.store.store import open_store
from support import runs
from support.examples import example
from support.fields import files, given, write_import
from support.in_process import encode, spoil
from support.latent_store import latent_of, write_latents
from support.rounds import shard_rounds

VOWELS = "python:vowels_of_fields:factory"
PEAKS = "python:peaks_of_fields:factory"
CALLS: list[list[str]] = []


class Peaks:
    """The largest value of every channel in each two frames of a latent."""

    spec = EmbedderSpec("peaks", "frames", "latents", dimensions=64, stride=2)

    def load(self, device: str) -> Peaks:
        del device
        return self

    def embed(self, values: Any) -> list[Any]:
        padded = [np.pad(each, ((0, 0), (0, each.shape[1] % 2)), "edge") for each in values]
        return [np.maximum(each[:, ::2], each[:, 1::2]) for each in padded]


vowels = types.ModuleType("vowels_of_fields")
sys.modules[vowels.__name__] = vowels
exec(example(protocol), vowels.__dict__)
peaks = types.ModuleType("peaks_of_fields")
sys.modules[peaks.__name__] = peaks
peaks.factory = Peaks  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is embedded is noted in `CALLS`."""
    CALLS.clear()
    embed = vowels.Vowels.embed

    def noted(self: Any, values: Any) -> Any:
        CALLS.append(list(values))
        return embed(self, values)

    monkeypatch.setattr(vowels.Vowels, "embed", noted)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    songs = runs.write_songs(tmp_path / "songs", 5)
    for number, path in enumerate(sorted(songs.rglob("*.wav"))[:4]):
        caption = ["oud solo", "", "a e i", 7][number]
        path.with_suffix(".json").write_text(json.dumps({"prompt": caption}))
    return songs


def add(store: Path, name: str = "text", **options: Any) -> RunSummary:
    given = {"model": VOWELS, "source": "metadata:prompt", "device": "cpu", **options}
    return lm.add(store, field=name, **given)


def values(store: Path, name: str = "text") -> dict[str, Any]:
    field = store / "fields" / name
    runs.assert_whole(field)
    return {record.key: record.latent for record in open_store(str(field))}


def count(text: str) -> list[int]:
    return [text.count(letter) for letter in "aeiou"]


def behind(store: Path) -> int:
    opened = open_store(str(store))
    (state,) = field_states(Storage(str(store)), opened.plan)
    return state.behind


def test_a_text_of_the_metadata(store: Path) -> None:
    before = files(store)
    summary = add(store)
    assert files(store) == before
    texts = {r.key: r.metadata.get("prompt") for r in open_store(str(store))}
    found = values(store)
    assert {key: found[key][:, 0].tolist() for key in found} == {
        key: count(str(text)) for key, text in texts.items() if text is not None
    }
    (without,) = [key for key, text in texts.items() if text is None]
    assert summary.skipped == ((without, "it has no metadata named prompt"),)
    assert (summary.info.encoded, summary.info.skipped, summary.exit_code) == (4, 1, 0)
    assert summary.info.field is not None
    assert (summary.info.field.kind, summary.info.field.source) == ("vector", "metadata:prompt")
    records = list(open_store(str(store / "fields/text")))
    base = open_store(str(store))
    assert [r.duration for r in records] == [base[r.key].duration for r in records]
    assert [r.content_hash for r in records] == [base[r.key].content_hash for r in records]
    assert {r.metadata["prompt"] for r in records} == {"oud solo", "", "a e i", "7"}
    CALLS.clear()
    again = add(store)
    assert again.resumed_units == again.units
    assert CALLS == []


def test_changed_texts_are_brought_up_to_date_alone(
    songs: Path, store: Path, tmp_path: Path
) -> None:
    add(store)
    key = next(iter(open_store(str(store)).keys()))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"key": key, "prompt": "aaa"}) + "\n")
    lm.annotate(store, rows)
    assert behind(store) == 1
    CALLS.clear()
    add(store)
    assert CALLS == [["aaa"]]
    assert values(store)[key][:, 0].tolist() == [3, 0, 0, 0, 0]
    assert behind(store) == 0
    last = sorted(songs.rglob("*.wav"))[-1].with_suffix(".json")
    last.write_text('{"prompt": "uuu"}')
    encode(songs, store, unit_seconds=3.0, extend=True, refresh_metadata=True)
    runs.write_songs(songs, 2, first=20)
    encode(songs, store, unit_seconds=3.0, extend=True)
    assert behind(store) == 3  # two new items, of which the field knows nothing
    CALLS.clear()
    summary = add(store)
    assert CALLS == [["uuu"]]
    assert (summary.info.encoded, summary.info.skipped) == (5, 2)


def test_items_that_the_store_lacks_are_skipped(songs: Path, tmp_path: Path) -> None:
    spoil(sorted(songs.rglob("*.wav"))[0])
    encode(songs, tmp_path / "store", unit_seconds=3.0)
    summary = add(tmp_path / "store")
    assert len(summary.skipped) == 2
    assert any(reason.startswith("failed in the base store: ") for _, reason in summary.skipped)


@pytest.mark.parametrize("fatal", [0, 1, 2])
def test_a_killed_run_is_resumed(store: Path, monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    """Killed before the commit with this number is written."""
    add(store, "whole")
    expected = values(store, "whole")
    write, left = values_worker.write_commit, iter(range(fatal))

    def killed(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(values_worker, "write_commit", killed)
        add(store)
    assert add(store).resumed_units == fatal
    found = values(store)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_tokens_of_t5(store: Path, tmp_path: Path) -> None:
    from support.tiny_encoders import write_t5

    write_t5(tmp_path / "t5")
    model = f"t5:{tmp_path / 't5'}"
    add(store, model=model, dtype="float32")
    found = values(store)
    embedder = resolve_embedder(model).load("cpu")
    texts = {r.key: r.metadata["prompt"] for r in open_store(str(store / "fields/text"))}
    assert len({latent.shape[1] for latent in found.values()}) > 2
    for key, text in texts.items():
        (alone,) = embedder.embed([text])
        assert found[key].shape == alone.shape
        np.testing.assert_allclose(found[key], alone, atol=2e-6)
    origin = read_origin(Storage(str(store / "fields/text")))
    np.testing.assert_allclose(origin, embedder.embed([""])[0], atol=2e-6)


def test_what_tasks_of_a_cluster_are_given_computes_the_same(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an address, units are computed by a task that is pickled; here without Ray."""
    from latentmill.engine import tasks
    from support.tiny_encoders import write_t5

    def pickled(function: Any, units: Any, address: str | None) -> Any:
        assert address == "auto"
        return map(pickle.loads(pickle.dumps(function)), units)

    write_t5(tmp_path / "t5")
    monkeypatch.setattr(tasks, "map_in_tasks", pickled)
    for name, address in (("alone", None), ("tasks", "auto")):
        options = {"address": address, "precision": "float32"}
        add(store, name, model=f"t5:{tmp_path / 't5'}", **options)
    alone, found = values(store, "alone"), values(store, "tasks")
    assert alone.keys() == found.keys()
    assert all(np.array_equal(alone[key], found[key]) for key in alone)


def test_the_device_is_that_of_the_tasks(
    store: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: Callable[[BaseException], str]
) -> None:
    """The GPUs of a cluster compute the store, but no field from texts or latents."""
    from latentmill.engine import launch, tasks

    monkeypatch.setattr(launch, "cluster_device", lambda config: "cuda")
    monkeypatch.setattr(
        tasks, "map_in_tasks", lambda function, units, address: map(function, units)
    )
    with pytest.raises(ConfigError, match="--device cuda is not available") as caught:
        add(store, "peaks", source="latents", model=PEAKS, address="auto", device="cuda")
    one_sentence(caught.value)
    assert not (store / "fields").exists()
    add(store, "peaks", source="latents", model=PEAKS, address="auto", device="auto")
    plan = load(Storage(str(store / "fields/peaks")))
    assert plan is not None
    assert plan.fingerprint["numeric"]["precision"] == "float32"

    run = {"source": str(store), "out": str(store), "device": "cuda", "address": "auto"}
    config = load_config(None, {**run, "with_fields": {"text": "t5:x@metadata.prompt"}})
    assert wanted_fields(config)[0].options["device"] == "cpu"


def test_the_latents(store: Path) -> None:
    summary = add(store, "peaks", source="latents", model=PEAKS, dtype="float32")
    base = open_store(str(store))
    for key, latent in values(store, "peaks").items():
        stored = base[key].latent.astype(np.float32)
        np.testing.assert_array_equal(latent, Peaks().embed([stored])[0])
    assert summary.info.model["hop"] == 2 * base.info.model["hop"]
    assert summary.info.model["sample_rate"] == base.info.model["sample_rate"]


def test_latents_in_a_bucket_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    url, count = f"memory://{uuid.uuid4().hex}", 40
    write_latents(url, [4] * count, per_unit=count)
    rounds = shard_rounds(monkeypatch, url)
    (commit,) = iter_commits(Storage(url))
    keys = [item.key for item in commit.items][::-1]
    found = values_of(Storage(url), "latents").read(commit, keys)
    for number, latent in enumerate(reversed(list(found))):
        assert np.array_equal(latent, latent_of(number, 4).astype(np.float32))
    assert 0 < len(rounds) < 10


@pytest.mark.parametrize("name", ["values.parquet", "values.jsonl", "values"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_file_of_values(store: Path, tmp_path: Path, name: str, tokens: bool) -> None:
    keys = list(open_store(str(store)).keys())
    rows: dict[str, Any] = {
        key: [[n + i / 4, 2.0, 3.0] for i in range(n + 1)] if tokens else [n / 4, 2.0, 3.0]
        for n, key in enumerate(keys[:3])
    }
    odd = {keys[3]: [[1.0, 2.0]] if tokens else [1.0, 2.0], "elsewhere/x": rows[keys[0]]}
    path = write_import(tmp_path / name, rows | odd)
    summary = add(store, "own", source=str(path), model=None)
    found = values(store, "own")
    assert found.keys() == rows.keys()
    for key, value in rows.items():
        np.testing.assert_array_equal(found[key], np.array(value).reshape(-1, 3).T)
    assert (summary.unknown, summary.unknown_keys) == (1, ("elsewhere/x",))
    assert "1 key of the file not in the store: elsewhere/x" in show.summary(summary)
    assert {key: why.partition(" in values")[2] for key, why in summary.skipped}.keys() == {
        *keys[3:]
    }
    assert summary.info.field is not None
    assert summary.info.field.kind == ("tokens" if tokens else "vector")
    assert behind(store) == 0
    rows[keys[1]] = rows[keys[0]]
    rows[keys[4]] = rows[keys[0]]
    write_import(path, rows | odd)
    again = add(store, "own", source=str(path), model=None)
    found = values(store, "own")
    np.testing.assert_array_equal(found[keys[1]], found[keys[0]])
    assert found.keys() == rows.keys()
    assert again.info.skipped == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "metadata:"}, ConfigError, "invalid --from 'metadata:'"),
        ({"source": "prompt"}, ConfigError, "invalid --from 'prompt': use metadata:NAME"),
        ({"model": None}, ConfigError, "--model is missing"),
        ({"model": PEAKS}, ConfigError, "takes latents: use --from latents"),
        ({"source": "latents"}, ConfigError, "takes text: use --from metadata:NAME"),
        ({"model": "mdct"}, LatentmillError, "encodes audio: leave out --from"),
        ({"per_window": True}, ConfigError, "--per-window is only for fields from audio"),
        ({"workers": 2}, ConfigError, "--workers is only for fields from audio"),
        ({"threads": 2}, ConfigError, "--threads is only for fields from audio"),
        ({"chunk_seconds": 2.0}, ConfigError, "--chunk-seconds is only for fields from audio"),
        ({"source": "no.parquet", "model": None}, LatentmillError, "Cannot import no.parquet"),
    ],
)
def test_wrong_options(
    store: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        add(store, **options)
    assert not (store / "fields").exists()


def test_a_field_keeps_its_source_and_model(store: Path) -> None:
    add(store)
    with pytest.raises(StoreError, match="from metadata:prompt"):
        add(store, source="metadata:text")
    with pytest.raises(StoreError, match="--model changed"):
        add(store, model="python:test_add_values:other")


class Other:
    spec = EmbedderSpec("other", "vector", "text", dimensions=5)

    def load(self, device: str) -> Other:
        del device
        return self


def other() -> Other:
    return Other()


def test_the_command(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--field=text", "--from=metadata:prompt", f"--model={VOWELS}", "--device=cpu"]
    out = runs.call(capsys, "add", store, *given, "--json")
    assert out.code == 0
    assert json.loads(out.out)["info"]["field"]["source"] == "metadata:prompt"
    status = runs.call(capsys, "status", store)
    assert "text" in status.out
    text = runs.call(capsys, "info", store / "fields/text").out
    assert "vectors of 5 numbers, float16" in text
    assert "Hz" not in text
    assert "chunk" not in text
    summary = show.summary(add(store, "again"))
    assert "this run: " in summary
    assert "Ray" not in summary
    assert "real time" not in summary


def reasons(store: Path, name: str) -> dict[str, str]:
    commits = iter_commits(Storage(str(store / "fields" / name)))
    return {e.key: e.reason or "" for c in commits for e in c.items if e.status == "failed"}


def test_codes_are_stored_exactly_or_fail(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EmbedderSpec("codes", "codes", "latents", dimensions=1)
    largest = 2049  # float16 has no such number
    model = given(
        monkeypatch,
        spec,
        lambda v: np.arange(largest, largest - v.shape[1], -1.0)[None].astype("f"),
    )
    keys = set(open_store(str(store)).keys())
    summary = add(store, "small", source="latents", model=model)
    assert summary.exit_code == 3
    failed = reasons(store, "small")
    assert failed.keys() == keys
    assert all("not exact in float16 (--dtype float32" in reason for reason in failed.values())
    add(store, "exact", source="latents", model=model, dtype="float32")
    assert all(latent[0, 0] == largest for latent in values(store, "exact").values())
    assert open_store(str(store / "fields/exact")).codes


@pytest.mark.parametrize("name", ["values.parquet", "values.jsonl"])
def test_imported_whole_numbers_are_exact_or_fail(store: Path, tmp_path: Path, name: str) -> None:
    one, two, three, four, _ = open_store(str(store)).keys()
    rows = {one: [2048, 5], two: [4097, 5], three: [70000, 5], four: [2**24 + 1, 5]}
    path = write_import(tmp_path / name, rows)
    add(store, "half", source=str(path), model=None)
    assert values(store, "half")[one][:, 0].tolist() == [2048, 5]
    assert reasons(store, "half").keys() == {two, three, four}
    assert all("--dtype float32" in reason for reason in reasons(store, "half").values())
    add(store, "single", source=str(path), model=None, dtype="float32")
    assert values(store, "single")[two][:, 0].tolist() == [4097, 5]
    assert values(store, "single")[three][:, 0].tolist() == [70000, 5]
    assert reasons(store, "single") == {four: "its whole numbers are not exact in float32"}


def test_a_value_that_the_model_cannot_take_fails_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(text: str) -> Any:
        return np.full((1, 1), 6 / len(text.replace("7", "")), np.float32)

    spec = EmbedderSpec("lengths", "vector", "text", 1, batch_size={"cpu": 16})
    summary = add(store, "lengths", model=given(monkeypatch, spec, embed))
    texts = {r.key: r.metadata.get("prompt") for r in open_store(str(store))}
    found = {key: latent[0, 0] for key, latent in values(store, "lengths").items()}
    assert sorted(found.values()) == [0.75, 1.2001953125]  # of "oud solo" and "a e i"
    failed = {key for key, text in texts.items() if text in ("", 7)}
    assert reasons(store, "lengths").keys() == failed
    assert all("ZeroDivisionError" in reason for reason in reasons(store, "lengths").values())
    assert summary.exit_code == 3
    assert not read_origin(Storage(str(store / "fields/lengths"))).any()
    assert default_batch_size(spec, "cuda:0") == 16
    wrong = given(monkeypatch, spec, lambda text: np.zeros((2, 1), np.float32))
    with pytest.raises(ModelError, match="correct the spec"):
        add(store, "wrong", model=wrong)


def test_a_field_without_any_value_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metadata named promtp\): use prompt\.$"):
        add(store, source="metadata:promtp")
    path = write_import(tmp_path / "values.parquet", {"x": [1.0], "y": [2.0]})
    with pytest.raises(ConfigError, match=r"No item of .* has a value in file:values.parquet"):
        add(store, source=str(path), model=None)
    assert not (store / "fields").exists()


def test_similar_names_are_found_without_reading_all_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata is 24 MB. A list has no column in the metadata file; a late name has one."""
    metadata: list[dict[str, Any]] = [{"tags": ["oud"], "prompt": "x" * 60_000}] * 400
    metadata[-1] = {"mood": "calm"}
    lengths = [1] * len(metadata)
    store = write_latents(str(tmp_path / "store"), lengths, metadata=metadata, per_unit=20)
    monkeypatch.setattr("latentmill.run.add_values.NAMED_RECORDS", 20)
    with pytest.raises(ConfigError, match=r"no metadata named tagz\): use tags\.$"):
        add(Path(store.url), source="metadata:tagz")
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"no metadata named modo\): use mood\.$"):
            add(Path(store.url), source="metadata:modo")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


def test_an_import_with_other_dimensions_says_so(store: Path, tmp_path: Path) -> None:
    key = next(iter(open_store(str(store)).keys()))
    path = write_import(tmp_path / "values.jsonl", {key: [1.0, 2.0]})
    add(store, "own", source=str(path), model=None)
    write_import(path, {key: [1.0, 2.0, 3.0]})
    with pytest.raises(StoreError, match=r"values of 2 numbers, but the first of .* has 3"):
        add(store, "own", source=str(path), model=None)


def test_imported_values_are_not_in_memory(tmp_path: Path) -> None:
    count, dimensions, keys = 20_000, 256, [f"album/{n}" for n in range(20_000)]
    made = np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(made.ravel()), dimensions)
    order = np.random.default_rng(1).permutation(count)  # not that of the store
    table = pa.table({"key": keys, "v": column.cast(pa.list_(pa.float32()))}).take(pa.array(order))
    pq.write_table(table, tmp_path / "v.parquet")
    tracemalloc.start()  # numpy's memory, too; Arrow's is that of a batch
    try:
        imported = ImportedValues(str(tmp_path / "v.parquet"), "own")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < made.nbytes / 4
    entries = [ItemEntry(key=key, status="skipped", reason="made up") for key in keys[:1500]]
    commit = Commit(
        unit="000000", fingerprint="", bytes=0, rows=0, audio_seconds=0, items=entries, timings={}
    )
    found = np.array([one[:, 0] for one in imported.read(commit, keys[:1500])])
    np.testing.assert_array_equal(found, made[:1500])
    assert imported.unknown(iter(keys[:-2]), 1) == (2, [keys[-2]])
    pq.write_table(pa.concat_tables([table, table[:1]]), tmp_path / "twice.parquet")
    with pytest.raises(LatentmillError, match=f"it has the key {keys[order[0]]} more than once"):
        ImportedValues(str(tmp_path / "twice.parquet"), "own")


def huge() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 2), }"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n"


@pytest.mark.parametrize("kind", ["nulls", "ragged", "text", "empty", "npz", "huge", "open"])
@pytest.mark.parametrize("place", [0, 1])
def test_one_wrong_value_is_skipped(store: Path, tmp_path: Path, kind: str, place: int) -> None:
    keys = list(open_store(str(store)).keys())[:2]
    wrong, right = keys[place], keys[1 - place]
    if kind == "nulls":
        rows: dict[str, Any] = {key: [[1.0, 2.0], None if key == wrong else [3, 4]] for key in keys}
        path = write_import(tmp_path / "V.PARQUET".lower(), rows).rename(tmp_path / "V.PARQUET")
    elif kind in ("ragged", "text"):
        bad = [1, [2]] if kind == "ragged" else "loud"
        path = write_import(tmp_path / "v.jsonl", {k: bad if k == wrong else [1, 2] for k in keys})
    else:
        path = write_import(tmp_path / "v", {key: [1.0, 2.0] for key in keys})
        file = path / f"{wrong}.npy"
        contents = {"huge": huge(), "open": b"\x93NUMPY\x01\x00\x01\x00("}
        file.write_bytes(contents.get(kind, b""))
        if kind == "npz":
            with file.open("wb") as handle:
                np.savez(handle, a=np.ones(2))
    summary = add(store, "own", source=str(path), model=None)
    assert values(store, "own").keys() == {right}
    assert "cannot be read" in dict(summary.skipped)[wrong]


@pytest.mark.parametrize("type_", [pa.float32(), pa.string(), pa.list_(pa.string())])
def test_a_column_without_lists_of_numbers_is_refused(
    store: Path, tmp_path: Path, type_: pa.DataType
) -> None:
    keys = list(open_store(str(store)).keys())
    column = pa.nulls(len(keys), type_)
    pq.write_table(pa.table({"key": keys, "v": column}), tmp_path / "v.parquet")
    with pytest.raises(LatentmillError, match=r"its column v is .* must be lists of numbers"):
        add(store, "own", source=str(tmp_path / "v.parquet"), model=None)


def test_large_lists_are_lists(store: Path, tmp_path: Path) -> None:
    key = next(iter(open_store(str(store)).keys()))
    column = pa.array([[[1.0, 2.0]]], pa.large_list(pa.large_list(pa.float32())))
    pq.write_table(pa.table({"key": [key], "v": column}), tmp_path / "v.parquet")
    add(store, "own", source=str(tmp_path / "v.parquet"), model=None)
    assert values(store, "own")[key].tolist() == [[1.0], [2.0]]
