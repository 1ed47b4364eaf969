"""The batch size, found by trying: as many chunks a forward pass as fit and still help.

Latents depend on the batch size in the last digits (6e-6), so what is found is settled once per
store; see `engine/worker.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from latentmill.errors import ConfigError, ModelError
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.inference.precision import Precision, numeric_mode

LARGEST = 1024
SPARE = 0.1  # of the memory: items shorter than a chunk are packed more to a batch
GAIN = 1.05  # chunks a second that twice the batch must at least give


class TooLarge(Exception):  # noqa: N818  an answer, no fault
    """A batch fits into memory, but leaves too little of it."""


def search(seconds_of: Callable[[int], float], first: int, most: int) -> int | None:
    """The best batch size among `first` times powers of two.

    Args:
        seconds_of: Runs a batch of a size and gives its time; raises `torch.OutOfMemoryError` or
            `TooLarge` where it is too large.
        first: The size to begin with.
        most: The largest allowed.

    Returns:
        A size that fits: from `first` on it is doubled while chunks a second grow by `GAIN`, or
        halved until it fits. None if not even one chunk fits.
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
    """Find the batch size for chunks of so many samples on a GPU.

    Raises:
        ModelError: Not even one chunk fits into the GPU's memory.
    """
    found = search(
        lambda size: _seconds_on_gpu(model, size, samples, device, precision),
        model.spec.batch_size["cuda"],
        most_chunks(model.spec, samples),
    )
    torch.cuda.empty_cache()
    if found is None:
        raise ModelError(
            f"Model {model.spec.name}: one chunk of {samples / model.spec.sample_rate:.1f} s does "
            f"not fit into the memory of {device}: use shorter chunks (chunk_seconds) or fewer "
            "workers a GPU."
        )
    return found


def most_chunks(spec: ModelSpec, samples: int) -> int:
    """How many chunks a batch may hold at all; at least one."""
    if spec.max_batch_samples is None:
        return LARGEST
    return max(1, min(LARGEST, spec.max_batch_samples // samples))


def check_batch(spec: ModelSpec, samples: int, size: int) -> None:
    """Refuse a batch that the model cannot take on a GPU, whatever its memory.

    Args:
        spec: The model's.
        samples: Of a chunk.
        size: Chunks in a batch.

    Raises:
        ConfigError: There are more samples than `spec.max_batch_samples`.
    """
    most = spec.max_batch_samples
    if most is not None and size * samples > most:
        raise ConfigError(
            f"{size} chunks of {samples / spec.sample_rate:.1f} s are more than {spec.name} can "
            f"take at once on a GPU, {most / spec.sample_rate:g} s: lower --batch-size or "
            "--chunk-seconds."
        )


def _try(seconds_of: Callable[[int], float], size: int) -> float | None:
    try:
        return seconds_of(size)
    except (torch.OutOfMemoryError, TooLarge):
        return None


def _seconds_on_gpu(
    model: Autoencoder, size: int, samples: int, device: str, precision: Precision
) -> float:
    """Time of a batch of noise, the first run, in which kernels are chosen, not counted."""
    torch.cuda.empty_cache()
    audio = 0.1 * torch.randn(size, model.spec.channels, samples)
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
