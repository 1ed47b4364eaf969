"""Batches: short chunks fill them as full ones do, and a plan tells what they will be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given

from latentmill.encoding.batches import MAX_ROWS, Packer, chunk_lengths, expected_batches
from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.lanes import reading_order
from latentmill.encoding.loading import EncodeSettings
from latentmill.sources.base import Item
from support.chunk_cases import Case, cases, windows
from support.units import CHUNKING, MODEL, RATE, encode, items_of


@given(cases())
def test_the_lengths_of_chunks_are_known_from_that_of_the_item(case: Case) -> None:
    lengths = list(chunk_lengths(case.spec, case.chunking, case.total))
    assert lengths == [chunk.audio.shape[1] for chunk in case.chunks()]


@given(windows())
def test_so_are_those_of_windows_with_a_short_last_one(case: Case) -> None:
    lengths = list(chunk_lengths(case.spec, case.chunking, case.total))
    assert lengths == [chunk.audio.shape[1] for chunk in case.chunks()]


@pytest.mark.parametrize(
    ("length", "packing", "rows"),
    [(100, 3, 4), (10, 3, 40), (7, 3, 57), (10, 2, 16), (10, 1, 16), (60, 3, 6)],
)
def test_a_batch_of_short_chunks_has_the_samples_of_a_full_batch(
    length: int, packing: int, rows: int
) -> None:
    packer = Packer(Chunking("trim", 100, 90, 2), 4, packing)
    chunk = Chunk(0, np.zeros((1, length), np.float32))
    batches = [batch for n in range(2 * rows) for batch in packer.add(n, chunk)]
    assert [len(batch.chunks) for batch in batches] == [rows, rows]


def test_the_rows_of_a_batch_are_bounded() -> None:
    packer = Packer(Chunking("trim", 1000, 900, 2), 64)
    chunk = Chunk(0, np.zeros((1, 1), np.float32))
    batches = [batch for n in range(MAX_ROWS) for batch in packer.add(n, chunk)]
    assert [len(batch.chunks) for batch in batches] == [MAX_ROWS]


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Item, ...]:
    """Clips of many lengths, from far below a chunk to several."""
    lengths = [*range(200, 3 * CHUNKING.samples, 700), *[1000] * 20, *[1500] * 9]
    random.Random(0).shuffle(lengths)
    for number, samples in enumerate(lengths):
        sf.write(tmp_path / f"{number:03}.wav", np.zeros(samples), RATE)
    return tuple(
        replace(item, seconds=samples / RATE)
        for item, samples in zip(items_of(tmp_path), lengths, strict=True)
    )


class Shapes:
    """MODEL, and the shapes of the batches that it encoded."""

    def __init__(self) -> None:
        self.spec = MODEL.spec
        self.decode: Callable[..., torch.Tensor] = MODEL.decode
        self.seen: list[tuple[int, int]] = []

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self.seen.append((audio.shape[0], audio.shape[2]))
        return MODEL.encode(audio)


@pytest.mark.parametrize("packing", [2, 3])
def test_the_batches_of_a_plan_are_those_that_the_model_gets(
    clips: tuple[Item, ...], packing: int
) -> None:
    model = Shapes()
    settings = EncodeSettings(batch_size=3, packing=packing)
    encode(reading_order(clips, packing), model, settings=settings)
    expected = expected_batches(
        clips, lambda item: item.seconds or 0.0, MODEL.spec, CHUNKING, 3, packing
    )
    assert list(expected) == model.seen
    sizes = [rows * samples for rows, samples in model.seen]
    assert max(sizes) <= 3 * CHUNKING.samples


def test_equal_lengths_meet(clips: tuple[Item, ...]) -> None:
    """Far apart in the plan, all of a length are in as few batches as they can fill."""
    batches = list(
        expected_batches(clips, lambda item: item.seconds or 0.0, MODEL.spec, CHUNKING, 3)
    )
    for samples in {length for _, length in batches}:
        rows = [count for count, length in batches if length == samples]
        most = 3 * CHUNKING.samples // samples
        assert len(rows) == -(-sum(rows) // most)
