"""An MDCT with something that happens before it encodes: the base of models that misbehave.

Those are importable in Ray's workers because `tests/` is on PYTHONPATH there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.families import mdct
from latentmill.models.families.mdct import MdctHandle


@dataclass(frozen=True)
class Around:
    """A handle of an MDCT whose models call `before` with every batch."""

    inner: MdctHandle

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def load(self, device: str) -> Autoencoder:
        return _Model(self, self.inner.load(device))

    def before(self, audio: torch.Tensor) -> None:
        """What happens before audio `[B, C, N]` is encoded."""
        raise NotImplementedError


class _Model:
    def __init__(self, handle: Around, inner: Autoencoder) -> None:
        self._handle = handle
        self._inner = inner
        self.spec = inner.spec
        self.decode = inner.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self._handle.before(audio)
        return self._inner.encode(audio)


def small_mdct() -> MdctHandle:
    return mdct.build(hop=256)
