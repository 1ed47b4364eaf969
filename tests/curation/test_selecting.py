"""Duplicates and outliers by the definition of `evaluate`: silent and repeated records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.curation.split import Side
from latentmill.errors import ConfigError
from latentmill.evaluation.statistics import measure_statistics
from latentmill.store.store import LatentStore
from support.latent_store import write_latents

CHANNELS, FRAMES = 16, 100
SHAPE = np.linspace(1, 3, CHANNELS)[:, None]
ORIGIN = 0.5  # of `write_latents`
SILENCE = np.full((CHANNELS, FRAMES), ORIGIN, np.float16)


def sound(number: int, shape: np.ndarray = SHAPE) -> np.ndarray:
    random = np.random.default_rng(number)
    return (random.normal(size=(CHANNELS, FRAMES)) * shape).astype(np.float16)


def write(url: Path, latents: Sequence[np.ndarray], **options: Any) -> LatentStore:
    """A store of other files, whose silent ones are one file."""
    silent = [latent is SILENCE for latent in latents]
    rms = [0.0 if still else 0.1 + n / 1000 for n, still in enumerate(silent)]
    hashes = ["xxh3:0" if still else f"xxh3:{n + 1}" for n, still in enumerate(silent)]
    settings = {"channels": CHANNELS, "content_hashes": hashes, "rms": rms, "per_unit": 16}
    return write_latents(str(url), [FRAMES] * len(latents), latents=latents, **(settings | options))


def numbers(url: str) -> set[int]:
    return {int(key[-5:]) for key in lm.open(url).keys()}  # noqa: SIM118


def parts(sides: Sequence[Side]) -> dict[str, set[int]]:
    return {side.name: numbers(side.store.dest) for side in sides if side.store}


@pytest.mark.parametrize("measured", [False, True])
def test_silent_records_are_not_duplicates(measured: bool, tmp_path: Path) -> None:
    """Each group has one. With levels they decide, otherwise the RMS of all samples."""
    latents = [SILENCE if n % 4 == 3 else sound(n) for n in range(80)]
    latents[42] = latents[21]
    options: dict[str, Any] = {}
    if measured:
        quiet, loud = bytes(FRAMES), bytes([0] * (FRAMES - 1) + [200])
        options["rms"] = [0.1 + n / 1000 for n in range(80)]
        options["levels"] = [quiet if latent is SILENCE else loud for latent in latents]
    url = write(tmp_path / "store", latents, **options).url
    shares = {"a": 0.5, "b": 0.5}
    alone = parts(lm.split(url, tmp_path / "alone", shares))
    together = parts(lm.split(url, tmp_path / "together", shares, duplicates_together=True))
    assert set(together) == {"a", "b"}
    assert all(len({21, 42} & part) in (0, 2) for part in together.values())
    moved = set(range(20, 24)) | set(range(40, 44))  # the groups of the only duplicates
    assert {name: part - moved for name, part in together.items()} == {
        name: part - moved for name, part in alone.items()
    }
    for kind in ("exact", "near"):
        made = lm.select(url, tmp_path / kind, drop_duplicates=kind)  # type: ignore[arg-type]
        assert numbers(made.dest) == set(range(80)) - {42}


def test_outliers_are_those_of_evaluate_and_their_duplicates(tmp_path: Path) -> None:
    odd = sound(99, SHAPE[::-1] * 9)
    softer = (ORIGIN + (odd.astype(np.float32) - ORIGIN) / 2).astype(np.float16)
    latents = [*map(sound, range(30)), SILENCE, SILENCE, odd, odd, softer]
    store = write(tmp_path / "store", latents)
    assert [one.key for one in measure_statistics(store).outliers] == ["item/00032"]
    made = lm.select(store, tmp_path / "view", drop_outliers=True)
    assert numbers(made.dest) == set(range(32))
    # The first of the duplicates may have been left out before.
    made = lm.select(store, tmp_path / "later", where="number != 32", drop_outliers=True)
    assert numbers(made.dest) == set(range(32))


def test_duplicates_are_not_what_the_others_are_compared_with(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [*map(sound, range(12)), *[sound(12)] * 40])
    assert measure_statistics(store).outliers == []
    made = lm.select(store, tmp_path / "view", drop_outliers=True)
    assert numbers(made.dest) == set(range(52))


def test_keys_are_strings(tmp_path: Path, one_sentence: Any) -> None:
    store = write(tmp_path / "store", [sound(0), sound(1)])
    with pytest.raises(ConfigError, match=r"1 is not a key: .* such as 'item/00000'") as error:
        lm.select(store, tmp_path / "view", keys=[1])  # type: ignore[list-item]
    one_sentence(error.value)
    keys = (key for key in ["item/00001"])
    assert lm.select(store, tmp_path / "view", keys=keys).records == 1  # type: ignore[arg-type]
