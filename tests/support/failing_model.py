"""An MDCT that encodes only silence, or fails once, for `python:support.failing_model:build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from latentmill.errors import ModelError
from support.mdct_around import Around, small_mdct


@dataclass(frozen=True)
class Handle(Around):
    """The handle; with the path of a file, the model fails only while the file is missing."""

    mark: str

    def before(self, audio: torch.Tensor) -> None:
        if audio.any() and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            raise ModelError("This model never works: use another one.")


def build(*, mark: str = "") -> Handle:
    """The model."""
    return Handle(small_mdct(), mark)
