"""The numeric mode of encoding: float32 or a faster mode. It is recorded in the store.

With `tf32` a GPU's tensor cores round the factors of float32 products to 10 bits of mantissa;
`bf16` and `fp16` run convolutions and matrix products under autocast. Models exclude from autocast
what needs float32 (front ends, normalisation, the latents).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

from latentmill.errors import ConfigError

Precision = Literal["float32", "tf32", "bf16", "fp16"]

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def pick_precision(wanted: Precision | None, device: str) -> Precision:
    """The numeric mode on a device; the default is `tf32` on a GPU and `float32` on a CPU."""
    on_gpu = device.startswith("cuda")
    if wanted == "tf32" and not on_gpu:
        raise ConfigError("Precision tf32 requires a GPU: use --precision float32 on the CPU.")
    return wanted or ("tf32" if on_gpu else "float32")


@contextmanager
def numeric_mode(precision: Precision, device: str) -> Iterator[None]:
    """Context manager in which a model on a device runs in a numeric mode.

    The flags for TF32 are global to the process. They are set for float32 too, because by default
    PyTorch uses TF32 for convolutions on a GPU.
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
