"""The linear-cae package's encoder as its README runs it, without the fast path of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_attention() -> Iterator[None]:
    """Run `nn.MultiheadAttention` as in training, without the fast path of evaluation mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
