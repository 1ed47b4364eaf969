"""Decoding and resuming a store after the model's package or repository has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentmill.cli import show
from latentmill.errors import ModelError, StoreError
from latentmill.record import FloatArray
from latentmill.store.store import LatentStore
from support import hub_model, runs
from support.hub_model import NEW, OLD
from support.in_process import encode, in_process

KEY = "album 0/song 00"
MODEL: dict[str, Any] = {"model": "python:support.hub_model:build", "model_options": {}}


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 1)


@pytest.fixture(scope="module")
def store(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was encoded before anything changed."""
    root = tmp_path_factory.mktemp("changed") / "store"
    with in_process():
        encode(songs, root, **MODEL)
    return root


@pytest.fixture
def audio(store: Path) -> FloatArray:
    """What it decoded to then."""
    return decoded(store)


@pytest.fixture(autouse=True)
def now() -> Iterator[dict[str, str]]:
    before = dict(hub_model.now)
    yield hub_model.now
    hub_model.now.update(before)


def decoded(store: Path, **options: Any) -> FloatArray:
    return LatentStore(store, device="cpu", trust_model=True, model_options=options).decode(KEY)


def test_another_version_of_the_package_decodes_with_one_warning(
    store: Path, audio: FloatArray, now: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    now["package_version"] = "4.57.2"
    opened = LatentStore(store, device="cpu", trust_model=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(opened.decode(KEY), audio)
    (text,) = caplog.messages
    assert text == (
        f"{store} was encoded with some-package 4.57.1 and is decoded with version 4.57.2"
    )


@pytest.mark.usefixtures("inline")
def test_another_version_of_the_package_does_not_resume(
    songs: Path, store: Path, now: dict[str, str]
) -> None:
    now["package_version"] = "4.57.2"
    with pytest.raises(StoreError, match=r"4\.57\.1 \(`pip install some-package==4\.57\.1`\), .*2"):
        encode(songs, store, **MODEL)


@pytest.mark.parametrize("options", [{}, {"revision": OLD}, {"repo": "/models/own"}])
def test_a_branch_that_has_moved(
    store: Path,
    audio: FloatArray,
    now: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, str],
) -> None:
    """The weights are those of the recorded commit, or of a file that the user has."""
    now["main"] = NEW
    np.testing.assert_array_equal(decoded(store, **options), audio)
    assert caplog.messages == []


def test_another_commit_has_the_same_weights(
    store: Path, audio: FloatArray, now: dict[str, str]
) -> None:
    """A machine without network has only that one."""
    now.update({"main": NEW, "absent": OLD, NEW: OLD})
    np.testing.assert_array_equal(decoded(store), audio)
    now.update({"absent": OLD, "main": OLD})
    with pytest.raises(ModelError, match=f"Commit {OLD} is not on this machine"):
        decoded(store)


def test_other_weights_are_refused_with_what_helps(
    store: Path, now: dict[str, str], one_sentence: Any
) -> None:
    with pytest.raises(ModelError) as caught:
        decoded(store, revision=NEW)
    assert one_sentence(caught.value) == (
        f"{MODEL['model']} is not the model that encoded {store} (sha256_weights aaaaaaaa in the "
        f"store, bbbbbbbb here): use --model-option revision={OLD}."
    )
    now["package_version"] = "5.0"
    with pytest.raises(ModelError, match=r"package_version 4\.57\.1 in the store, 5\.0 here; sha"):
        decoded(store, revision=NEW)


@pytest.mark.usefixtures("inline")
def test_the_error_of_a_run_gives_the_commit_that_resumes(
    songs: Path, store: Path, now: dict[str, str]
) -> None:
    now["main"] = NEW
    with pytest.raises(StoreError, match=rf"\(--revision {OLD}\), .* \(--revision {NEW}\)"):
        encode(songs, store, **MODEL)
    summary = encode(songs, store, **MODEL | {"model_options": {"revision": OLD}})
    assert summary.resumed_units == summary.units


def test_info_prints_the_commit(store: Path) -> None:
    assert f"repo owner/name, revision {OLD}" in show.info(LatentStore(store).info)
