"""Finds how many latent frames an encoder returns for a number of samples: hop and overhang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from latentmill.models.base import ModelSpec

FRAMES = (2, 3, 5, 8, 13, 21, 34, 60)
SHORTEST = 12  # number of short lengths that are tried


class Formula(NamedTuple):
    """`frames(T) = max(1, ceil((T - overhang) / hop))`, as in `ModelSpec`."""

    hop: int
    overhang: int


def lengths_to_try(spec: ModelSpec, longest: int) -> list[int]:
    """Lengths up to `longest` that the spec allows.

    The shortest ones, and those on both sides of where a longer one gets one more frame.
    """
    step = spec.sample_multiple
    lengths = {spec.min_samples + blocks * step for blocks in range(SHORTEST)}
    for frames in FRAMES:
        whole = spec.padded(spec.samples(frames))
        lengths |= {whole - step, whole, whole + step}
    return sorted(length for length in lengths if spec.min_samples <= length <= longest)


def fit(frames: Mapping[int, int], claimed: Formula | None = None) -> Formula | None:
    """The formula that fits the frames of all lengths; None if there is none.

    Of several hops it chooses the claimed one, or else the one with the smallest prime factors,
    because hops are products of strides; of several overhangs the claimed one, or else the one
    nearest to zero.
    """
    fitting = {hop: offsets for hop in _hops(frames) if (offsets := _overhangs(frames, hop))}
    if not fitting:
        return None
    if claimed is not None and claimed.overhang in fitting.get(claimed.hop, ()):
        return claimed
    hop = max(fitting, key=lambda one: (0 in fitting[one], -_largest_factor(one)))
    allowed = fitting[hop]
    return Formula(hop, min(max(allowed[0], 0), allowed[-1]))


def _hops(frames: Mapping[int, int]) -> range:
    """The hops that the shortest and the longest length with more than one frame allow."""
    several = sorted(length for length, count in frames.items() if count > 1)
    if len(several) < 2:
        return range(0)
    first, last = several[0], several[-1]
    more = frames[last] - frames[first]
    if more < 2:
        return range(0)
    return range((last - first) // (more + 1), (last - first) // (more - 1) + 2)


def _overhangs(frames: Mapping[int, int], hop: int) -> range:
    if hop < 1:
        return range(0)
    least = max(length - count * hop for length, count in frames.items())
    beyond = min(length - (count - 1) * hop for length, count in frames.items() if count > 1)
    return range(least, beyond)


def _largest_factor(number: int) -> int:
    """The largest prime factor."""
    factor = 2
    while factor < number:
        if number % factor == 0:
            number //= factor
        else:
            factor += 1
    return number
