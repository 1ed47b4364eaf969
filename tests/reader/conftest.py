"""Stores of made-up latents for all tests of this folder. Leave them unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.store import LatentStore
from support.latent_store import write_latents

FORMATS = list(SHARD_FORMATS)
SIZES = (1, 7, 24, 41)


@pytest.fixture(scope="session")
def lengths() -> list[int]:
    """Of the items of `made`: shorter and longer than a crop, one frame, exactly a crop."""
    return [1, 64, 65, *np.random.default_rng(0).integers(2, 300, 37).tolist()]


@pytest.fixture(scope="session")
def _made(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("made")
    return {
        name: write_latents(str(folder / name), lengths, format_name=name).url for name in FORMATS
    }


@pytest.fixture(params=FORMATS)
def made(request: pytest.FixtureRequest, _made: dict[str, str]) -> LatentStore:
    """A store of 40 items in five shards, in each format."""
    return LatentStore(_made[request.param])


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Stores of SIZES items of one model."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(1)
    return [
        write_latents(
            str(folder / str(size)), random.integers(1, 40, size).tolist(), prefix=f"s{size}"
        ).url
        for size in SIZES
    ]
