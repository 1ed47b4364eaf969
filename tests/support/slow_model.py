"""MDCT models that misbehave on purpose, for `python:support.slow_model:FACTORY`.

They are importable in Ray's workers because `tests/` is on PYTHONPATH there.
"""

from __future__ import annotations

import os
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
    """An MDCT that sleeps before every batch, notes it, and dies of loud audio."""

    inner: MdctHandle
    seconds: float
    log: str
    deadly_peak: float
    raising: bool
    deadly_load: bool

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def load(self, device: str) -> Autoencoder:
        if self.deadly_load:
            os._exit(1)
        return _Model(self, self.inner.load(device))


class _Model:
    def __init__(self, handle: Handle, inner: Autoencoder) -> None:
        self._handle = handle
        self._inner = inner

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        peaks = audio.abs().amax(dim=(1, 2))  # [B]
        if float(peaks.max()) > self._handle.deadly_peak:
            if self._handle.raising:
                raise RuntimeError("the model does not like this")
            os._exit(1)
        if self._handle.log:
            with Path(self._handle.log).open("a") as file:
                file.writelines(f"{os.getpid()}\n" for peak in peaks if peak > 0)
        time.sleep(self._handle.seconds)
        return self._inner.encode(audio)

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self._inner.decode(latents, num_samples, seed=seed, positions=positions)


def build(
    *,
    seconds: float = 0.0,
    log: str = "",
    deadly_peak: float = 2.0,
    raising: bool = False,
    deadly_load: bool = False,
) -> Handle:
    """A model that takes `seconds` a batch, writes a line per encoded chunk into `log`, and ends
    its process (or raises) when it gets audio louder than `deadly_peak`."""
    return Handle(mdct.build(hop=256), seconds, log, deadly_peak, raising, deadly_load)
