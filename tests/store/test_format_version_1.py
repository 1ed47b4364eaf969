"""A store of format version 1, written by the version before revisions, stays readable."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import StoreError
from latentmill.reader.dataset import LatentDataset
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support import runs
from support.in_process import encode, tone

# Encoded by latentmill 0.1.0 with mdct (hop 64) from 1,500, 2,000 and 2,500 samples of
# 0.3 sin(2 pi f t / 22050), f = 200, 300 and 400 Hz, and a broken file; then measured by `seams`
# and `linearity`.
STORE = Path(__file__).parents[1] / "data" / "store-of-version-1"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORE, tmp_path / "store"))


def test_it_is_read_as_before(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = LatentStore(str(store), device="cpu")
    assert opened.info.format_version == 1
    assert opened.sealed
    assert opened.complete
    assert list(opened.keys()) == ["0", "1", "2"]
    assert verify(opened).faults == []
    for number, record in enumerate(opened):
        time = np.arange(1500 + 500 * number) / 22050
        wave = 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * time)
        decoded = opened.decode(record.key)[0]
        assert np.abs(decoded - wave).max() < 1e-3
    assert len(LatentDataset(str(store), crop=8)) == 3
    info = runs.outcome(runs.call(capsys, "info", store, "--json"))
    assert isinstance(info["seams"], dict)
    assert info["seams"]["items"] == 3
    assert isinstance(info["linearity"], dict)
    assert opened.origin.linearity is not None
    assert opened.origin.linearity.additivity < 1e-6


def test_it_is_not_resumed(store: Path, tmp_path: Path, inline: None) -> None:
    files = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    tone(tmp_path / "songs" / "0.wav", 3000)
    with pytest.raises(StoreError, match="version") as refused:
        encode(
            tmp_path / "songs",
            store,
            model_options={"hop": 64, "sample_rate": 22050},
            chunk_samples=1024,
            extend=True,
        )
    assert "\n" not in str(refused.value)
    left = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    left.pop(store / ".lock", None)
    assert left == files


def test_annotating_says_what_to_do(store: Path, tmp_path: Path, one_sentence: Any) -> None:
    """The command that would seal it again is refused; a copy can be annotated."""
    (tmp_path / "rows.csv").write_text("key,bpm\n0,90\n")
    with pytest.raises(StoreError) as caught:
        lm.annotate(store, tmp_path / "rows.csv")
    assert one_sentence(caught.value) == (
        f"{store} was sealed by an earlier version: copy it with `latentmill select {store} NEW "
        "--copy`, then annotate NEW."
    )
    lm.select(store, tmp_path / "new", copy=True)
    assert lm.annotate(tmp_path / "new", tmp_path / "rows.csv").matched == 1
