"""One corpus and its stores for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import store_files

from latentmill.store.store import LatentStore


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_files.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def stores(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sealed store of each format. Leave them unchanged."""
    folders = {name: tmp_path_factory.mktemp("stores") / name for name in store_files.FORMATS}
    for name, folder in folders.items():
        store_files.write_store(str(folder), corpus, format=name)
    return folders


@pytest.fixture(params=store_files.FORMATS)
def store(request: pytest.FixtureRequest, stores: dict[str, Path]) -> LatentStore:
    return LatentStore(str(stores[request.param]), device="cpu")


@pytest.fixture(params=store_files.FORMATS)
def spoilable(request: pytest.FixtureRequest, stores: dict[str, Path], tmp_path: Path) -> Path:
    """A sealed store's folder that a test may spoil."""
    return Path(shutil.copytree(stores[request.param], tmp_path / "store"))
