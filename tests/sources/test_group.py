"""Groups of the stems that begin together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from latentmill.sources.group import SAME_START, groups_together

# Starts at multiples of 1/16 s, where a millisecond is rounded up or down, and close to them.
STARTS = st.builds(lambda n, off: n / 16 + off * 1e-6, st.integers(0, 5), st.integers(0, 20))


@given(st.lists(st.tuples(st.sampled_from(["north", "solo", "south"]), STARTS)))
def test_stems_of_a_song_that_begin_within_a_millisecond_are_a_group(
    stems: list[tuple[str, float]],
) -> None:
    songs, starts = [song for song, _ in stems], [start for _, start in stems]
    numbers, names = groups_together(songs, starts)
    assert len(numbers) == len(stems)
    for (song, start), number in zip(stems, numbers, strict=True):
        for (other, later), same in zip(stems, numbers, strict=True):
            assert (number == same) == (song == other and abs(start - later) < SAME_START)
    firsts = [
        min(s for s, n in zip(stems, numbers, strict=True) if n == g) for g in range(len(names))
    ]
    assert firsts == sorted(firsts)
    for (song, start), name in zip(firsts, names, strict=True):
        alone = [other for other, _ in firsts].count(song) == 1
        assert name == (song if alone else f"{song}#{start:.6f}".rstrip("0").rstrip("."))
