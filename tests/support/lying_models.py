"""A small honest model, and models that fail one check each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.models.base import Context, ModelSpec

HOP, CHANNELS = 64, 4
SPEC = ModelSpec(
    name="honest",
    sample_rate=8000,
    channels=1,
    latent_channels=CHANNELS,
    hop=HOP,
    overhang=0,
    sample_multiple=HOP,
    min_samples=HOP,
    context=Context(1, 1),
    stitch="trim",
    chunk_frames=500,
    overlap_frames=4,
    batch_size={"cpu": 1, "cuda": 4},
    scale_factor=1.0,
    stochastic_decoder=False,
)
WEIGHT = torch.randn(3 * HOP, CHANNELS, generator=torch.Generator().manual_seed(0)) / HOP**0.5


def features(audio: Tensor) -> Tensor:
    """Frames that depend on one hop more on each side; the last hop may be incomplete."""
    if audio.shape[1] != 1:
        raise RuntimeError(f"expected 1 channel, not {audio.shape[1]}")
    padded = F.pad(audio, (HOP, HOP + -audio.shape[-1] % HOP))
    return (padded[:, 0].unfold(-1, 3 * HOP, HOP) @ WEIGHT).transpose(1, 2).contiguous()


def sound(latents: Tensor, num_samples: int, seed: int = 0) -> Tensor:
    return latents[:, :1].repeat_interleave(HOP, dim=-1)[..., :num_samples]


@dataclass
class Model:
    spec: ModelSpec
    encode_with: Callable[[Tensor], Tensor]
    decode_with: Callable[[Tensor, int, int], Tensor]

    def encode(self, audio: Tensor) -> Tensor:
        return self.encode_with(audio)

    def decode(
        self, latents: Tensor, num_samples: int, *, seed: int = 0, positions: Any = None
    ) -> Tensor:
        return self.decode_with(latents, num_samples, seed)


@dataclass(frozen=True)
class Handle:
    spec: ModelSpec = SPEC
    encode_with: Callable[[Tensor], Tensor] = features
    decode_with: Callable[[Tensor, int, int], Tensor] = sound
    extra: Any = None

    def load(self, device: str) -> Model:
        return Model(self.spec, self.encode_with, self.decode_with)


@dataclass
class Noise:
    """A network that counts its calls, or keeps the audio of the last one."""

    calls: int = 0
    before: list[Tensor] = field(default_factory=list)

    def counting(self, audio: Tensor) -> Tensor:
        self.calls += 1
        return features(audio) * (1 + 0.01 * self.calls)

    def remembering(self, audio: Tensor) -> Tensor:
        last = self.before[-1] if self.before else torch.zeros(1)
        self.before[:] = [audio.abs().mean()]
        return features(audio) + last

    def decoding(self, latents: Tensor, num_samples: int, seed: int) -> Tensor:
        self.calls += 1
        return sound(latents, num_samples) * (1 + 0.01 * (self.calls % 7))


def noisy(latents: Tensor, num_samples: int, seed: int) -> Tensor:
    noise = torch.randn(1, 1, num_samples, generator=torch.Generator().manual_seed(seed))
    return sound(latents, num_samples) + noise


def drawing(audio: Tensor) -> Tensor:
    latents = features(audio)
    return latents + 0.1 * torch.randn_like(latents)


def louder(audio: Tensor) -> Tensor:
    audio *= 2
    return features(audio)


def _raise(error: Exception) -> Any:
    raise error


def _one_large(audio: Tensor) -> Tensor:
    latents = features(audio)
    latents[:, 0] *= 1e6
    return latents


@dataclass(frozen=True)
class Unloadable(Handle):
    def load(self, device: str) -> Model:
        raise ImportError("no package")


def refusing(samples: int, multiple: int = 1) -> Callable[[Tensor], Tensor]:
    def encode(audio: Tensor) -> Tensor:
        if audio.shape[-1] < samples or audio.shape[-1] % multiple:
            raise RuntimeError(f"cannot encode {audio.shape[-1]} samples")
        return features(audio)

    return encode


def _with_context_of_all(audio: Tensor) -> Tensor:
    return features(audio / (audio.square().mean((1, 2), keepdim=True).sqrt() + 1e-6))


def _silence_divides(audio: Tensor) -> Tensor:
    latents = features(audio)
    return latents * (
        audio.abs().amax((1, 2), keepdim=True) / audio.abs().amax((1, 2), keepdim=True)
    )


def _numpy_and_random(audio: Tensor) -> Tensor:
    np.random.rand()
    random.random()
    return features(audio)


def _in_decode(latents: Tensor, num_samples: int, seed: int) -> Tensor:
    return sound(latents, num_samples) + torch.randn(latents.shape[0], 1, num_samples)


def codes(audio: Tensor) -> Tensor:
    return (features(audio) * 8).round().clamp(-8, 7) + 8


def _spec(**changes: Any) -> ModelSpec:
    return replace(SPEC, **changes)


# By lie: the model, and its only sentence as a regular expression.
LIES: dict[str, tuple[Callable[[], Handle], str]] = {
    "hop": (
        lambda: Handle(_spec(hop=32, sample_multiple=32, min_samples=32)),
        r"encode returns \d+ frames for \d+ samples, but by the spec they have \d+: set hop=64 and "
        r"overhang=0\.",
    ),
    "overhang": (
        lambda: Handle(_spec(overhang=-64)),
        r"encode returns 1 frames for 64 samples, but by the spec they have 2: set hop=64 and "
        r"overhang=0\.",
    ),
    "multiple": (
        lambda: Handle(_spec(sample_multiple=16, min_samples=64), refusing(64, 64)),
        r"encode fails for 80 samples \(cannot encode 80 samples\), although the spec allows every "
        r"multiple of 16 from 64 on: set sample_multiple=64 and min_samples=64\.",
    ),
    "shortest": (
        lambda: Handle(SPEC, refusing(256)),
        r"encode fails for 192 samples \(cannot encode 192 samples\), although the spec claims "
        r"min_samples=64: set min_samples=256\.",
    ),
    "audio channels": (
        lambda: Handle(_spec(channels=2)),
        r"encode fails for audio of shape \[1, 2, \d+\], which the spec allows \(expected 1 "
        r"channel, not 2\): correct channels, sample_multiple or min_samples\.",
    ),
    "latent channels": (
        lambda: Handle(_spec(latent_channels=8)),
        r"encode returns 4 latent channels, but the spec claims 8: set latent_channels=4\.",
    ),
    "order": (
        lambda: Handle(SPEC, lambda audio: features(audio).transpose(1, 2)),
        r"encode returns a tensor of shape \[1, \d+, 4\] for audio of shape \[1, 1, \d+\], but "
        r"latents have the shape \[batch, channels, frames\]: change the order of the dimensions\.",
    ),
    "dtype": (
        lambda: Handle(SPEC, lambda audio: features(audio).half()),
        r"encode returns float16, but latents must be float32: convert them\.",
    ),
    "range": (
        lambda: Handle(SPEC, lambda audio: features(audio) * 1e6),
        r"Music at full scale gives latents up to \S+, but the largest float16 value is 65504: "
        r"lower scale_factor, or encode with --dtype float32\.",
    ),
    "music is NaN": (
        lambda: Handle(SPEC, lambda audio: features(audio).sqrt()),
        r"The latents of music are not finite \(NaN or infinity\): correct the model\.",
    ),
    "silence": (
        lambda: Handle(SPEC, _silence_divides),
        r"The latents of silence are not finite \(NaN or infinity\), so items with silence fail: "
        r"do not divide by a level that can be zero\.",
    ),
    "one value out of range": (
        lambda: Handle(SPEC, _one_large),
        r"Music at full scale gives latents up to \S+, but the largest float16 value is 65504: .*",
    ),
    "counts": (
        lambda: Handle(_spec(hop=0, min_samples=0)),
        r"The spec is inconsistent: hop, sample_multiple, min_samples, sample_rate, chunk_frames "
        r"must be at least 1\.",
    ),
    "no name": (
        lambda: Handle(SPEC, lambda audio: _raise(NameError("no torch"))),
        r"encode fails for audio of shape .* \(no torch\): .*",
    ),
    "another exception": (
        lambda: Handle(SPEC, decode_with=lambda z, n, seed: _raise(Exception("no decoder"))),
        r"Measuring decoding failed \(no decoder\): .*",
    ),
    "load": (
        Unloadable,
        r"Loading the model failed \(no package\): correct load\.",
    ),
    "hop and multiple": (
        lambda: Handle(_spec(hop=32, sample_multiple=16, min_samples=64), refusing(64, 64)),
        r"encode fails for \d+ samples \(.*\), although the spec allows every multiple of 16 from "
        r"64 on: set hop=64, overhang=0, sample_multiple=64, and min_samples=64\.",
    ),
    "a long minimum": (
        lambda: Handle(SPEC, refusing(4000)),
        r"encode fails for 3968 samples \(.*\), although the spec claims min_samples=64: set "
        r"min_samples=4032\.",
    ),
    "hop and a long minimum": (
        lambda: Handle(_spec(hop=32, sample_multiple=32, min_samples=32), refusing(4000)),
        r"encode fails for 3968 samples \(.*\), although the spec claims min_samples=32: set "
        r"hop=64, overhang=0, and min_samples=4000\.",
    ),
    "input": (
        lambda: Handle(SPEC, louder),
        r"encode changes the audio that it is given: copy it before you change it in place\.",
    ),
    "torch's generator": (
        lambda: Handle(SPEC, drawing),
        r"encode uses the global random numbers of torch, so that latents depend on what ran "
        r"before: use no noise, or a torch\.Generator of its own\.",
    ),
    "other generators": (
        lambda: Handle(SPEC, _numpy_and_random),
        r"encode uses the global random numbers of numpy, random, so .*",
    ),
    "noise of its own": (
        lambda: Handle(SPEC, Noise().counting),
        r"Encoding the same audio again gives other latents \(relative difference 0\.0\d+\): use "
        r"no noise \(the mean of a posterior\) and keep no state between calls\.",
    ),
    "state": (lambda: Handle(SPEC, Noise().remembering), r"Encoding the same audio again .*"),
    "batch size": (
        lambda: Handle(SPEC, lambda audio: features(audio) * (1 + 0.01 * len(audio))),
        r"4 equal elements in a batch get other latents than one alone \(relative difference "
        r"0\.03\): let nothing depend on the size of the batch\.",
    ),
    "neighbours": (
        lambda: Handle(
            _spec(context=None, stitch="crossfade"),
            lambda audio: features(audio) / (audio.abs().max() + 1e-9),
        ),
        r"Neighbours in a batch change latents \(relative difference 0\.\d+\): normalise each "
        r"element by its own values only\.",
    ),
    "context": (
        lambda: Handle(_spec(context=Context(1, 0))),
        r"Frames beyond the claimed context \(1 left, 0 right\) still differ from those of the "
        r"whole item \(by \S+ of their norm\): set context=Context\(1, 1\)\.",
    ),
    "context of all": (
        lambda: Handle(SPEC, _with_context_of_all),
        r"Frames beyond the claimed context \(1 left, 1 right\) still differ from those of the "
        r"whole item \(by \S+ of their norm\): set context=None and stitch=\"crossfade\", because "
        r"every frame differs\.",
    ),
    "codes that are none": (
        lambda: Handle(_spec(codebook_size=16)),
        r"Latents contain values that are not codes from 0 to 15: correct codebook_size, or set it "
        r"to None if latents are continuous\.",
    ),
    "codes without a codebook": (
        lambda: Handle(SPEC, codes),
        r"All latents are whole numbers, but the spec claims continuous latents: set codebook_size "
        r"if they are codes\.",
    ),
    "codebook size": (
        lambda: Handle(_spec(codebook_size=8), codes),
        r"Latents contain values that are not codes from 0 to 7: .*",
    ),
    "decode length": (
        lambda: Handle(SPEC, decode_with=lambda z, n, seed: sound(z, 10**9)),
        r"decode returns audio of shape \[1, 1, 128\] for 2 frames and num_samples=121, but must "
        r"return \[1, 1, 121\]: cut or pad it\.",
    ),
    "decoded audio is NaN": (
        lambda: Handle(SPEC, decode_with=lambda z, n, seed: sound(z, n).sqrt()),
        r"The decoded audio of music is not finite \(NaN or infinity\): correct the decoder\.",
    ),
    "a cut changes decoded audio": (
        lambda: Handle(SPEC, decode_with=lambda z, n, seed: sound(z, n) * n / 100),
        r"decode returns other audio if fewer samples are requested: decode all samples, then "
        r"cut\.",
    ),
    "decode's generator": (
        lambda: Handle(_spec(stochastic_decoder=True), decode_with=_in_decode),
        r"decode uses the global random numbers of torch, so that audio depends? on what ran "
        r"before: .*",
    ),
    "decode's noise": (
        lambda: Handle(SPEC, decode_with=Noise().decoding),
        r"Decoding again with the same seed gives other audio \(relative difference 0\.\d+\): draw "
        r"all noise from a torch\.Generator with the given seed\.",
    ),
    "a decoder with noise": (
        lambda: Handle(SPEC, decode_with=noisy),
        r"The decoded audio changes with the seed, but the spec claims stochastic_decoder=False: "
        r"set stochastic_decoder=True\.",
    ),
    "a decoder without noise": (
        lambda: Handle(_spec(stochastic_decoder=True)),
        r"The decoded audio does not change with the seed, but the spec claims "
        r"stochastic_decoder=True: set stochastic_decoder=False\.",
    ),
    "decoded neighbours": (
        lambda: Handle(SPEC, decode_with=lambda z, n, seed: sound(z, n) / z.abs().max()),
        r"The rest of a batch changes decoded audio \(relative difference 0\.\d+\): decode each "
        r"element independently\.",
    ),
    "handle": (
        lambda: Handle(SPEC, extra=lambda: None),
        r"The model's handle cannot be pickled \(.*\), but workers receive it by pickle: make it a "
        r"dataclass of plain values\.",
    ),
    "overlap": (
        lambda: Handle(_spec(overlap_frames=400)),
        r"The spec is inconsistent: overlap_frames must be at least the context and at most half "
        r"of chunk_frames\.",
    ),
    "chunk": (
        lambda: Handle(_spec(chunk_frames=8, min_samples=640)),
        r"The spec is inconsistent: encode must accept a chunk of chunk_frames \(512 samples\)\.",
    ),
    "stitch": (lambda: Handle(_spec(context=None)), r"The spec is inconsistent: stitch must .*"),
}


def lying() -> Handle:
    """For the command line: `python:support.lying_models:lying`."""
    return LIES["latent channels"][0]()
