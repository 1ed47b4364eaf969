"""Copies of readers for another thread share the index, but not files and buffers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentmill as lm
from latentmill.reader.buffers import unpack
from latentmill.reader.building import BatchBuilder
from latentmill.reader.draws import Requested
from latentmill.reader.rows import RowReader
from latentmill.reader.stems import ContextAndTarget
from latentmill.store import bases, describe
from support.field_stores import write_fields
from support.latent_store import write_latents

LENGTHS = [9, 3, 30, 17, 8, 25, 12, 40]


def batch_of(builder: BatchBuilder) -> Any:
    """The first two samples of epoch 0."""
    packed = builder.build(Requested(0, np.arange(2), np.arange(2)))
    memory = torch.empty(packed.size, dtype=torch.uint8)
    packed.write(memory)
    return unpack(memory, packed.payload)


def readers(builder: Any) -> list[RowReader]:
    """All readers of rows of a builder's dataset."""
    source = builder._source
    if isinstance(source, lm.StemDataset):
        return [source._crops, source._levels, *source._fields.readers]
    (samples,) = source.stores
    return [samples.crops, samples._metadata, *samples.fields.readers]


@pytest.mark.parametrize("kind", ["latents", "view", "stems"])
def test_the_copy_of_a_second_thread_reads_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also after the view was written again with other records."""
    store = write_latents(str(tmp_path / "store"), LENGTHS)
    write_fields(store, LENGTHS, names=["fine"])
    view = str(tmp_path / "view")
    if kind == "view":
        lm.select(store.url, view, where="key < 'item/00006'")
        store = lm.open(view)
    if kind == "stems":
        source: Any = lm.StemDataset(
            store, ContextAndTarget(), crop=8, active_db=None, fields=["fine"]
        )
    else:
        source = lm.LatentDataset(store, crop=8, fields=["fine"]).corpus
    builder = BatchBuilder(source, lm.collate, torch.float32)
    expected = batch_of(builder)
    if kind == "view":
        lm.select(store.bases.entries[0].url, view, where="key > 'item/00003'", overwrite=True)
    for module in (describe, bases):
        monkeypatch.setattr(module, "open_index", None)
    copied = copy.deepcopy(builder)
    found = batch_of(copied)
    assert found["key"] == expected["key"]
    names = ("context", "target") if kind == "stems" else ("latents",)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    for one, other in zip(readers(builder), readers(copied), strict=True):
        assert other._index is one._index
        assert other.store is not one.store
        own = [name for name in ("_shards", "_kept", "_raw") if hasattr(one, name)]
        assert own
        assert not any(getattr(other, name) is getattr(one, name) for name in own)
