"""The option `posterior` of VAEs: store the mean of the posterior, or also its standard deviation.

An encoder's output has twice the channels of a latent: the means, then what the standard deviations
are computed from. Samples are drawn when the latents are read.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Posterior = Literal["mean", "mean+std"]


def softplus_posterior(moments: Tensor, std: bool) -> Tensor:
    """The mean, with `std` followed by the deviation, as `OobleckDiagonalGaussianDistribution`."""
    mean, scale = moments.chunk(2, dim=1)
    return torch.cat((mean, F.softplus(scale.float()) + 1e-4), dim=1) if std else mean


def gaussian_posterior(moments: Tensor, std: bool) -> Tensor:
    """The mean, with `std` followed by the deviation, as `DiagonalGaussianDistribution`."""
    mean, logvar = moments.chunk(2, dim=1)
    if not std:
        return mean
    return torch.cat((mean, torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0))), dim=1)


def mean_of(latents: Tensor, std: bool) -> Tensor:
    """The rows of the mean, which decoding uses."""
    return latents.chunk(2, dim=1)[0] if std else latents
