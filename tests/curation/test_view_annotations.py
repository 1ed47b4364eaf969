"""Values of the bases and of the user on a view that is written again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.store.verify import verify
from support.in_process import encode, in_process
from support.latent_store import write_latents

OPTIONS: dict[str, Any] = {
    "model": "mdct",
    "model_options": {"hop": 64, "sample_rate": 22050},
    "device": "cpu",
}


def write_song(folder: Path, key: str, caption: str, samples: int | None = None) -> None:
    (folder / f"{key}.json").write_text(json.dumps({"caption": caption}))
    os.utime(folder / f"{key}.json", (len(caption), len(caption)))  # another caption, another time
    if samples is not None:
        audio = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
        soundfile.write(folder / f"{key}.wav", audio, 22050)


def annotate(url: str, values: dict[str, dict[str, Any]]) -> None:
    file = Path(f"{url}.jsonl")
    file.write_text("\n".join(json.dumps({"key": key, **own}) for key, own in values.items()))
    lm.annotate(url, file)


def metadata_of(url: str) -> dict[str, dict[str, Any]]:
    store = lm.open(url)
    assert verify(store).faults == []
    table = store.table(["key", "metadata"]).to_pylist()
    found = {record.key: dict(record.metadata) for record in store}
    assert {row["key"]: json.loads(row["metadata"]) for row in table} == found
    return found


def test_a_recording_that_was_replaced_has_its_new_caption(tmp_path: Path) -> None:
    songs, base, view = tmp_path / "songs", str(tmp_path / "base"), str(tmp_path / "view")
    songs.mkdir()
    for number, key in enumerate("xy"):
        write_song(songs, key, f"first {key}", 4000 + number)
    again = {**OPTIONS, "extend": True, "retry_changed": True, "refresh_metadata": True}
    with in_process():
        encode(songs, base, **OPTIONS)
        write_song(songs, "x", "corrected x")
        encode(songs, base, **again)
        lm.select(base, view)
        assert metadata_of(view)["x"] == {"caption": "corrected x"}
        annotate(view, {"x": {"mood": "calm"}, "y": {"caption": "my own"}})
        write_song(songs, "x", "x, another take", 5000)
        encode(songs, base, **again)
        lm.select(base, view, overwrite=True)
    assert metadata_of(base)["x"] == {"caption": "x, another take"}
    assert metadata_of(view) == {
        "x": {"caption": "x, another take", "mood": "calm"},
        "y": {"caption": "my own"},
    }


def test_deleted_versions_do_not_tell_what_came_from_a_base(tmp_path: Path) -> None:
    base = write_latents(str(tmp_path / "base"), [5], metadata=[{"n": 0}]).url
    (key,) = lm.open(base).keys()
    view = lm.select(base, tmp_path / "view").dest
    for mood in ("calm", "wild"):
        annotate(base, {key: {"mood": mood}})
        lm.select(base, view, overwrite=True)
    (tmp_path / "view" / "annotations" / "0001.parquet").unlink()
    lm.annotate(base, remove=["mood"])
    lm.select(base, view, overwrite=True)
    assert metadata_of(view) == {key: {"n": 0, "mood": "wild"}}


def test_what_a_base_no_longer_has_is_not_on_the_view(tmp_path: Path) -> None:
    base = write_latents(str(tmp_path / "base"), [5] * 3, metadata=[{"n": n} for n in range(3)]).url
    first, second, _ = lm.open(base).keys()
    annotate(base, {first: {"tag": 1, "mood": "calm"}, second: {"tag": [2]}})
    view = lm.merge([base], tmp_path / "view", prefix=True).dest
    annotate(view, {f"base/{second}": {"mood": "wild", "level": 3}})
    for _ in range(2):  # a version without new values
        lm.merge([base], view, prefix=True)
    lm.annotate(base, remove=["tag"])
    with pytest.raises(ConfigError, match="other metadata for some of its records"):
        lm.merge([base], view, prefix=True)
    lm.merge([base], view, prefix=True, overwrite=True)
    expected = {
        f"base/{first}": {"n": 0, "mood": "calm"},
        f"base/{second}": {"n": 1, "mood": "wild", "level": 3},
        "base/item/00002": {"n": 2},
    }
    assert metadata_of(view) == expected
    annotate(base, {second: {"level": 4.5}})
    lm.merge([base], view, prefix=True, overwrite=True)
    expected[f"base/{second}"]["level"] = 4.5
    assert metadata_of(view) == expected
    lm.annotate(base, remove=["level"])  # the base has replaced the user's value
    lm.merge([base], view, prefix=True, overwrite=True)
    del expected[f"base/{second}"]["level"]
    assert metadata_of(view) == expected


def test_a_view_that_is_written_again_without_changes_has_no_new_version(tmp_path: Path) -> None:
    base = write_latents(str(tmp_path / "base"), [5] * 2, metadata=[{"n": n} for n in range(2)]).url
    first, second = lm.open(base).keys()
    annotate(base, {first: {"mood": "calm"}})
    view = lm.select(base, tmp_path / "view").dest
    annotate(view, {second: {"mood": "wild"}})
    files = sorted(path.name for path in Path(view, "annotations").iterdir())
    entry = lm.open(view).info.annotation
    for _ in range(3):
        lm.select(base, view, overwrite=True)
        assert lm.open(view).info.annotation == entry
    assert sorted(path.name for path in Path(view, "annotations").iterdir()) == files
    annotate(base, {first: {"mood": "loud"}})
    lm.select(base, view, overwrite=True)
    changed = lm.open(view).info.annotation
    assert entry is not None
    assert changed is not None
    assert changed.version == entry.version + 1
    assert metadata_of(view) == {first: {"n": 0, "mood": "loud"}, second: {"n": 1, "mood": "wild"}}
