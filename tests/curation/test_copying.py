"""Copies of stores: how their records are divided into shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import latentmill as lm
from latentmill.curation import copying
from support.latent_store import HOP, write_latents


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
