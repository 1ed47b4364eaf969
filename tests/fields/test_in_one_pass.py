"""`encode --with`: a store and its fields in one pass, equal to `encode` and then `add`."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from latentmill.cli import show
from latentmill.config import load_config
from latentmill.encoding import loading
from latentmill.engine import worker
from latentmill.errors import ConfigError, ModelError
from latentmill.run.add import run_add
from latentmill.run.run import RunSummary
from latentmill.sources.reading import UnitReader
from latentmill.store.store import open_store
from support import runs
from support.in_process import encode, spoil
from support.tiny_encoders import write_clap, write_t5

SECOND = {
    "model": "mdct",
    "model_options": {"hop": 100, "sample_rate": 16000},
    "chunk_seconds": 0.3,
}
VECTOR = {"model": "python:support.vector_model:build", "dtype": "float32"}
FIELDS = {"second": SECOND, "v": VECTOR}
GIVEN = {"device": "cpu", "threads": 1}


def contents(store: Path, *, revisions: bool) -> dict[str, Any]:
    """Everything of a store and its fields that two ways to compute it must have in common."""
    found: dict[str, Any] = {}
    for root in (store, *sorted((store / "fields").iterdir())):
        runs.assert_whole(root)
        opened = open_store(str(root))
        name = "" if root == store else root.name
        for record in opened:
            found[name, record.key] = {
                **vars(record),
                "latent": record.latent.tobytes(),
                "_decode_start": None,
            }
        for unit, commit in opened.commits.items():
            entries = [entry.model_dump() for entry in commit.items]
            found[name, "commit", unit] = (commit.hash, entries, commit.statistics)
            found[name, "revision", unit] = commit.revision if revisions else None
        named = {"seal", "created", "shards", "base_seal"}  # have times in them
        named |= set() if revisions else {"revisions", "index", "index_hash"}
        seal = json.loads((root / "dataset.json").read_text())
        if root != store:
            assert seal["base_seal"] == json.loads((store / "dataset.json").read_text())["seal"]
        found[name, "seal"] = {key: value for key, value in seal.items() if key not in named}
        found[name, "origin"] = (root / "origin.npy").read_bytes()
    return found


def separately(songs: Path, store: Path, fields: Any = FIELDS, **options: Any) -> None:
    encode(songs, store, unit_seconds=3.0, **options)
    for name, given in fields.items():
        again = options.get("retry_failed")
        run_add(str(store), name, {**GIVEN, **given, "retry_failed": again})


def together(songs: Path, store: Path, fields: Any = FIELDS, **options: Any) -> RunSummary:
    return encode(songs, store, unit_seconds=3.0, with_fields=fields, **options)


def assert_equal(one: Path, other: Path, *, revisions: bool = True) -> None:
    """Without `revisions`, also if units were written again."""
    a, b = (contents(store, revisions=revisions) for store in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key], key


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLAP and T5 with small random weights."""
    root = tmp_path_factory.mktemp("encoders")
    write_clap(root / "clap")
    write_t5(root / "t5")
    return root


