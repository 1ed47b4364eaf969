"""`--refresh-metadata`: changed sidecars and manifest columns reach a store without encoding."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.cli import show
from latentmill.curation import refresh
from latentmill.plan import load
from latentmill.run.run import RunSummary
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.in_process import in_process
from support.runs import call

Values = dict[str, dict[str, Any]]


def sound(path: Path, samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
    soundfile.write(path, noise, 8000, subtype="PCM_16")


def encode(source: Path, store: Path, **options: Any) -> RunSummary:
    with in_process():
        return lm.encode(
            source,
            store,
            unit_seconds=0.1,
            device="cpu",
            model_options={"sample_rate": 8000, "hop": 64},
            **options,
        )


def update(source: Path, store: Path, **options: Any) -> RunSummary:
    return encode(source, store, extend=True, refresh_metadata=True, **options)


def metadata(store: Path) -> Values:
    """What readers see, by key; the metadata file has the same."""
    opened = LatentStore(str(store))
    found = {record.key: dict(record.metadata) for record in opened}
    table = opened.table(["key", "metadata"]).to_pylist()
    assert {row["key"]: json.loads(row["metadata"]) for row in table} == found
    assert verify(opened).faults == []
    return found


def shards(store: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in ("shards", "commits")
        for path in (store / folder).iterdir()
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(4):
        sound(tmp_path / f"corpus/{number}.wav", 500 + number)
    (tmp_path / "corpus/0.txt").write_text("first")
    (tmp_path / "corpus/1.json").write_text('{"bpm": 90, "tags": ["a"]}')
    return tmp_path / "corpus"


def test_captions_reach_the_store(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    before = shards(store)
    (corpus / "0.txt").write_text("second")
    (corpus / "1.json").write_text('{"bpm": 91.5, "tags": ["a", "b"], "key": "C", "a.b": 1}')
    (corpus / "2.txt").write_text("new")
    unchanged = encode(corpus, store, extend=True, retry_changed=True)
    assert unchanged.refreshed is None
    assert "--refresh-metadata updates the store" in show.summary(unchanged)
    assert metadata(store)["0"] == {"text": "first"}
    done = update(corpus, store)
    assert metadata(store) == {
        "0": {"text": "second"},
        "1": {"bpm": 91.5, "tags": ["a", "b"]},
        "2": {"text": "new"},
        "3": {},
    }
    assert shards(store) == before
    assert done.refreshed == refresh.RefreshSummary(3, 4, 1, ignored=("a.b", "key"))
    assert done.info.annotation is not None
    assert done.info.annotation.refreshed == [1]
    assert "metadata updated: 4 values of 3 records (annotations version 1)" in show.summary(done)
    again = update(corpus, store)
    assert again.extension is not None
    assert again.extension.described == 0
    assert again.refreshed == refresh.RefreshSummary()
    assert LatentStore(str(store)).info == done.info
    same = ["--model-option=hop=64", "--model-option=sample_rate=8000", "--device=cpu"]
    options = [*same, "--unit-seconds=0.1", "--extend", "--refresh-metadata", "--json"]
    out = call(capsys, "encode", corpus, store, *options)
    assert json.loads(out.out)["refreshed"]["records"] == 0


def test_what_annotate_has_set_wins(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"key": "0", "text": "mine"}) + "\n")
    lm.annotate(store, rows)
    for caption in ("second", "third"):
        (corpus / "0.txt").write_text(caption)
        (corpus / "1.json").write_text(json.dumps({"bpm": 91, "tags": [caption]}))
        done = update(corpus, store)
        assert done.refreshed is not None
        assert done.refreshed.kept == 1
        assert "1 value set by annotate and not updated" in show.summary(done)
        assert metadata(store)["0"] == {"text": "mine"}
        assert metadata(store)["1"] == {"bpm": 91, "tags": [caption]}
    rows.write_text(json.dumps({"key": "1", "tags": ["mine"]}) + "\n")
    lm.annotate(store, rows)
    (corpus / "1.json").write_text('{"bpm": 92, "tags": ["fourth"]}')
    update(corpus, store)
    assert metadata(store)["1"] == {"bpm": 92, "tags": ["mine"]}
    lm.revert_annotations(store, 1)
    assert metadata(store)["1"] == {"bpm": 90, "tags": ["a"]}


def test_an_unreadable_sidecar_is_reported_and_read_later(corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    (corpus / "0.txt").write_text("second")
    (corpus / "1.json").write_text("{")
    done = update(corpus, store)
    assert done.refreshed is not None
    assert (done.refreshed.records, done.refreshed.unreadable) == (1, 1)
    assert "metadata not read: 1: sidecar 1.json is not valid JSON" in show.summary(done)
    assert metadata(store)["1"] == {"bpm": 90, "tags": ["a"]}
    (corpus / "1.json").write_text('{"bpm": 91, "tags": ["a"]}')
    assert update(corpus, store).refreshed == refresh.RefreshSummary(1, 1, 2)
    assert metadata(store)["1"] == {"bpm": 91, "tags": ["a"]}


def test_columns_of_a_manifest(corpus: Path, tmp_path: Path) -> None:
    manifest, store = corpus / "list.csv", tmp_path / "store"

    def write(rows: list[dict[str, Any]]) -> None:
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "mood", "bpm"])
            writer.writeheader()
            writer.writerows(rows)

    write([{"path": "2.wav", "mood": "calm", "bpm": 1}, {"path": "3.wav", "mood": "sad"}])
    encode(manifest, store)
    stored = load(Storage(str(store)))
    write([{"path": "2.wav", "mood": "loud", "bpm": 1}, {"path": "3.wav", "bpm": 7}])
    done = update(manifest, store)
    assert done.refreshed == refresh.RefreshSummary(2, 2, 1, removed=1)
    found = metadata(store)
    assert [found[key]["mood"] for key in sorted(found)] == ["loud", "sad"]
    assert [found[key]["bpm"] for key in sorted(found)] == [1, 7]
    plan = load(Storage(str(store)))
    assert stored is not None
    assert plan is not None
    assert [unit.hash for unit in plan.units] == [unit.hash for unit in stored.units]


def test_a_run_that_ends_before_the_plan_is_written_is_repeated(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    (corpus / "0.txt").write_text("second")
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "amend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            update(corpus, store)
    assert metadata(store)["0"] == {"text": "second"}
    done = update(corpus, store)
    assert done.extension is not None
    assert done.extension.described == 1
    assert done.refreshed == refresh.RefreshSummary()
    assert (store / "annotations").exists()
    assert len(list((store / "annotations").iterdir())) == 1
    assert encode(corpus, store, extend=True).extension.described == 0  # type: ignore[union-attr]


def test_an_item_that_is_encoded_again_has_the_metadata_of_its_source(
    corpus: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    encode(corpus, store)
    (corpus / "0.txt").write_text("second")
    update(corpus, store)
    (corpus / "0.txt").write_text("third")
    sound(corpus / "0.wav", 400)
    done = encode(corpus, store, extend=True, retry_changed=True)
    assert done.refreshed is None
    assert metadata(store)["0"] == {"text": "third"}
    assert LatentStore(str(store))["0"].num_samples == 400


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))]
)
def test_random_changes_give_what_a_dict_has(tmp_path: Path, seed: int) -> None:
    """The model: a value is that of annotate, else the source's as it was when it was refreshed."""
    rng = random.Random(seed)
    corpus, store, rows = tmp_path / "corpus", tmp_path / "store", tmp_path / "rows.jsonl"
    keys, names = [f"k{n}" for n in range(5)], ["text", "bpm", "tags"]
    source: Values = {}
    annotated: Values = defaultdict(dict)
    counter = iter(range(10**6))

    def value(name: str) -> Any:
        number = next(counter)
        return {"text": f"caption {number}", "bpm": number + 0.5, "tags": [number]}[name]

    def write(key: str) -> None:
        source[key] = {name: value(name) for name in rng.sample(names, rng.randint(1, 3))}
        (corpus / f"{key}.json").write_text(json.dumps(source[key]))

    for number, key in enumerate(keys):
        sound(corpus / f"{key}.wav", 300 + number)
        write(key)
    encode(corpus, store)
    visible = {key: dict(values) for key, values in source.items()}
    for step in range(10):
        what = rng.choice(["annotate", "edit", "refresh", "retry"])
        some = rng.sample(keys, 2)
        if what == "annotate":
            new = {key: {(name := rng.choice(names)): value(name)} for key in some}
            rows.write_text("".join(json.dumps({"key": k, **v}) + "\n" for k, v in new.items()))
            lm.annotate(store, rows)
            for key, values in new.items():
                annotated[key] |= values
                visible[key] |= values
        elif what == "edit":
            for key in some:
                write(key)
        elif what == "refresh":
            update(corpus, store)
            for key in keys:
                visible[key] |= source[key] | annotated[key]
        else:  # its unit is encoded again, with all items in it
            sound(corpus / f"{some[0]}.wav", 400 + step)
            encode(corpus, store, extend=True, retry_changed=True)
            for commit in LatentStore(str(store)).commits.values():
                unit = [entry.key for entry in commit.items]
                for key in unit if some[0] in unit else ():
                    visible[key] = source[key] | annotated[key]
        assert metadata(store) == visible
