"""MDCT models that misbehave on purpose, for `python:support.slow_model:build`."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from latentmill.models.base import Autoencoder
from support.mdct_around import Around, small_mdct

_batches = itertools.count()  # that this process has encoded


@dataclass(frozen=True)
class Handle(Around):
    """An MDCT that sleeps before every batch, notes it, and dies of loud audio."""

    seconds: float
    log: str
    deadly_peak: float
    raising: bool
    deadly_load: bool
    hold: str
    batches: int

    def load(self, device: str) -> Autoencoder:
        if self.deadly_load:
            os._exit(1)
        return super().load(device)

    def before(self, audio: torch.Tensor) -> None:
        peaks = audio.abs().amax(dim=(1, 2))  # [B]
        if float(peaks.max()) > self.deadly_peak:
            if self.raising:
                raise RuntimeError("the model does not like this")
            os._exit(1)
        if self.log:
            with Path(self.log).open("a") as file:
                file.writelines(f"{os.getpid()}\n" for peak in peaks if peak > 0)
        time.sleep(self.seconds)
        encoded = next(_batches)
        while self.hold and encoded >= self.batches and Path(self.hold).exists():
            time.sleep(0.05)


def build(
    *,
    seconds: float = 0.0,
    log: str = "",
    deadly_peak: float = 2.0,
    raising: bool = False,
    deadly_load: bool = False,
    hold: str = "",
    batches: int = 0,
) -> Handle:
    """A model that takes `seconds` a batch, writes a line per encoded chunk into `log`, and ends
    its process (or raises) when it gets audio louder than `deadly_peak`. After a number of
    `batches` it stands still as long as there is a file `hold`."""
    return Handle(small_mdct(), seconds, log, deadly_peak, raising, deadly_load, hold, batches)