def test_one_pass_equals_encode_and_add(
    songs: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autoencoder of another rate, an audio encoder and a text encoder; stereo and mono files.

    Each recording is opened once.
    """
    for number, path in enumerate(sorted(songs.rglob("*.wav"))):
        path.with_suffix(".json").write_text(json.dumps({"prompt": f"song {number}"}))
    stereo = np.random.default_rng(1).uniform(-0.2, 0.2, (30_000, 2))
    soundfile.write(songs / "stereo.wav", stereo, 48_000)
    clap, text = f"clap:{encoders}/clap", f"t5:{encoders}/t5"
    encode(songs, tmp_path / "two", unit_seconds=3.0)
    run_add(str(tmp_path / "two"), "second", {**GIVEN, **SECOND})
    run_add(str(tmp_path / "two"), "clap", {"device": "cpu", "threads": 1, "model": clap})
    options = {"device": "cpu", "model": text}
    run_add(str(tmp_path / "two"), "text", options, source="metadata:prompt")
    opened: Counter[str] = Counter()
    real = loading.open_audio

    def counted(media: Any, **options: Any) -> Any:
        opened[media.content_hash] += 1
        return real(media, **options)

    monkeypatch.setattr(loading, "open_audio", counted)
    fields = {"text": f"{text}@metadata.prompt", "second": SECOND, "clap": clap}
    summary = together(songs, tmp_path / "one", fields)
    assert sorted(opened.values()) == [1] * 6
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert summary.exit_code == 0
    assert list(summary.fields) == ["text", "second", "clap"]
    assert [one.info.encoded for one in summary.fields.values()] == [5, 6, 6]
    assert summary.fields["clap"].resumed_units == 0
    again = encode(songs, tmp_path / "one", unit_seconds=3.0)
    assert not again.fields  # as without fields, if none are asked for
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_items_that_the_store_lacks(songs: Path, tmp_path: Path) -> None:
    """The fields skip them as `add` does; no unit is written twice."""
    paths = sorted(songs.rglob("*.wav"))
    spoil(paths[1])
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    for way in (separately, together):
        way(songs, tmp_path / way.__name__, max_seconds=1.08)
    assert_equal(tmp_path / "together", tmp_path / "separately")
    field = open_store(str(tmp_path / "together/fields/second"))
    reasons = {one.key: one.reason or "" for c in field.commits.values() for one in c.items}
    assert reasons["album 0/song 03"].startswith("failed in the base store: ")
    assert reasons["album 1/song 01"].startswith("failed in the base store: truncated")
    assert "skipped in the base store: max_seconds: 1.090 s" in reasons.values()
    assert {commit.revision for commit in field.commits.values()} == {0}


def test_add_opens_no_item_that_the_store_lacks(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may be what has killed a worker of the store: not even its header is read."""
    path = sorted(songs.rglob("*.wav"))[1]
    spoil(path)
    encode(songs, tmp_path / "lacking", unit_seconds=3.0)
    opened: list[str] = []
    probed, real = worker.probed, UnitReader.open

    def noted(items: Any) -> Any:
        opened.extend(item.key for item in items)
        return probed(items)

    def read(self: UnitReader, item: Any) -> Any:
        opened.append(item.key)
        return real(self, item)

    monkeypatch.setattr(worker, "probed", noted)
    monkeypatch.setattr(UnitReader, "open", read)
    run_add(str(tmp_path / "lacking"), "v", {**GIVEN, **VECTOR})
    assert opened
    assert path.stem not in " ".join(opened)


@pytest.mark.parametrize("picky", ["store", "field"])
def test_an_item_that_one_model_cannot_encode(songs: Path, tmp_path: Path, picky: str) -> None:
    """If the store lacks it, so do the fields; a field that lacks it costs the others nothing."""
    loud = sorted(songs.rglob("*.wav"))[2]
    soundfile.write(loud, np.tile([0.95, -0.95], 22_050), 44_100, subtype="FLOAT")
    model = {"model": "python:support.picky_model:build", "model_options": {}}
    fields = {**FIELDS, "picky": model} if picky == "field" else FIELDS
    options = model if picky == "store" else {}
    separately(songs, tmp_path / "two", fields, **options)
    summary = together(songs, tmp_path / "one", fields, **options)
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert summary.exit_code == 3
    failed = {name: one.info.failed for name, one in summary.fields.items()}
    assert failed == ({"second": 0, "v": 0} | ({"picky": 1} if picky == "field" else {}))
    field = open_store(str(tmp_path / "one/fields/second"))
    assert {commit.revision for commit in field.commits.values()} == {0}
    text = show.summary(summary)
    assert "field v: " in text
    assert "the latents have NaN" in text


def test_a_run_that_fails_in_the_middle_is_resumed(songs: Path, tmp_path: Path) -> None:
    """If the store's model fails, nothing of the unit is half-written."""
    options = {"trouble": "cuda", "mark": str(tmp_path / "mark")}
    base = {"model": "python:support.troubled_model:build", "model_options": options}
    before = threading.active_count()
    with pytest.raises(torch.AcceleratorError):
        together(songs, tmp_path / "one", **base)
    assert threading.active_count() <= before
    for root in (tmp_path / "one", *(tmp_path / "one/fields").iterdir()):
        assert not list(root.glob("tmp/*"))
        assert not list(root.glob("commits/*"))
    together(songs, tmp_path / "one", **base)
    separately(songs, tmp_path / "two", **base)
    assert_equal(tmp_path / "one", tmp_path / "two", revisions=False)


def test_a_field_that_fails_costs_the_store_nothing(
    songs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A field's unit that fails is left to `add`."""
    options = {"mark": str(tmp_path / "mark")}
    troubled = {"model": "python:support.failing_model:build", "model_options": options}
    fields = {"troubled": troubled, **FIELDS}
    together(songs, tmp_path / "one", fields)
    assert "is computed again when the store is complete: ModelError: This model" in caplog.text
    separately(songs, tmp_path / "two", fields)
    assert_equal(tmp_path / "one", tmp_path / "two", revisions=False)
    revisions = {
        name: {
            commit.revision
            for commit in open_store(f"{tmp_path}/one/fields/{name}").commits.values()
        }
        for name in FIELDS
    }
    assert revisions == {"second": {0}, "v": {0}}  # not disturbed


def test_a_field_that_makes_the_device_unusable(songs: Path, tmp_path: Path) -> None:
    """The worker must be replaced, but the store has the unit."""
    options = {"trouble": "cuda", "mark": str(tmp_path / "mark")}
    troubled = {"model": "python:support.troubled_model:build", "model_options": options}
    with pytest.raises(torch.AcceleratorError):
        together(songs, tmp_path / "one", {"troubled": troubled, **FIELDS})
    done = [len(list((tmp_path / "one" / at / "commits").glob("*"))) for at in ("", "fields/v")]
    assert done == [1, 1]
    assert not list((tmp_path / "one/fields/troubled/commits").glob("*"))


def test_a_field_that_always_fails_is_reported_after_the_others(
    songs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"bad": {"model": "python:support.failing_model:build"}, **FIELDS}
    with pytest.raises(ModelError, match="This model never works"):
        together(songs, tmp_path / "one", fields)
    assert "is complete, but not its fields: bad" in caplog.text
    for root in ("one", "one/fields/second", "one/fields/v"):
        runs.assert_whole(tmp_path / root)
    assert not (tmp_path / "one/fields/bad/dataset.json").exists()


def test_what_has_just_failed_is_not_retried(songs: Path, tmp_path: Path) -> None:
    loud = sorted(songs.rglob("*.wav"))[2]
    soundfile.write(loud, np.tile([0.95, -0.95], 22_050), 44_100, subtype="FLOAT")
    fields = {"picky": {"model": "python:support.picky_model:build"}}
    together(songs, tmp_path / "one", fields, retry_failed=True)
    commits = open_store(f"{tmp_path}/one/fields/picky").commits.values()
    assert {commit.revision for commit in commits} == {0}


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_is_killed_between_commits_is_resumed(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Units that the store has and a field lacks are computed by the `add` after the pass."""
    real, left = worker.write_commit, [after]

    def killed(*args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker, "write_commit", killed)
        together(songs, tmp_path / "one")
    together(songs, tmp_path / "one")
    separately(songs, tmp_path / "two")
    assert_equal(tmp_path / "one", tmp_path / "two", revisions=False)


def test_an_extension_and_repaired_files(tmp_path: Path) -> None:
    """New units are computed in the pass, units that the fields have by `add`."""
    for way in (separately, together):
        songs, store = tmp_path / f"songs {way.__name__}", tmp_path / way.__name__
        path = sorted(runs.write_songs(songs, 5).rglob("*.wav"))[1]
        audio = path.read_bytes()
        spoil(path)
        way(songs, store)
        runs.write_songs(songs, 3, first=10)
        path.write_bytes(audio)
        way(songs, store, extend=True, retry_failed=True)
    a, b = (latents_of(tmp_path / way) for way in ("separately", "together"))
    assert a == b
    assert len(a["second"]) == 8


def test_a_unit_of_which_the_store_keeps_a_record(songs: Path, tmp_path: Path) -> None:
    """The fields fail where the store keeps its record: they have none, and the file is gone."""
    stores = {way: tmp_path / way.__name__ for way in (separately, together)}
    for store in stores.values():
        encode(songs, store, unit_seconds=3.0)
    before = runs.latents(tmp_path / "together")
    gone, changed = sorted(songs.rglob("*.wav"))[:2]
    gone.unlink()
    spoil(changed)
    for way, store in stores.items():
        way(songs, store, extend=True, retry_changed=True)
    assert_equal(tmp_path / "together", tmp_path / "separately")
    assert runs.latents(tmp_path / "together") == before
    field = open_store(str(tmp_path / "together/fields/second"))
    failed = [one for c in field.commits.values() for one in c.items if one.status == "failed"]
    assert len(failed) == 2
    assert not any("base store" in (one.reason or "") for one in failed)


def latents_of(store: Path) -> dict[str, dict[str, bytes]]:
    roots = [store, *sorted((store / "fields").iterdir())]
    return {root.name if root != store else "": runs.latents(root) for root in roots}


BAD = {
    "no model": (["--with", "x"], "invalid --with 'x': expected NAME=MODEL"),
    "twice": (["--with", "x=mdct", "--with", "x=mdct"], "expected each field once"),
    "no name": (["--with", "=mdct"], "invalid field name ''"),
    "a path": (["--with", "../x=mdct"], "invalid field name '../x'"),
    "empty": (["--with", "x="], "Field x of --with has no model"),
    "unknown": (["--with", "x=nothing"], "nothing"),
    "a text for audio": (["--with", "x=mdct@metadata.prompt"], "mdct"),
    "load tasks": (["--with", "x=mdct", "--load-tasks", "2"], "--load-tasks does not load"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_refused_before_anything_is_written(
    songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    args, says = BAD[kind]
    result = runs.call(capsys, "encode", songs, tmp_path / "store", "--device", "cpu", *args)
    assert result.code in (2, 7), result.err
    assert says in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_mistyped_name_of_a_text_is_reported_at_once(
    songs: Path, encoders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in songs.rglob("*.wav"):
        path.with_suffix(".json").write_text(json.dumps({"prompt": "x"}))
    t5 = f"t5:{encoders}/t5"
    fields = {"text": f"{t5}@metadata.promt", "right": f"{t5}@metadata:prompt"}
    with pytest.raises(ConfigError, match="use prompt"):
        together(songs, tmp_path / "one", fields)
    warned = [one.getMessage() for one in caplog.records if "first items" in one.getMessage()]
    assert warned == ["field text: none of the first items has metadata promt (they have: prompt)"]
    for root in ("one", "one/fields/right"):
        runs.assert_whole(tmp_path / root)


def test_settings_that_a_field_does_not_have(songs: Path, tmp_path: Path) -> None:
    for field, says in (
        ({"model": "mdct", "format": "parquet"}, "format is not a setting of a field"),
        ({"model": "mdct", "per_window": True}, "per-window has no effect"),
        ({"model": "mdct", "dtype": "int8"}, "dtype"),
        ({"model": "mdct", "model_options": {"hub_token": "x"}}, "looks like a secret"),
    ):
        with pytest.raises(ConfigError, match=says):
            together(songs, tmp_path / "store", {"x": field})
    assert not (tmp_path / "store").exists()


def test_a_config_file_in_a_store_names_no_code(songs: Path, tmp_path: Path) -> None:
    encode(songs, tmp_path / "store", unit_seconds=3.0)
    for value in ("python:support.vector_model:build", {"model": "python:a:b"}):
        config = tmp_path / "store" / "run.yaml"
        config.write_text(json.dumps({"with_fields": {"v": value}}))
        given = {"source": str(songs), "out": str(tmp_path / "other")}
        with pytest.raises(ModelError, match="trust"):
            load_config(config, given)
        load_config(config, {**given, "with_fields": {"v": "mdct"}})
        load_config(config, given, trust_model=True)


def test_the_command(songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("encode", songs, tmp_path / "store", "--device", "cpu", "--threads", 1)
    result = runs.call(capsys, *args, "--with", "second=mdct", "--json")
    assert result.code == 0, result.err
    fields: Any = runs.outcome(result)["fields"]
    assert fields["second"]["info"]["field"]["name"] == "second"
    assert "in the same pass: second" in result.err
    result = runs.call(capsys, *args, "--with", "second=mdct")
    assert "field second: 5 encoded, 0 skipped, 0 failed of 5 items" in result.out
