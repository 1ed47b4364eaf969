"""A model that is probed, and a check that it passes or fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from latentmill.errors import LatentmillError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.probing.behaviour import Repeatability
from latentmill.models.probing.context import frames_needed
from latentmill.models.weights import LOAD_ERRORS

SECONDS, FRAMES = 1.0, 128  # length of most sounds that are encoded, at most
ROUNDING = 1e-5  # relative error of equal calls on a GPU
BATCH = 1e-4  # relative error that the rest of a batch may cause
CALL_ERRORS = (LatentmillError, AssertionError, NotImplementedError, *LOAD_ERRORS)

Status = Literal["passed", "failed", "not measured"]


@dataclass(frozen=True)
class Check:
    """A claim about a model, and what was measured.

    Attributes:
        name: What the claim is about, such as `lengths`.
        claimed: The claim.
        measured: The measured value, or why it was not measured.
        status: Whether the model passes.
        sentence: What is wrong and what to do, if it fails.
    """

    name: str
    claimed: str
    measured: str
    status: Status = "passed"
    sentence: str | None = None

    def failed(self, sentence: str, measured: str | None = None) -> Check:
        measured = self.measured if measured is None else measured
        return replace(self, measured=measured, status="failed", sentence=sentence)


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the scaled latents of music."""

    minimum: float
    maximum: float
    mean: float
    std: float


class Subject:
    """A loaded model with music `[C, T]` of at least `samples_needed`.

    Attributes:
        claimed: The model's spec.
        spec: The same with measured values in place of wrong ones.
        one: Music `[1, C, T]` of about a second; `other` is other music of the same length.
        decodes: Whether the model decodes at all.
        device: Device of the latents.
        values: Set when latents of music are measured.
        largest: The largest latent of music at full scale.
        fitted: Whether a hop and an overhang fit the numbers of frames.
        repeats: Set when equal calls of `encode` are compared.
    """

    def __init__(self, loaded: Autoencoder, audio: Tensor, decodes: bool = True) -> None:
        self.loaded, self.audio = loaded, audio
        self.claimed = self.spec = loaded.spec
        length = self.spec.padded(self.spec.samples(_frames(self.spec)))
        self.one = audio[None, :, :length].contiguous()
        self.other = audio[None, :, audio.shape[1] - length :].flip(-1)
        self.device = audio.device
        self.decodes = decodes
        self.largest = 0.0
        self.fitted = True
        self.values: LatentStatistics | None = None
        self.repeats: Repeatability | None = None

    def encode(self, audio: Tensor) -> Tensor:
        """Encode a copy, because a model may change it."""
        latents = self.loaded.encode(audio.clone())
        self.device = latents.device
        return latents.float().cpu()

    def decode(self, latents: Tensor, samples: int, seed: int = 0) -> Tensor:
        """Decode latents on the device on which `encode` returned them."""
        return self.loaded.decode(latents.to(self.device), samples, seed=seed).float().cpu()

    def around(self) -> tuple[Tensor, Tensor]:
        """Neighbours in a batch: a loud one and a quiet one."""
        loud = self.other / self.other.abs().max().clamp_min(1e-6)
        return loud, self.other * 0.01


def samples_needed(spec: ModelSpec) -> int:
    frames = max(frames_needed(spec.context) + 1, 2 * _frames(spec) + 2)
    return max(spec.padded(spec.samples(frames)), 2 * spec.min_samples)


def generators_check(name: str, call: str, result: str, repeats: Repeatability) -> Check:
    used = ", ".join(repeats.generators)
    check = Check(name, "no global random numbers", used or "none")
    if not used:
        return check
    return check.failed(
        f"{call} uses the global random numbers of {used}, so that {result} depend on what ran "
        "before: use no noise, or a torch.Generator of its own."
    )


def _frames(spec: ModelSpec) -> int:
    return max(9, min(spec.chunk_frames, FRAMES, round(SECONDS * spec.sample_rate / spec.hop)))
