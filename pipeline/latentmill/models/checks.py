"""What every model refuses in the same words: wrong tensors, wrong lengths, a missing device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec

P = ParamSpec("P")
T = TypeVar("T")


def no_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate `encode` or `decode`: inference mode, or what `torch.compile` has instead of it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return call


def check_audio(spec: ModelSpec, audio: torch.Tensor) -> None:
    """Check that `audio` is what `Autoencoder.encode` takes.

    Raises:
        ModelError: It is not float32 `[B, C, T]`, or T is too short or no multiple.
    """
    if audio.dtype != torch.float32:
        raise ModelError(
            f"Model {spec.name}: audio must be float32 in -1..1, not {audio.dtype}; "
            "convert it (16-bit samples are divided by 32768)."
        )
    if audio.ndim != 3 or audio.shape[1] != spec.channels:
        raise ModelError(
            f"Model {spec.name}: audio must have the shape [batch, {spec.channels}, samples], "
            f"not {list(audio.shape)}; mix it down or choose another model."
        )
    samples = audio.shape[2]
    if samples < spec.min_samples or samples % spec.sample_multiple:
        raise ModelError(
            f"Model {spec.name}: {samples} samples are not a multiple of {spec.sample_multiple} of "
            f"at least {spec.min_samples}; pad them to {spec.padded(samples)}."
        )


def check_encoded(spec: ModelSpec, samples: int, shape: Sequence[int]) -> None:
    """Check the shape of what `Autoencoder.encode` gave for so many samples.

    All places on the time line follow from the spec: a model that does not keep its own would
    give latents at wrong times.

    Raises:
        ModelError: It is not `[B, D, Z]` of the spec.
    """
    wanted = [spec.latent_channels, spec.frames(samples)]
    if list(shape[1:]) != wanted:
        raise ModelError(
            f"Model {spec.name}: encode gave latents of the shape {list(shape)} for {samples} "
            f"samples, where its spec promises {wanted} each: correct the model's spec."
        )


def check_latents(
    spec: ModelSpec,
    latents: torch.Tensor,
    num_samples: int,
    positions: Sequence[int] | None = None,
) -> list[int]:
    """Check what `Autoencoder.decode` is given.

    Returns:
        The position of each batch element.

    Raises:
        ModelError: They are not float32 `[B, D, Z]`, Z frames do not hold `num_samples`, or there
            is not one position for each batch element.
    """
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
            f"Model {spec.name}: {latents.shape[0]} latents need as many positions, "
            f"not {len(chosen)}."
        )
    return chosen


def check_device(name: str, device: str) -> torch.device:
    """Turn a device's name into a device that is there.

    Raises:
        ModelError: The name is unknown, or this machine has no such device.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"Model {name}: {device!r} is no device; choose cpu, cuda or cuda:N."
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"Model {name}: device {device} was asked for, but PyTorch sees "
            f"{torch.cuda.device_count()} GPUs here; use --device cpu or a CUDA build of PyTorch."
        )
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"Model {name}: device {device} is not supported; choose cpu or cuda.")
    return chosen
