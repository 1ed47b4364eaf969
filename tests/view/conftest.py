"""One store and its server for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from view_server import Site, make_source, make_store, serving

from latentmill.store.store import LatentStore


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("music"))


@pytest.fixture(scope="session")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return make_store(tmp_path_factory.mktemp("view") / "store", source)


@pytest.fixture(scope="session")
def site(store: LatentStore) -> Iterator[Site]:
    with serving(store) as site:
        yield site


@pytest.fixture(scope="session")
def split_store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    folder = tmp_path_factory.mktemp("split")
    source = make_source(folder / "music", channels=2)
    return make_store(folder / "store", source, channels="split")


@pytest.fixture(scope="session")
def split_site(split_store: LatentStore) -> Iterator[Site]:
    with serving(split_store) as site:
        yield site
