"""A LitData data set of one random window per item, for its StreamingDataLoader."""

from __future__ import annotations

from typing import Any

import torch
from litdata import StreamingDataset

from reader_contenders import CROP


class Windows(StreamingDataset):  # type: ignore[misc]
    """In a module of its own, since worker processes import it."""

    frames: list[int]

    def __getitem__(self, index: Any) -> torch.Tensor:
        item = int(getattr(index, "index", index))
        start = int(torch.randint(self.frames[item] - CROP + 1, ()))
        return torch.from_numpy(self.read_window(item, start, CROP)["latent"]).float()
