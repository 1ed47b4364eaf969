"""latentmill: audio corpora to latent datasets, exactly once, and back again.

import latentmill as lm

lm.encode("corpus", "latents", model="lin-cae")
store = lm.open("latents")
record = store["album/song"]
audio = store.decode("album/song", seed=0)
mixed = lm.mix([store["a"].latent, store["b"].latent], gains=[1.0, 0.5], origin=store.origin)
"""

from latentmill.config import RunConfig, load_config
from latentmill.errors import LatentmillError
from latentmill.ops import Origin, fit, gain, mix, subtract
from latentmill.record import Record
from latentmill.run import RunSummary, encode
from latentmill.store.store import LatentStore
from latentmill.store.store import open_store as open  # noqa: A004  lm.open(...) reads best
from latentmill.version import __version__

__all__ = [
    "LatentStore",
    "LatentmillError",
    "Origin",
    "Record",
    "RunConfig",
    "RunSummary",
    "__version__",
    "encode",
    "fit",
    "gain",
    "load_config",
    "mix",
    "open",
    "subtract",
]
