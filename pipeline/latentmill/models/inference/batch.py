"""Finding the batch size by trial: the most chunks per forward pass that fit and that pay off.

Latents depend on the batch size in the last digits (6e-6), so the size is found once per store; see
`settled_batch_size` in `engine/tuning.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.inference.precision import Precision, numeric_mode

LARGEST = 1024
SPARE = 0.1  # fraction of memory left free, because short items are packed more per batch
GAIN = 1.05  # minimum gain in chunks per second for a batch twice as large


class TooLarge(Exception):  # noqa: N818  a result, not an error
    """A batch fits into memory, but leaves too little of it free."""


def search(seconds_of: Callable[[int], float], first: int, most: int) -> int | None:
    """Find the best batch size among `first` times powers of two, up to `most`.

    The size is doubled while chunks per second grow by `GAIN`, or halved until it fits; the result
    is None if not even one chunk fits. `seconds_of` runs a batch of a size and returns its time; it
    raises `torch.OutOfMemoryError` or `TooLarge` if the size is too large.
    """
    size = min(first, most)
    seconds = _try(seconds_of, size)
    if seconds is None:
        while size > 1:
            size //= 2
            if _try(seconds_of, size) is not None:
                return size
        return None
    while 2 * size <= most:
        longer = _try(seconds_of, 2 * size)
        if longer is None or 2 * seconds < GAIN * longer:
            break
        size, seconds = 2 * size, longer
    return size


def find_batch_size(
    model: Autoencoder, samples: int, device: str, precision: Precision = "tf32"
) -> int:
    """Find the batch size for chunks of `samples` samples on a GPU."""
    found = search(
        lambda size: _seconds_on_gpu(model, size, samples, device, precision),
        model.spec.batch_size["cuda"],
        most_chunks(model.spec, samples),
    )
    torch.cuda.empty_cache()
    if found is None:
        raise ModelError(
            f"Model {model.spec.name}: one chunk of {samples / model.spec.sample_rate:.1f} s does "
            f"not fit into the memory of {device}: use shorter chunks (--chunk-seconds) or fewer "
            "workers per GPU."
        )
    return found


def most_chunks(spec: ModelSpec, samples: int) -> int:
    """Maximum number of chunks in a batch; at least one."""
    if spec.max_batch_samples is None:
        return LARGEST
    return max(1, min(LARGEST, spec.max_batch_samples // samples))


def check_batch(spec: ModelSpec, samples: int, size: int) -> None:
    """Raise `ConfigError` if `size` chunks of `samples` exceed the model's maximum on a GPU."""
    most = spec.max_batch_samples
    if most is not None and size * samples > most:
        raise ConfigError(
            f"{size} chunks of {samples / spec.sample_rate:.1f} s are too large a batch for "
            f"{spec.name} on a GPU (maximum {most / spec.sample_rate:g} s): lower --batch-size or "
            "--chunk-seconds."
        )


def check_whole(spec: ModelSpec, samples: int, device: str) -> None:
    """Raise `ConfigError` if `samples` are too many for a model to encode in one piece."""
    most = spec.max_batch_samples
    if most is not None and samples > most and device.startswith("cuda"):
        raise ConfigError(
            f"{samples / spec.sample_rate:.1f} s are too long for {spec.name} in one piece on a "
            f"GPU (maximum {most / spec.sample_rate:g} s): lower --max-seconds, or use --device "
            "cpu."
        )


def _try(seconds_of: Callable[[int], float], size: int) -> float | None:
    try:
        return seconds_of(size)
    except (torch.OutOfMemoryError, TooLarge):
        return None


def _seconds_on_gpu(
    model: Autoencoder, size: int, samples: int, device: str, precision: Precision
) -> float:
    """Time of a batch of noise: the best of three, because kernels are chosen in the first one."""
    torch.cuda.empty_cache()
    shape = size, model.spec.channels, samples
    audio = 0.1 * torch.randn(shape, dtype=torch.float32, device="cpu")
    best = float("inf")
    with numeric_mode(precision, device):
        for _ in range(3):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            model.encode(audio)
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    free, total = torch.cuda.mem_get_info(device)
    if free < SPARE * total:
        raise TooLarge
    return best
