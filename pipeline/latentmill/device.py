"""Where a model runs. A GPU that was asked for and is not there is an error, never a CPU."""

from __future__ import annotations

import torch

from latentmill.errors import ConfigError


def pick_device(wanted: str) -> str:
    """The torch device for `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: There is no such device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Device {wanted!r} is none of auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Device {wanted} was asked for, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs: install a CUDA build of torch, or use device cpu."
        )
    return wanted
