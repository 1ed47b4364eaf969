"""MDCT models that misbehave on purpose, for `python:support.slow_model:build`."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from latentmill.models.base import Autoencoder
from support.mdct_around import Around, small_mdct
from support.open_files import open_files


@dataclass(frozen=True)
class Handle(Around):
    """An MDCT that sleeps before every batch, notes it, and dies of loud audio."""

    seconds: float
    log: str
    deadly_peak: float
    raising: bool
    deadly_load: bool
    hold: str
    shards: str

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
        if not self.shards or writes_shard(self.shards):
            while self.hold and Path(self.hold).exists():
                time.sleep(0.05)


def build(
    *,
    seconds: float = 0.0,
    log: str = "",
    deadly_peak: float = 2.0,
    raising: bool = False,
    deadly_load: bool = False,
    hold: str = "",
    shards: str = "",
) -> Handle:
    """A model that takes `seconds` a batch, writes a line per encoded chunk into `log`, and ends
    its process (or raises) when it gets audio louder than `deadly_peak`. It stands still as
    long as there is a file `hold`; with `shards`, only in the middle of a shard of that store."""
    return Handle(small_mdct(), seconds, log, deadly_peak, raising, deadly_load, hold, shards)


def writes_shard(store: str) -> bool:
    """Whether this process has a shard open that is half-written."""
    opened = {path for _, path in open_files(f"{store}/tmp/") if ".shards." in path}
    with contextlib.suppress(FileNotFoundError):  # it has just been finished
        return any(Path(path).stat().st_size > 4 for path in opened)
    return False
