"""MDCT models that get into trouble once, for `python:support.troubled_model:build`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.mdct_around import Around, small_mdct


@dataclass(frozen=True)
class Handle(Around):
    """An MDCT that takes its time, and gets into `trouble` where the file `mark` is missing."""

    trouble: str
    mark: str
    seconds: float

    def before(self, audio: torch.Tensor) -> None:
        if not audio.any():  # the origin
            return
        time.sleep(self.seconds)
        fits = self.trouble == "memory" and len(audio) == 1
        if self.mark and not fits and not Path(self.mark).exists():
            Path(self.mark).touch()
            self._trouble()

    def _trouble(self) -> None:
        match self.trouble:
            case "cuda":
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)


def build(*, trouble: str = "", mark: str = "", seconds: float = 0.0) -> Handle:
    """A model that sleeps `seconds` a batch and has one `trouble`: cuda, memory, kill or hang."""
    return Handle(small_mdct(), trouble, mark, seconds)
