"""Tars and Parquet files that are rewritten after planning: no item gets the audio of another."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from latentmill.cli import show
from latentmill.plan.probe import probed
from latentmill.record import Record
from latentmill.run.run import RunSummary
from latentmill.sources.base import Item
from latentmill.sources.webdataset import WebDatasetSource
from latentmill.store.store import open_store
from support import in_process, runs
from support.fields import added
from support.sources import put, tar_of

pytestmark = pytest.mark.usefixtures("inline")

Audio = Mapping[str, bytes]


def wav(samples: int) -> bytes:
    """Noise of its own for each length."""
    noise = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
    target = io.BytesIO()
    soundfile.write(target, noise, 44100, format="WAV", subtype="PCM_16")
    return target.getvalue()


ONE, TWO = wav(6000), wav(7000)
BAD = bytes(len(ONE))  # so that "one" fits where it was


class Container:
    """A tar or a Parquet file, and a store of its items in one unit."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.store = kind, folder / "store"
        self._path = folder / ("pack.tar" if kind == "tar" else "pack.parquet")

    def write(self, audio: Audio) -> None:
        if self.kind == "tar":
            titles = {name: json.dumps({"title": f"title of {name}"}).encode() for name in audio}
            pairs = ([(f"{n}.wav", audio[n]), (f"{n}.json", titles[n])] for n in audio)
            put(str(self._path), tar_of([member for pair in pairs for member in pair]))
            return
        columns = {
            "audio": [{"bytes": data, "path": None} for data in audio.values()],
            "name": [f"pack/{name}" for name in audio],
            "title": [f"title of {name}" for name in audio],
        }
        pq.write_table(pa.table(columns), self._path)

    def encode(self, **options: Any) -> RunSummary:
        if self.kind == "parquet":
            options |= {"key_column": "name"}
        return in_process.encode(self._path, self.store, unit_seconds=60.0, **options)


@pytest.fixture(params=["tar", "parquet"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Container:
    return Container(request.param, tmp_path)


def records(store: Path) -> dict[str, Record]:
    return {record.key: record for record in open_store(str(store))}


def assert_right(store: Path, audio: Audio, folder: Path) -> None:
    """The records of a store are those of the recordings as plain files."""
    for name, data in audio.items():
        put(f"{folder}/songs/pack/{name}.wav", data)
    in_process.encode(folder / "songs", folder / "plain")
    wanted, found = records(folder / "plain"), records(store)
    assert found.keys() == wanted.keys()
    for key, record in found.items():
        assert record.content_hash == wanted[key].content_hash
        np.testing.assert_allclose(record.latent, wanted[key].latent, atol=2e-3)


@pytest.mark.parametrize("repaired", [False, True], ids=["removed", "repaired"])
def test_failed_items_of_a_rewritten_file_are_encoded_after_it_is_listed_again(
    container: Container, repaired: bool, tmp_path: Path
) -> None:
    container.write({"bad": BAD, "one": ONE, "two": TWO})
    assert [key for key, _ in container.encode().failures] == ["pack/bad"]
    before = records(container.store)
    audio = {"one": ONE, "two": TWO}
    container.write({"bad": wav(9000), **audio} if repaired else audio)

    refused = container.encode(retry_failed=True)
    hint = "`encode --extend --retry-changed` lists it again"
    hint += " (items that were removed from it stay as they are)"
    kind = "tar" if container.kind == "tar" else "table"
    reason = f"its {kind} has changed since it was listed: {hint}"
    assert refused.failures == (("pack/bad", reason),)
    assert dict(refused.kept) == dict.fromkeys(["pack/one", "pack/two"], reason)
    assert "fix these files, then rerun with --retry-failed\n" in show.summary(refused) + "\n"
    for key, record in records(container.store).items():
        assert record.latent.tobytes() == before[key].latent.tobytes()
        assert replace(record, latent=before[key].latent) == before[key]

    done = container.encode(extend=True, retry_changed=True)
    assert done.extension is not None
    assert (done.extension.changed, done.extension.vanished) == ((3, 0) if repaired else (2, 1))
    assert done.kept == ()
    assert done.failures == (() if repaired else (("pack/bad", reason),))
    assert_right(container.store, {**audio, "bad": wav(9000)} if repaired else audio, tmp_path)
    for key, record in records(container.store).items():
        assert record.metadata["title"] == f"title of {key.removeprefix('pack/')}"
    runs.assert_whole(container.store)


def test_a_field_gets_no_audio_of_another_item(container: Container, tmp_path: Path) -> None:
    container.write({"first": wav(6000), "one": wav(6002), "two": TWO})
    container.encode()
    audio = {"one": wav(6002), "two": TWO}
    container.write(audio)
    failures = added(container.store, retry_failed=True).failures
    assert [key for key, _ in failures] == ["pack/first", "pack/one", "pack/two"]
    assert all("--extend --retry-changed" in reason for _, reason in failures)
    container.encode(extend=True, retry_changed=True)
    added(container.store)
    found = records(container.store / "fields" / "second")
    for name, data in audio.items():
        frames = soundfile.info(io.BytesIO(data)).frames
        assert found[f"pack/{name}"].duration == pytest.approx(frames / 44100, abs=1 / 16000)


def test_headers_are_those_of_the_items_that_were_listed(tmp_path: Path, s3_bucket: str) -> None:
    """Of a long remote member, only the ends are read."""
    for folder in (str(tmp_path), s3_bucket):
        short, long = wav(4000), wav(400_000)

        def listed(members: list[tuple[str, bytes]], url: str = f"{folder}/x.tar") -> list[Item]:
            return list(WebDatasetSource(put(url, tar_of(members)), ("wav",)).items())

        items = listed([("a.wav", short), ("b.wav", long)])
        assert [item.seconds for item in probed(items)] == [4000 / 44100, 400_000 / 44100]
        listed([("b.wav", long), ("a.wav", short)])
        assert [item.seconds for item in probed(items)] == [None, None]
