"""The numeric mode of encoding: float32, or something faster that is recorded with the store.

`tf32` lets a GPU's tensor cores round the factors of float32 products to 10 bits of mantissa;
`bf16` and `fp16` run convolutions and matrix products under autocast. The adapters keep what
needs float32 (front ends, normalisation, the latents) out of it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

from latentmill.errors import ConfigError

Precision = Literal["float32", "tf32", "bf16", "fp16"]

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def pick_precision(wanted: Precision | None, device: str) -> Precision:
    """The numeric mode on a device: what is asked for, else `tf32` on a GPU and `float32` on a CPU.

    Raises:
        ConfigError: The device does not have that mode.
    """
    on_gpu = device.startswith("cuda")
    if wanted == "tf32" and not on_gpu:
        raise ConfigError("Precision tf32 is a mode of GPUs: use float32 on device cpu.")
    return wanted or ("tf32" if on_gpu else "float32")


@contextmanager
def numeric_mode(precision: Precision, device: str) -> Iterator[None]:
    """Run a model on a device in a numeric mode.

    The switches for TF32 are global to the process. They are set for float32, too: PyTorch's own
    default lets convolutions on a GPU use TF32.
    """
    import torch  # slow to import, and not needed to read a store

    dtype = _AUTOCAST.get(precision)
    kind = device.partition(":")[0]
    autocast = nullcontext() if dtype is None else torch.autocast(kind, dtype=getattr(torch, dtype))
    if kind != "cuda":
        with autocast:
            yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "float32"
    try:
        with autocast:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
