"""An MDCT that encodes silence only, for `python:support.failing_model:build`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latentmill.errors import ModelError
from support.mdct_around import Around, small_mdct


@dataclass(frozen=True)
class Handle(Around):
    """The handle."""

    def before(self, audio: torch.Tensor) -> None:
        if audio.any():
            raise ModelError("This model never works: use another one.")


def build() -> Handle:
    """The model."""
    return Handle(small_mdct())
