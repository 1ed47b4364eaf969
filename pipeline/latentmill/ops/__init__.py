"""Latent arithmetic: what sounds added, scaled, faded and taken away are in latent space.

An affine encoder has E(x) = L(x) + c with c = E(0), the latent of silence. A sum of sounds
a_1 x_1 + ... + a_K x_K then has the latent

    z = sum(a_i z_i) + (1 - sum(a_i)) c

which is exact for an affine encoder. Every function takes the origin of the latents' store, which
also knows what the latents are (codes, means with standard deviations) and how linear the model
was measured to be; `origin=None` gives the raw form without c and without that knowledge.
"""

from latentmill.ops.arithmetic import gain, mix, mixup, subtract
from latentmill.ops.origin import Linearity, LinearityWarning, Origin
from latentmill.ops.time import crossfade, fade, fit

__all__ = [
    "Linearity",
    "LinearityWarning",
    "Origin",
    "crossfade",
    "fade",
    "fit",
    "gain",
    "mix",
    "mixup",
    "subtract",
]
