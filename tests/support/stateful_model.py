"""A causal model with an explicit state, for `python:support.stateful_model:build`.

A frame is the mean of its samples plus 0.9 times the frame before, so that each one depends on all
earlier ones. Its values follow from a loop over the samples, which `expected` is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from latentmill.models.base import Autoencoder, Context, ModelSpec

if TYPE_CHECKING:
    from latentmill.models.base import State

HOP = 8
MEMORY = 0.9


def expected(audio: np.ndarray) -> np.ndarray:
    """The latent `[1, Z]` of samples `[T]`, filled up with zeros to whole frames."""
    means = np.pad(audio, (0, -len(audio) % HOP)).reshape(-1, HOP).mean(axis=1, dtype=np.float64)
    value, frames = 0.0, []
    for mean in means:
        value = MEMORY * value + mean
        frames.append(value)
    return np.array([frames])


class Decaying:
    """The model. `batches` has the number of rows and the states before each step.

    With `overflow`, latents and states above it are NaN under autocast, as in half precision.
    """

    def __init__(self, spec: ModelSpec, overflow: float = 0, log: str = "", seconds: float = 0):
        self.spec, self._overflow, self._log, self._seconds = spec, overflow, log, seconds
        self.batches: list[tuple[int, int]] = []  # rows, rows with a state

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        return self.encode_step(audio, [None] * len(audio))[0]

    def encode_step(
        self, audio: torch.Tensor, states: Sequence[State | None]
    ) -> tuple[torch.Tensor, list[State]]:
        self.batches.append((len(audio), sum(state is not None for state in states)))
        time.sleep(self._seconds)
        if self._log:
            with Path(self._log).open("a") as file:
                file.write(f"{os.getpid()} {len(audio)}\n")
        means = audio.unflatten(-1, (-1, HOP)).mean(-1)  # [B, 1, Z]
        last = [torch.zeros(1) if state is None else state[0] for state in states]
        value, frames = torch.stack(last), []
        for mean in means.unbind(-1):
            value = MEMORY * value + mean
            frames.append(value)
        latents = torch.stack(frames, dim=-1)
        if self._overflow and torch.is_autocast_enabled("cpu"):
            bad = latents.abs() > self._overflow
            latents = latents.where(~bad.cummax(-1).values, torch.nan)
        return latents, [(row[:, -1].clone(),) for row in latents]

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return latents.repeat_interleave(HOP, -1)[..., :num_samples]


@dataclass(frozen=True)
class Handle:
    spec: ModelSpec
    log: str = ""
    seconds: float = 0.0

    def load(self, device: str) -> Autoencoder:
        return Decaying(self.spec, log=self.log, seconds=self.seconds)


def build(*, log: str = "", seconds: float = 0.0, chunk_frames: int = 40) -> Handle:
    """A model that sleeps before every batch and writes a line for it into `log`."""
    spec = ModelSpec(
        name="decaying",
        sample_rate=8000,
        channels=1,
        latent_channels=1,
        hop=HOP,
        overhang=0,
        sample_multiple=HOP,
        min_samples=HOP,
        context=Context(16, 0),
        stitch="state",
        chunk_frames=chunk_frames,
        overlap_frames=16,
        batch_size={"cpu": 4, "cuda": 4},
        scale_factor=1.0,
        stochastic_decoder=False,
        identity={"version": 1},
        step_frames=1,
    )
    return Handle(spec, log, seconds)
