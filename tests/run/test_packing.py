"""A store is continued in the order in which it was planned; see `encoding/lanes.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentmill.config import load_config
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.lanes import PACKING
from latentmill.engine.job import make_job
from latentmill.engine.launch import _check_packing
from latentmill.errors import ConfigError
from latentmill.models import registry
from latentmill.plan import PLAN_PATH, Plan, load
from latentmill.storage.storage import Storage
from support.in_process import encode, in_process, tone


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    for number in range(3):
        tone(tmp_path / "songs" / f"{number}.wav", 4000)
    with in_process():
        encode(tmp_path / "songs", tmp_path / "store")
    return Storage(str(tmp_path / "store"))


def packing_of_job(plan: Plan, store: Storage) -> int:
    config = load_config(None, {"source": plan.source, "out": store.root, "device": "cpu"})
    handle = registry.resolve(config.model, config.model_options)
    chunking = Chunking.for_model(handle.spec)
    return make_job(config, handle, chunking, plan, device="cpu", threads=1).settings.packing


def test_a_new_plan_has_lanes_and_an_earlier_one_its_own_order(store: Storage) -> None:
    plan = load(store)
    assert plan is not None
    assert plan.packing == PACKING == packing_of_job(plan, store)
    _check_packing(plan, store)
    document = json.loads(store.read(PLAN_PATH))
    del document["packing"]
    store.write(PLAN_PATH, json.dumps(document).encode())
    earlier = load(store)
    assert earlier is not None
    assert earlier.packing == 1 == packing_of_job(earlier, store)
    with pytest.raises(ConfigError, match=r"remove --load-tasks\.$"):
        _check_packing(earlier, store)
