"""Options of the readers that are not what they must be: one sentence each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.reader.cache import RangeCache
from latentmill.reader.stems import ContextAndTarget
from support.stem_files import write_stem_store, write_stems

DROP = lm.Drop("text", 0.1)


def test_transforms_are_a_list(mixed: list[str], one_sentence: Any) -> None:
    for kind in (lm.LatentDataset, lm.LatentStream):
        for transforms, word in [
            (DROP, r"must be a list: write transforms=\[Drop\(field='text'"),
            ([DROP, "text"], "'text' is not a transform"),
            (None, "None is not a transform"),
        ]:
            with pytest.raises(ConfigError, match=word) as error:
                kind(mixed, crop=8, transforms=transforms)
            one_sentence(error.value)


def test_options_of_stems(tmp_path: Path, one_sentence: Any) -> None:
    store = write_stem_store(tmp_path, write_stems(tmp_path / "songs"), format="parquet")
    options: dict[str, Any]
    for options, word in [
        ({"transforms": DROP}, "must be a list"),
        ({"gains": 6}, r"invalid range of decibels 6: use two finite bounds, .* as \(-6, 6\)"),
        ({"gains": (1, 2, 3)}, "invalid range of decibels"),
        ({"gains": ("low", "high")}, "invalid range of decibels"),
        ({"gains": (6, -6)}, r"invalid range of decibels \(6, -6\)"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            lm.StemDataset(store, ContextAndTarget(), crop=8, **options)
        one_sentence(error.value)


def test_weights_are_numbers(mixed: list[str], one_sentence: Any) -> None:
    weights: Any
    for weights in (2, "ab", [1], [1, "2"], [1, None], [1, 0], [1, float("inf")]):
        with pytest.raises(ConfigError, match="a number above zero for each of 2 stores") as error:
            lm.LatentStream(mixed[2:], crop=8, weights=weights)
        one_sentence(error.value)
    lm.LatentStream(mixed[2:], crop=8, weights=np.array([1.0, 2.0]))  # type: ignore[arg-type]


def test_a_weight_with_which_a_store_is_never_read(mixed: list[str], one_sentence: Any) -> None:
    """An epoch of 65 samples, of which 65 / 1001 are less than a half."""
    match = r"weights\[0\] is 1, too small for an epoch of 65 samples"
    with pytest.raises(ConfigError, match=match) as error:
        lm.LatentStream(mixed[2:], weights=[1, 1000], crop=8)
    one_sentence(error.value)
    with pytest.raises(ConfigError, match="too small"):
        lm.BatchSampler(lm.LatentDataset(mixed[2:], crop=8), 4, weights=[1, 1000])
    keys = [sample.key for sample in lm.LatentStream(mixed[2:], weights=[1, 100], crop=8)]
    assert sum(key.startswith("s24") for key in keys) == 1  # 65 / 101, rounded


def test_the_size_of_a_cache_is_a_number(tmp_path: Path, one_sentence: Any) -> None:
    for size in ("5", None, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"cache_gib must be a number of GiB, not {size!r}"):
            RangeCache(tmp_path, size)  # type: ignore[arg-type]
    assert RangeCache(tmp_path, np.float32(5)).gib == 5  # type: ignore[arg-type]
