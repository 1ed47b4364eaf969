"""Fields from audio of stores whose records were copied from others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import latentmill as lm
from latentmill.errors import SourceError
from latentmill.plan.presence import check_source
from latentmill.publishing.views import StagedView
from latentmill.storage.storage import Storage
from support import runs
from support.fields import added
from support.in_process import encode


def test_a_copy_has_the_files_of_its_records(songs: Path, store: Path, tmp_path: Path) -> None:
    """Also if the stores that it was made from are gone, but not if the files are."""
    other = runs.write_songs(tmp_path / "other songs", 2)
    encode(other, tmp_path / "other")
    copies = [tmp_path / name for name in ("both", "one", "gone")]
    lm.merge([store, tmp_path / "other"], copies[0], prefix=True, copy=True)
    for copy in copies[1:]:
        lm.select(store, copy, copy=True)
    view = lm.open(lm.select(store, tmp_path / "view").dest)
    folder = tmp_path / "staged"
    folder.mkdir()
    staged = StagedView(view, str(folder), Storage(str(tmp_path / "published")), None)
    added(store)
    expected = runs.latents(store / "fields" / "second")
    shutil.rmtree(tmp_path / "other")
    store.rename(tmp_path / "moved")
    assert (added(copies[0]).info.encoded, added(copies[1]).info.encoded) == (7, 5)
    assert runs.latents(copies[1] / "fields" / "second") == expected
    check_source(staged.storage, staged._plan, staged._plan.units)
    songs.rename(tmp_path / "moved songs")
    with pytest.raises(SourceError, match="cannot read any of the planned files"):
        added(copies[2])
