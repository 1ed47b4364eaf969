"""A hub of our own for the tests of publishing."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

from latentmill.storage import remote
from support import hub_server
from support.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub, whose token is configured."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with hub_server.serve() as server:
        given = {"endpoint": server.endpoint, "token": hub_server.TOKEN}
        monkeypatch.setitem(fsspec.config.conf, "hf", given)
        yield server
