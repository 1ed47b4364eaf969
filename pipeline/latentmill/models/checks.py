"""Checks that all models share: tensors, lengths and devices, with the same error messages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import ModelSpec
from latentmill.models.inference.device import pick_device

P = ParamSpec("P")
T = TypeVar("T")


def no_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for `encode` and `decode`: inference mode, or no_grad when compiling.

    `torch.compile` does not support inference mode.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return call


def check_audio(spec: ModelSpec, audio: torch.Tensor) -> None:
    """Raise `ModelError` unless `audio` is valid input of `Autoencoder.encode`."""
    if audio.dtype != torch.float32:
        raise ModelError(
            f"Model {spec.name}: audio must be float32 in -1..1, not {audio.dtype}; "
            "convert it (divide 16-bit samples by 32768)."
        )
    if audio.ndim != 3 or audio.shape[1] != spec.channels:
        raise ModelError(
            f"Model {spec.name}: audio must have the shape [batch, {spec.channels}, samples], "
            f"not {list(audio.shape)}; mix it down or use another model."
        )
    samples = audio.shape[2]
    if samples < spec.min_samples or samples % spec.sample_multiple:
        raise ModelError(
            f"Model {spec.name}: the number of samples must be a multiple of "
            f"{spec.sample_multiple} and at least {spec.min_samples}, not {samples}; pad them to "
            f"{spec.padded(samples)}."
        )


def check_encoded(spec: ModelSpec, samples: int, shape: Sequence[int]) -> None:
    """Raise `ModelError` if the latents of `samples` samples do not have the spec's shape.

    Stitching computes times from the spec, so latents of another length would be at wrong times.
    """
    wanted = [spec.latent_channels, spec.frames(samples)]
    if list(shape[1:]) != wanted:
        raise ModelError(
            f"Model {spec.name}: encode returned latents of shape {list(shape)} for {samples} "
            f"samples, but by its spec they have shape {wanted} each: correct the model's spec."
        )


def check_latents(
    spec: ModelSpec,
    latents: torch.Tensor,
    num_samples: int,
    positions: Sequence[int] | None = None,
) -> list[int]:
    """Raise `ModelError` for invalid arguments of `Autoencoder.decode`; return the positions."""
    if latents.dtype != torch.float32:
        raise ModelError(
            f"Model {spec.name}: latents must be float32, not {latents.dtype}; convert them."
        )
    if latents.ndim != 3 or latents.shape[1] != spec.latent_channels or latents.shape[2] == 0:
        raise ModelError(
            f"Model {spec.name}: latents must have the shape [batch, {spec.latent_channels}, "
            f"frames], not {list(latents.shape)}."
        )
    most = spec.samples(latents.shape[2])
    if not 0 <= num_samples <= most:
        raise ModelError(
            f"Model {spec.name}: {latents.shape[2]} latent frames decode to at most {most} samples,"
            f" not {num_samples}."
        )
    chosen = [0] * latents.shape[0] if positions is None else list(positions)
    if len(chosen) != latents.shape[0]:
        raise ModelError(
            f"Model {spec.name}: {len(chosen)} positions given for {latents.shape[0]} latents; "
            "give one for each."
        )
    return chosen


def check_device(name: str, device: str) -> torch.device:
    """Parse the name of a device; raise `ModelError` if this machine does not have it."""
    try:
        return torch.device(pick_device(device))
    except ConfigError as error:
        raise ModelError(f"Model {name}: {error}") from error
