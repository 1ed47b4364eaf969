"""States of other items are refused, and those of earlier versions can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.reader.stems import ContextAndTarget
from support.latent_store import write_latents

LENGTHS = [9, 3, 30, 17, 8, 25, 12, 40]

# What version 1 of the states had for a store of these lengths: after the second batch of epoch 1
# of a stream, and at its start.
ROWS = "5a742b22dc0ad640-3a7219898636f4ef"
EARLIER = {
    "stream": {"kind": "stream", "order": ROWS, "position": 4},
    "dataset": {"kind": "batch sampler", "order": f"{ROWS}-2-1-False", "position": 0},
    "stems": {
        "kind": "batch sampler",
        "order": "a1b795ad0d47fe06-d2bd022f542925c8-2-1-False",
        "position": 0,
    },
}


def reader(kind: str, url: str) -> Any:
    if kind == "stream":
        return lm.LatentStream(url, crop=8, batch_size=2)
    if kind == "dataset":
        return lm.BatchSampler(lm.LatentDataset(url, crop=8), 2)
    return lm.BatchSampler(lm.StemDataset(url, ContextAndTarget(), crop=8, active_db=None), 2)


@pytest.mark.parametrize("kind", EARLIER)
def test_a_state_of_other_items_is_refused(
    tmp_path: Path, kind: str, one_sentence: Callable[[BaseException], str]
) -> None:
    """Even of as many items, encoded with the same settings."""
    longer = [*LENGTHS[:-1], 41]
    urls = [
        write_latents(str(tmp_path / f"{number}"), lengths, prefix=prefix).url
        for number, (prefix, lengths) in enumerate([("a", LENGTHS), ("b", LENGTHS), ("a", longer)])
    ]
    state = reader(kind, urls[0]).upcoming_state()
    reader(kind, urls[0]).load_state_dict(state)
    for url in urls[1:]:
        with pytest.raises(ConfigError, match="another order of samples") as error:
            reader(kind, url).load_state_dict(state)
        one_sentence(error.value)


@pytest.mark.parametrize("kind", EARLIER)
def test_states_of_earlier_versions_are_loaded(tmp_path: Path, kind: str) -> None:
    store = write_latents(str(tmp_path / "store"), LENGTHS)
    state = {**EARLIER[kind], "version": 1, "records": [8], "epoch": 1}
    resumed, new = reader(kind, store.url), reader(kind, store.url)
    resumed.load_state_dict(state)
    assert resumed.upcoming_state()["position"] == state["position"]
    new.set_epoch(1)
    left = [*new][state["position"] :]
    if kind == "stream":
        assert [sample.key for sample in resumed] == [sample.key for sample in left]
    else:
        assert list(resumed) == left
    with pytest.raises(ConfigError, match="another order of samples"):
        resumed.load_state_dict({**state, "order": "other"})
