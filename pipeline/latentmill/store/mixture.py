"""A mix of records of a store, which is computed as latents and can be decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from latentmill.pictures.notebook import latent_html
from latentmill.record import FloatArray
from latentmill.text.shown import Shown


@dataclass(frozen=True, repr=False)
class Mix(Shown):
    """The latent of a sum of sounds.

    Attributes:
        gains: The gain of each record, by key.
        latent: `[channels, frames]`, float32.
        num_samples: Length of the audio in samples.
        sample_rate: Of the model, Hz.
    """

    gains: Mapping[str, float]
    latent: FloatArray = field(repr=False)
    num_samples: int
    sample_rate: int
    _decode: Callable[..., FloatArray] = field(repr=False, compare=False)
    _decode_start: Callable[[FloatArray, int], tuple[FloatArray, int] | None] = field(
        repr=False, compare=False
    )

    def audio(self, *, seed: int = 0, batch_size: int | None = None) -> FloatArray:
        """Decode the mix to audio `[channels, samples]` with the store's model.

        Args:
            seed: Seed of a stochastic decoder's noise.
            batch_size: Windows per forward pass; default 1 on a CPU, 4 on a GPU.
        """
        return self._decode(self.latent, self.num_samples, seed=seed, batch_size=batch_size)

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show."""
        return {
            "records": ", ".join(f"{key!r} x {gain:g}" for key, gain in self.gains.items()),
            "latent": f"{self.latent.dtype} {list(self.latent.shape)}",
            "duration": f"{self.num_samples / self.sample_rate:.2f} s",
        }

    def _repr_html_(self) -> str:
        start = self._decode_start(self.latent, self.num_samples)
        return super()._repr_html_() + latent_html(self.latent, None, start)
