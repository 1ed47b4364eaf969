"""`Loader` and the life of its processes: after a fork, and when it ends."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import latentmill as lm
from latentmill.errors import ConfigError


def workers() -> list[Any]:
    found = multiprocessing.active_children()
    return [one for one in found if one.name.startswith("latentmill-loader")]


def mapped() -> int:
    """Number of mappings of memory that a loader made."""
    return Path("/proc/self/maps").read_text().count("memfd:latentmill")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not workers()
    assert mapped() == 0


def read(loader: lm.Loader) -> list[tuple[int, str, float]]:
    """Positions, keys and sums of the latents of an epoch."""
    return [
        (position, key, float(latents.sum()))
        for batch in loader
        for position, key, latents in zip(
            batch["position"], batch["key"], batch["latents"], strict=True
        )
    ]


def test_a_fork_has_workers_of_its_own(mixed: list[str]) -> None:
    """All read at the same time: two children, and the parent, which is within an epoch."""

    def stream() -> lm.LatentStream:
        return lm.LatentStream(mixed, crop=8, batch_size=2)

    reference = lm.Loader(stream(), workers=0)
    first, second = read(reference), read(reference)
    loader = lm.Loader(stream(), workers=2)
    batches = iter(loader)
    held = next(batches)
    kept, position = held["latents"].clone(), held["position"]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def child(number: int) -> None:
        try:
            with pytest.raises(ConfigError, match="closed or iterated over again"):
                next(batches)
            assert read(loader) == second
            if number:  # the other one only ends
                loader.close()
            answers.put("equal")
        except BaseException as error:
            answers.put(repr(error))
            raise

    children = [context.Process(target=child, args=(number,)) for number in range(2)]
    for one in children:
        one.start()
    position += [place for batch in batches for place in batch["position"]]
    assert position == [place for place, *_ in first]
    assert [answers.get() for _ in children] == ["equal", "equal"]
    for one in children:
        one.join()
        assert one.exitcode == 0
    assert len(workers()) == 2
    assert read(loader) == second
    assert held["latents"].equal(kept)
    loader.close()
