"""Weights for the model tests: random ones of the real classes, in a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME that holds `lin-cae` and `m2l` with tiny random weights. Leave it unchanged."""
    from support.linear_cae_weights import write_cache

    home = tmp_path_factory.mktemp("hf_home")
    write_cache(home, ("lin-cae", "m2l"))
    return home


@pytest.fixture(scope="module")
def tiny_cache(tiny_home: Path) -> Iterator[Path]:
    """`tiny_home`, in use."""
    from support.linear_cae_weights import use_cache

    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch, tiny_home)
        yield tiny_home


@pytest.fixture(scope="session")
def _tiny_repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_models import shrink_music2latent, write_repos

    root = tmp_path_factory.mktemp("repos")
    with pytest.MonkeyPatch.context() as patch:
        shrink_music2latent(patch)
        write_repos(root)
    return root


@pytest.fixture(scope="module")
def tiny_repos(_tiny_repos: Path) -> Iterator[Path]:
    """Repositories of all families with tiny random weights, in use. Leave them unchanged."""
    from support.tiny_models import shrink_music2latent

    with pytest.MonkeyPatch.context() as patch:
        shrink_music2latent(patch)
        yield _tiny_repos


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of encoders of texts with tiny random weights. Leave them unchanged."""
    from support.tiny_encoders import write_encoders

    root = tmp_path_factory.mktemp("encoders")
    write_encoders(root)
    return root


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a cache that a test may spoil, in use."""
    from support.linear_cae_weights import use_cache, write_cache

    use_cache(monkeypatch, tmp_path)
    return write_cache(tmp_path)
