"""The device of a model. A missing GPU is an error and never replaced by a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latentmill.errors import ConfigError
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

if TYPE_CHECKING:  # imports torch
    from latentmill.models.base import Autoencoder, ModelHandle

_log = get_logger("models")


def pick_device(wanted: str) -> str:
    """The torch device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    import torch  # slow to import, and not needed to read a store

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"invalid --device {wanted!r}: use auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        advice = "install a CUDA build of torch, or use --device cpu"
        raise ConfigError(
            f"--device {wanted} is not available (torch {torch.__version__} finds "
            f"{counted(count, 'GPU')}): {f'use cuda:0 to cuda:{count - 1}' if count else advice}."
        )
    return wanted


def load_model(handle: ModelHandle, device: str) -> Autoencoder:
    """Load a model, and log how long it took."""
    began = time.perf_counter()
    model = handle.load(device)
    seconds = time.perf_counter() - began
    _log.debug("loaded the model %s on %s in %.1f s", handle.spec.name, device, seconds)
    return model


# Settings with which glibc keeps the memory of freed tensors for new ones, as torch does on a GPU:
# no mmap, no trimming, and one arena (other arenas cannot hold a large tensor). glibc reads them
# when a process starts. Without them it returns each large tensor to the system, and new pages for
# the next one take a third of the time of an encoder with activations of hundreds of megabytes.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables of a worker, without those that the user has set."""
    return {name: value for name, value in KEEP_FREED_MEMORY.items() if name not in environ}


def trim_memory() -> bool:
    """Return unused memory to the system, if this process keeps it (`KEEP_FREED_MEMORY`).

    Tensors of changing sizes leave holes in which later tensors do not fit, so that the memory of
    the process grows: by 2.3 GB after lin-cae has encoded 27 chunks of different lengths. The
    result is False if the process does not keep freed memory.
    """
    kept = os.environ.get("MALLOC_MMAP_MAX_") == KEEP_FREED_MEMORY["MALLOC_MMAP_MAX_"]
    if not kept or platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
