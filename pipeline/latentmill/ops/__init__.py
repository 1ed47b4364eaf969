"""Latent arithmetic: adding, scaling, fading and subtracting sounds in latent space.

For an affine encoder E(x) = L(x) + c with c = E(0), the latent of silence. The latent of a sum of
sounds a_1 x_1 + ... + a_K x_K is then exactly

    z = sum(a_i z_i) + (1 - sum(a_i)) c

Every function takes the origin of the latents' store. The origin includes c, whether the latents
are codes or means with standard deviations, and the measured linearity of the model. With
`origin=None` the result is the raw form, without c and without checks.
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
