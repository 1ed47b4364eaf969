"""torch's default dtype and device do not change what is read, nor where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentmill as lm
from latentmill.reader.collate import collate_tensors
from latentmill.reader.stems import ContextAndTarget
from latentmill.reader.transforms import RandomGain
from support.stem_files import write_stem_store, write_stems

DEFAULTS = [torch.float64, torch.bfloat16, "meta"]


@pytest.fixture(params=DEFAULTS, ids=str)
def set_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    before = torch.get_default_dtype()

    def change() -> None:
        if isinstance(request.param, str):
            torch.set_default_device(request.param)  # for a GPU: a tensor on it has no values here
        else:
            torch.set_default_dtype(request.param)

    yield change
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def read(url: str, workers: int) -> list[Any]:
    """The same samples and batches by every reader."""
    dataset, stream = lm.LatentDataset(url, crop=8), lm.LatentStream(url, crop=8, batch_size=4)
    found: list[Any] = [dataset[0].latents, *(sample.latents for sample in stream)]
    with lm.Loader(lm.LatentDataset(url, crop=8), 4, workers=workers) as loader:
        found += [batch[name] for batch in loader for name in ("latents", "mask")]
    whole = lm.LatentDataset(url, transforms=[RandomGain()])
    with lm.Loader(whole, 4, workers=workers, collate_fn=collate_tensors) as loader:
        found += [value for batch in loader for value in batch.values()]
    return found


def same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        if isinstance(one, torch.Tensor):
            assert one.device.type == "cpu"
        assert np.array_equal(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_and_batches(mixed: list[str], workers: int, set_default: Any) -> None:
    expected = read(mixed[2], workers)
    set_default()
    same(read(mixed[2], workers), expected)


def test_stems_and_decoding(tmp_path: Path, set_default: Any) -> None:
    store = write_stem_store(tmp_path, write_stems(tmp_path / "songs"), format="parquet")

    def found() -> list[Any]:
        dataset = lm.StemDataset(store.url, ContextAndTarget(), crop=8, active_db=None)
        with lm.Loader(dataset, 2, workers=0) as loader:
            values = [value for batch in loader for value in batch.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        opened = lm.open(store.url)
        record = next(iter(opened))
        return [*tensors, opened.decode_latent(record.latent, seed=0)]

    expected = found()
    assert len(expected) > 1
    set_default()
    same(found(), expected)
