"""A user's own model that travels with `--working-dir`; it says whose library loads it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import latentmill
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.families import mdct


@dataclass(frozen=True)
class Handle:
    """Writes the library's place into `log` when it is loaded, and sleeps before each batch."""

    log: str
    seconds: float

    @property
    def spec(self) -> ModelSpec:
        return mdct.build(hop=256).spec

    def load(self, device: str) -> Autoencoder:
        Path(self.log).write_text(str(Path(latentmill.__file__).parent))
        return _Model(mdct.build(hop=256).load(device), self.seconds)


class _Model:
    def __init__(self, inner: Autoencoder, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self.spec = inner.spec
        self.decode = inner.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        time.sleep(self._seconds)
        return self._inner.encode(audio)


def build(*, log: str, seconds: float = 0.0) -> Handle:
    """The factory of `python:traced_model:build`."""
    return Handle(log, seconds)
