"""Lanes: a unit's items side by side, in an order that depends on the items alone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.encoding.lanes import LANES, PACKING, in_turn, lanes_of, reading_order
from latentmill.sources.base import Item, Segment, TableCell, known_seconds


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    """Items whose length is known, that of a segment, to be guessed from the size, or unknown."""
    count = draw(st.integers(0, 60))  # lists of any length rarely have more than a few elements
    seconds = draw(st.lists(st.floats(0.1, 1000), min_size=count, max_size=count))
    made = []
    for number, length in enumerate(seconds):
        kind = draw(st.sampled_from(["known", "segment", "size"]))
        known = {
            "known": {"size": 0, "seconds": length},
            "segment": {"size": 1 << 40, "segment": Segment(1.0, length)},
            "size": {"size": max(1, int(length * 32_000))},
        }[kind]
        made.append(Item(f"{number}", f"/{number}", version="", **known))
    return made


@given(items())
def test_every_item_is_in_one_lane_and_lanes_are_about_equally_long(some: list[Item]) -> None:
    lanes = lanes_of(some)
    assert len(lanes) == min(LANES, len(some))
    assert sorted(itertools.chain(*lanes), key=lambda pair: pair[0]) == list(enumerate(some))
    lengths = []
    for lane in lanes:
        numbers = [number for number, _ in lane]
        assert numbers == sorted(numbers)
        parts = [
            i.seconds or (i.segment and i.segment.duration) or i.size / 32_000 for _, i in lane
        ]
        lengths.append((sum(parts), max(parts)))
    for total, longest in lengths:
        assert total - longest <= min(sum_ for sum_, _ in lengths) + 1e-6


def test_an_item_of_which_nothing_is_known_counts_as_a_minute() -> None:
    some = [Item(f"{n}", f"/{n}", 0, "") for n in range(LANES)]
    some += [Item("short", "/short", 0, "", seconds=1.0), Item("last", "/last", 0, "")]
    assert [[number for number, _ in lane] for lane in lanes_of(some)][:2] == [[0, 16], [1, 17]]


@pytest.mark.parametrize(("first", "second"), [(0.99999, 1.0), (1.0, 0.99999)])
def test_32_000_bytes_of_unknown_length_count_as_a_second(first: float, second: float) -> None:
    """Stores are continued in this order, so the estimate must stay what it is."""
    assert PACKING == 3  # what plans in stores have
    some = [Item(f"{n}", f"/{n}", 0, "", seconds=9.0) for n in range(LANES - 2)]
    sizes = [int(first == 1.0) * 32_000, int(second == 1.0) * 32_000]
    some += [
        Item("x", "/x", sizes[0], "", seconds=None if sizes[0] else first),
        Item("y", "/y", sizes[1], "", seconds=None if sizes[1] else second),
        Item("last", "/last", 0, "", seconds=1.0),
    ]
    shorter = LANES - 2 if first < second else LANES - 1
    assert [number for number, _ in lanes_of(some)[shorter]] == [shorter, LANES]


@given(items())
def test_plans_of_earlier_versions_have_a_lane_for_each_item(some: list[Item]) -> None:
    assert lanes_of(some, packing=1) == [[pair] for pair in enumerate(some)]


@given(st.lists(st.lists(st.integers()), max_size=6))
def test_one_element_is_taken_from_each_in_turn(lists: list[list[int]]) -> None:
    nothing = object()
    rounds = itertools.zip_longest(*lists, fillvalue=nothing)
    expected = [one for one in itertools.chain(*rounds) if one is not nothing]
    assert list(in_turn(map(iter, lists))) == expected


@given(items(), st.randoms(use_true_random=False))
def test_items_are_read_by_length_then_key(some: list[Item], chance: random.Random) -> None:
    shuffled = list(some)
    chance.shuffle(shuffled)
    read = reading_order(shuffled)
    assert read == reading_order(some)
    lengths = [known_seconds(item) for item in read]
    known = [(one, item.key) for one, item in zip(lengths, read, strict=True) if one is not None]
    assert known == sorted(known)
    assert lengths[len(known) :] == [None] * (len(read) - len(known))
    unknown = [(item.size, item.key) for item in read[len(known) :]]
    assert unknown == sorted(unknown)
    assert reading_order(shuffled, packing=2) == shuffled


@pytest.mark.parametrize(
    "shared",
    [
        Item("z", "/table.parquet", 9, "", place=TableCell(0, 1, "audio"), seconds=1.0),
        Item("z", "s3://bucket/talk.flac", 9, "", segment=Segment(1.0, 1.0)),
    ],
)
def test_items_that_share_what_is_read_stay_in_the_plans_order(shared: Item) -> None:
    others = [Item("a", "/a", 9, "", seconds=3.0), Item("b", "/b", 9, "", seconds=2.0)]
    assert reading_order([*others, shared]) == [*others, shared]
