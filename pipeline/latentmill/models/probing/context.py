"""Measures how far the edge of a chunk changes latent frames: the context of an encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmill.models.base import ModelSpec

Encode = Callable[[Tensor], Tensor]  # [B, C, T] to [B, D, Z]

TOLERANCE = 3e-3  # error of a frame over the RMS norm of all frames; trimming leaves this much


@dataclass(frozen=True)
class EdgeErrors:
    """The largest error of a frame by its distance from a cut in the audio: 0 is the first frame.

    The error is ||part - whole|| of the frame over the RMS norm of the whole latent's frames.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]

    @property
    def reach(self) -> tuple[int, int] | None:
        """Frames on each side whose error is over `TOLERANCE`; None if it never ends."""
        return self.reach_at(TOLERANCE, 1)

    def reach_at(self, tolerance: float, spare: int) -> tuple[int, int] | None:
        """Frames on each side whose error is over a tolerance.

        None if fewer than `spare` frames follow them.
        """
        left, right = _reach(self.left, tolerance), _reach(self.right, tolerance)
        if left + spare > len(self.left) or right + spare > len(self.right):
            return None
        return left, right

    def beyond(self, left: int, right: int) -> float:
        """The largest error of frames beyond a context."""
        return max((*self.left[left:], *self.right[right:]), default=0.0)


def edge_errors(encode: Encode, audio: Tensor, spec: ModelSpec) -> EdgeErrors:
    """Compare the latents of parts of `audio` (`[C, T]`) with those of the whole.

    Each part begins or ends at a cut inside the audio, and shares its other end with the whole.
    Only the spec's lengths are used: hop, overhang, multiple and shortest length.
    """
    unit = math.lcm(spec.hop, spec.sample_multiple) // spec.hop  # frames between possible cuts
    frames = (spec.frames(audio.shape[-1]) - 1) // unit * unit
    if frames < 4 * unit:
        raise ValueError(f"{audio.shape[-1]} samples of audio are too short")
    whole = _encoded(encode, audio, spec, 0, frames)
    norm = whole.square().sum(dim=0).mean().sqrt().clamp_min(1e-30)
    left: list[Tensor] = []
    right: list[Tensor] = []
    for share in (3, 4):
        cut = max(frames // share // unit, 1) * unit
        part = _encoded(encode, audio, spec, cut, frames)
        left.append((part - whole[:, cut : cut + part.shape[1]]).norm(dim=0) / norm)
        part = _encoded(encode, audio, spec, 0, frames - cut)
        right.append((part - whole[:, : part.shape[1]]).norm(dim=0).flip(0) / norm)
    return EdgeErrors(_largest(left), _largest(right))


def frames_needed(context: tuple[int, int] | None) -> int:
    """Length of the audio for `edge_errors`, in frames: two thirds of it are compared."""
    return 64 + 2 * sum(context or (0, 0))


def _encoded(encode: Encode, audio: Tensor, spec: ModelSpec, first: int, end: int) -> Tensor:
    """Latents `[D, Z]` of the audio of frames `first` to `end`, in float64."""
    start = first * spec.hop
    samples = spec.samples(end) - start
    samples -= samples % spec.sample_multiple
    return encode(audio[None, :, start : start + samples])[0].cpu().double()


def _largest(errors: list[Tensor]) -> tuple[float, ...]:
    length = min(len(one) for one in errors)
    return tuple(torch.stack([one[:length] for one in errors]).amax(dim=0).tolist())


def _reach(errors: tuple[float, ...], tolerance: float) -> int:
    over = (index + 1 for index, error in enumerate(errors) if not error <= tolerance)
    return max(over, default=0)
