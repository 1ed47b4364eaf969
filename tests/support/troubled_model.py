"""MDCT models that get into trouble once, for `python:support.troubled_model:build`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentmill.models import mdct
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.mdct import MdctHandle


@dataclass(frozen=True)
class Handle:
    """An MDCT that takes its time, and gets into `trouble` where the file `mark` is missing."""

    inner: MdctHandle
    trouble: str
    mark: str
    seconds: float

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def load(self, device: str) -> Autoencoder:
        return _Model(self, self.inner.load(device))


class _Model:
    def __init__(self, handle: Handle, inner: Autoencoder) -> None:
        self._handle = handle
        self._inner = inner

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        if audio.any():  # not the origin
            time.sleep(self._handle.seconds)
            fits = self._handle.trouble == "memory" and len(audio) == 1
            if self._handle.mark and not fits and not Path(self._handle.mark).exists():
                Path(self._handle.mark).touch()
                self._trouble()
        return self._inner.encode(audio)

    def _trouble(self) -> None:
        match self._handle.trouble:
            case "cuda":
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self._inner.decode(latents, num_samples, seed=seed, positions=positions)


def build(*, trouble: str = "", mark: str = "", seconds: float = 0.0) -> Handle:
    """A model that sleeps `seconds` a batch and has one `trouble`: cuda, memory, kill or hang."""
    return Handle(mdct.build(hop=256), trouble, mark, seconds)
