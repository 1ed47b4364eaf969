"""What views list as left out, for views of views and parts of views, too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import latentmill as lm
from latentmill.cli.show_status import StoreStatus, status
from latentmill.errors import StoreError
from latentmill.publishing.views import _origin
from latentmill.store.left_out import read_left_out
from support.latent_store import write_latents

FOLK = {f"item/{n:05d}" for n in range(2, 20, 3)}


@pytest.fixture
def base(tmp_path: Path) -> str:
    metadata = [{"genre": ("jazz", "rock", "folk")[n % 3]} for n in range(20)]
    return write_latents(str(tmp_path / "base"), [5] * 20, metadata=metadata).url


def test_a_part_of_a_view_lists_what_the_view_left_out(base: str, tmp_path: Path) -> None:
    clean = lm.select(base, tmp_path / "clean", where="genre != 'folk'").dest
    lm.split(clean, tmp_path / "parts", {"a": 0.5, "b": 0.5}, by="key")
    parts = [lm.open(tmp_path / "parts" / name) for name in "ab"]
    for part, other in (parts, parts[::-1]):
        reasons = {row["key"]: row["reason"] for row in read_left_out(part).to_pylist()}
        assert reasons == {
            **dict.fromkeys(FOLK, "where: not genre != 'folk'"),
            **dict.fromkeys(other.keys(), f"in {other.url[-1]}"),
        }
        assert part.info.left_out == dict(Counter(reasons.values()))
        text = status(StoreStatus.of(part))
        assert f"records   {len(part)} of 20, " in text
        assert "left out  6: where: not genre != 'folk'" in text
        assert _origin(part).startswith(f"{part.url[-1]}: {len(part)} of 20 records of base; left")
    both = lm.open(lm.merge(parts, tmp_path / "both").dest)  # has what the other part left out
    assert sorted(read_left_out(both)["key"].to_pylist()) == sorted(FOLK)
    assert both.info.left_out == {"where: not genre != 'folk'": 6}


def test_a_part_of_a_view_from_an_earlier_version_is_written_again(
    base: str, tmp_path: Path
) -> None:
    """It counts only what itself left out."""
    clean = lm.select(base, tmp_path / "clean", where="genre != 'folk'").dest
    into = {"a": 0.5, "b": 0.5}
    lm.split(clean, tmp_path / "parts", into, by="key")
    for name, other in ("ab", "ba"):
        path = tmp_path / "parts" / name / "dataset.json"
        left_out = {f"in {other}": len(lm.open(tmp_path / "parts" / other))}
        path.write_text(json.dumps({**json.loads(path.read_text()), "left_out": left_out}))
    lm.split(clean, tmp_path / "parts", into, by="key")
    for name in "ab":
        assert sum(lm.open(tmp_path / "parts" / name).info.left_out.values()) > 6


def test_a_prefix_is_before_all_keys_of_the_list(base: str, tmp_path: Path) -> None:
    names = [
        lm.select(base, tmp_path / "clean", where="genre != 'folk'").dest,
        lm.select(base, tmp_path / "one", drop_duplicates="exact").dest,
    ]
    every = lm.open(lm.merge(names, tmp_path / "every", prefix=True).dest)
    assert {row["key"]: row["detail"] for row in read_left_out(every).to_pylist()} == {
        **dict.fromkeys((f"clean/{key}" for key in FOLK), None),
        **{f"one/item/{n:05d}": "one/item/00000" for n in range(1, 20)},
    }


def test_a_damaged_list_is_one_sentence(base: str, tmp_path: Path) -> None:
    view = lm.open(lm.select(base, tmp_path / "view", sample=5).dest)
    assert view.info.left_out_file is not None
    file = tmp_path / "view" / view.info.left_out_file
    pq.write_table(pq.read_table(file).drop_columns(["reason"]), file)
    with pytest.raises(StoreError, match="is damaged: create the view again"):
        lm.select(view, tmp_path / "again")
