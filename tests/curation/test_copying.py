"""Copies of stores: how their records are divided into shards, and in how many reads."""

from __future__ import annotations

import uuid
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import latentmill as lm
from latentmill.curation import copying
from latentmill.curation.chosen import Chosen
from latentmill.store.index import INDEX_SCHEMA, Index
from support.latent_store import HOP, latent_of, write_latents
from support.rounds import shard_rounds


@pytest.mark.parametrize(
    ("stitch", "hop", "shape"),
    [
        ("trim", HOP, (16, 4)),
        ("none", HOP, (3, 16, 4)),  # chunks that overlap
        ("trim", 1, (16, 4)),  # as fields from texts and files have it, whose values have no rate
    ],
)
def test_shards_of_a_copy_have_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stitch: str, hop: int, shape: tuple[int, ...]
) -> None:
    count = 24  # in groups of 4, which are not divided
    latents = [np.full(shape, n + 1, np.float16) for n in range(count)]
    url = str(tmp_path / "store")
    options = {"channels": 16, "latents": latents, "stitch": stitch, "model": {"hop": hop}}
    write_latents(url, [4] * count, per_unit=5, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(copying, "SHARD_SIZE", round(8.5 * latents[0].nbytes))
    store = lm.open(lm.select(url, tmp_path / "copy", copy=True).dest)
    assert len(store.info.shards) == count / 8
    assert [record.latent.tobytes() for record in store] == [one.tobytes() for one in latents]


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_a_copy_reads_a_shard_in_a_few_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, format_name: str
) -> None:
    """Of two stores whose keys alternate, and of a view of them."""
    root, count = f"memory://{uuid.uuid4().hex}", 120
    urls = [f"{root}/{name}" for name in ("even", "odd")]
    for number, url in enumerate(urls):
        others = range(1 - number, count, 2)
        write_latents(url, [4] * count, per_unit=60, format_name=format_name, failed=others)
    view = lm.merge(urls, f"{root}/view").dest
    rounds = [shard_rounds(monkeypatch, url) for url in urls]
    for copy in (
        lm.merge(urls, tmp_path / "of stores", copy=True),
        lm.select(view, tmp_path / "of a view", copy=True),
    ):
        latents = [record.latent.tobytes() for record in lm.open(copy.dest)]
        assert latents == [latent_of(number, 4).tobytes() for number in range(count)]
    assert 0 < max(map(len, rounds)) <= count / 4  # one for each record would be 60 for each copy


def index_of(keys: list[str]) -> Index:
    rows = [dict.fromkeys(INDEX_SCHEMA.names, 0) | {"key": key, "shard": "s"} for key in keys]
    return Index(pa.Table.from_pylist(sorted(rows, key=itemgetter("key")), INDEX_SCHEMA))


@given(
    st.lists(st.text("abc", max_size=3), unique=True, max_size=12),
    st.lists(st.text("abc", max_size=3), unique=True, max_size=12),
    st.sampled_from(["", "a", "b/"]),
)
def test_positions_of_keys(has: list[str], asked: list[str], prefix: str) -> None:
    one = Chosen(None, index_of(has), np.arange(len(has)), None, prefix)  # type: ignore[arg-type]
    wanted = list({*asked, *(prefix + key for key in asked)})
    ordered = [prefix + key for key in sorted(has)]
    expected = {key: ordered.index(key) for key in wanted if key in ordered}
    assert copying._positions(one, wanted) == expected


def test_no_neighbour_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Index, key: str) -> None:
        raise AssertionError(key)

    monkeypatch.setattr(Index, "find", refuse)
    keys = [f"{number:04d}" for number in range(300)]
    for has in (keys, keys[::2], keys[:150]):
        one = Chosen(None, index_of(has), np.arange(len(has)), None)  # type: ignore[arg-type]
        unit = keys[100:200]
        assert copying._positions(one, unit) == {k: has.index(k) for k in unit if k in has}
