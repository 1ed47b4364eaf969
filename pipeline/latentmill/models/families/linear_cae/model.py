"""The models `lin-cae`, `lin-cae-2` and `m2l` of the package linear-cae.

B. Torres and others, "Learning Linearity in Audio Consistency Autoencoders via Implicit
Regularization", arXiv 2510.23530. Audio is transformed to a complex STFT with companded amplitudes;
the encoder produces one latent frame per 2**d STFT frames. The decoder is a consistency model that
starts from noise.

The package's `Autoencoder` is built from its classes and not by its `from_pretrained`, which does
not support revisions and local files. Its `encode` and `decode` are not called: `encode` registers
the encoder a second time (the state dict grows), splits batches into single chunks and disables
autocast regions around it; `decode` draws unseeded noise. Here the same modules are called in the
same order.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec, Value
from latentmill.models.checks import check_audio, check_device, check_latents, no_gradients
from latentmill.models.families.codec import check_scale_factor
from latentmill.models.families.linear_cae.files import (
    find_linear_cae,
    import_linear_cae,
    read_arguments,
)
from latentmill.models.families.linear_cae.lean import make_exact, make_lean
from latentmill.models.hub import Repo
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find_again,
    parse_repo,
    read_state,
)

CHUNK_FRAMES = 108  # 10.07 s
MAX_BATCH_SECONDS = 380  # an activation then has 2**31 elements, pytorch issue 117736
OVERLAP_FRAMES = 12  # the receptive field without GroupNorm is 12 to 13 frames on each side


@dataclass(frozen=True)
class LinearCaeHandle:
    """A model whose files are found and hashed; its decoder takes `diffusion_steps` steps.

    `loader` builds the parts of a `LinearCae` from the model's name, its files and the device.
    """

    spec: ModelSpec
    files: ModelFiles
    diffusion_steps: int
    loader: Callable[[str, ModelFiles, torch.device], Any]

    def load(self, device: str) -> LinearCae:
        name = self.spec.name
        chosen = check_device(name, device)
        parts = self.loader(name, find_again(name, self.files), chosen)
        return LinearCae(self.spec, parts, chosen, self.diffusion_steps)


def load(name: str, files: ModelFiles, device: torch.device) -> Any:
    """Build the package's model from its configuration and its state dict."""
    package, _ = import_linear_cae(name)
    arguments = read_arguments(name, package, files)
    state = read_state(name, files.paths["weights"])
    try:
        model = package.Autoencoder(*arguments.values(), name=name)
        model.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["weights"], error) from error
    model = model.eval().requires_grad_(False).to(device)
    make_lean(model.generator.encoder)
    return model


class LinearCae:
    """A consistency autoencoder on one device; implements the protocol `Autoencoder`.

    `model` has the package's parts: `frontend`, `generator` and `diffusion`.
    """

    def __init__(
        self, spec: ModelSpec, model: Any, device: torch.device, diffusion_steps: int
    ) -> None:
        self.spec = spec
        self._device = device
        self._frontend = model.frontend
        self._generator = model.generator
        self._diffusion = model.diffusion
        make_exact(self._generator.encoder)
        if device.type == "cuda":  # the memory order of convolutions on tensor cores
            self._generator.encoder.to(memory_format=torch.channels_last)
        self._steps = diffusion_steps

    @no_gradients
    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, 1, T]` to `[B, D, Z]`.

        An autocast region around the call affects only the encoder, because the front end's complex
        numbers need float32.
        """
        check_audio(self.spec, audio)
        wave = audio[:, 0].to(self._device)  # [B, T]
        with torch.autocast(self._device.type, enabled=False):
            spectrum = self._frontend.to_representation(wave)  # [B, 2, bins, STFT frames]
        latents: Tensor = self._generator.encoder(spectrum)
        return latents.float() * self.spec.scale_factor

    @no_gradients
    def decode(
        self,
        latents: Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        chosen = check_latents(self.spec, latents, num_samples, positions)
        noise = self._noise(latents.shape[2], seed, chosen)  # [B, steps, 2, bins, STFT frames]
        spectrum = self._reverse_diffusion(latents.to(self._device) / self.spec.scale_factor, noise)
        with torch.autocast(self._device.type, enabled=False):
            wave: Tensor = self._frontend.to_waveform(spectrum.float())  # [B, samples(Z)]
        return wave[:, None, :num_samples]

    def _reverse_diffusion(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The package's `Diffusion.reverse_diffusion`, with seeded noise in all steps."""
        diffusion, steps = self._diffusion, self._steps
        noisy = noise[:, 0] * self._generator.sigma_max
        for step in range(steps):
            sigma = diffusion.get_sigma(steps + 1 - step, steps + 1)
            clean: Tensor = self._generator.forward_generator(latents, noisy, sigma)
            if step + 1 < steps:
                next_sigma = diffusion.get_sigma(steps - step, steps + 1)
                noisy = diffusion.reverse_step(clean, noise[:, step + 1], next_sigma)
        return clean

    def _noise(self, frames: int, seed: int, positions: Sequence[int]) -> Tensor:
        """Standard normal noise `[B, steps, 2, bins, STFT frames]` on the model's device."""
        per_frame = self.spec.hop // self.spec.sample_multiple
        shape = (self._steps, self._generator.data_channels, self._generator.hop * 2, per_frame)
        noise = frame_noise(seed, positions, frames, shape).to(self._device)
        return noise.permute(0, 2, 3, 4, 1, 5).flatten(-2)


def frame_noise(seed: int, positions: Sequence[int], frames: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of consecutive latent frames, a pure function of seed and absolute position.

    It is drawn on the CPU, so that it is the same on every device. Each frame has its own generator
    (Philox, keyed by seed and position), so that the noise does not depend on the chunks.

    Args:
        seed: Any integer.
        positions: Position of the first frame, for each batch element.
        frames: Number of frames.
        shape: Shape of one frame's noise.

    Returns:
        Standard normal float32 `[B, frames, *shape]`.
    """
    noise = np.empty((len(positions), frames, *shape), dtype=np.float32)
    mask = 2**64 - 1
    seed = operator.index(seed)  # also a numpy integer, which has no bitwise `and` with the mask
    firsts = [operator.index(position) for position in positions]

    def fill(index: tuple[int, int]) -> None:
        element, frame = index
        key = np.array([seed & mask, (firsts[element] + frame) & mask], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        generator.standard_normal(dtype=np.float32, out=noise[element, frame])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy releases the GIL
        deque(pool.map(fill, np.ndindex(len(positions), frames)), maxlen=0)
    return torch.from_numpy(noise)


def build(
    name: str,
    *,
    repo: str | None = None,
    revision: str | None = None,
    scale_factor: float | None = None,
    diffusion_steps: int = 1,
) -> LinearCaeHandle:
    """Find a model's files and make its handle; docs/models.md describes the options.

    The default repository and scale factor are the package's. The models were trained for one
    diffusion step.
    """
    check_diffusion_steps(name, diffusion_steps)
    if scale_factor is not None:
        check_scale_factor(name, scale_factor)
    package, version = import_linear_cae(name)
    where = Repo(package.HF_REPO, revision) if repo is None else parse_repo(name, repo, revision)
    files = find_linear_cae(name, package, where)
    arguments = read_arguments(name, package, files)
    scale = float(package.id_to_scale_factor[name] if scale_factor is None else scale_factor)
    try:
        spec = _spec(name, arguments, files, scale, diffusion_steps, version)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["generator"].parent, error) from error
    return LinearCaeHandle(spec, files, diffusion_steps, load)


lin_cae = partial(build, "lin-cae")
lin_cae_2 = partial(build, "lin-cae-2")
m2l = partial(build, "m2l")


def check_diffusion_steps(name: str, steps: int) -> None:
    """Raise `ModelError` unless there is at least one step."""
    if steps < 1:
        raise ModelError(f"Model {name}: option diffusion_steps must be at least 1, not {steps}.")


def consistency_spec(
    name: str,
    *,
    sample_rate: int,
    hop_size: int,
    frame_length: int,
    halvings: int,
    latent_channels: int,
    scale_factor: float,
    identity: Mapping[str, Value],
    provenance: Mapping[str, Value],
) -> ModelSpec:
    """The spec of a consistency autoencoder.

    A chunk of T samples has F = (T - frame_length) / hop_size + 1 STFT frames. Each of the
    `halvings` convolutions with stride 2 halves their number, rounding up.
    """
    return ModelSpec(
        name=name,
        sample_rate=sample_rate,
        channels=1,
        latent_channels=latent_channels,
        hop=hop_size * 2**halvings,
        overhang=frame_length - hop_size,
        sample_multiple=hop_size,
        min_samples=frame_length,
        context=None,
        stitch="crossfade",
        chunk_frames=CHUNK_FRAMES,
        overlap_frames=OVERLAP_FRAMES,
        batch_size={"cpu": 1, "cuda": 8},
        scale_factor=scale_factor,
        stochastic_decoder=True,
        identity=identity,
        provenance=provenance,
        max_batch_samples=MAX_BATCH_SECONDS * sample_rate,
    )


def _spec(
    name: str,
    arguments: Mapping[str, Mapping[str, Any]],
    files: ModelFiles,
    scale: float,
    diffusion_steps: int,
    version: str,
) -> ModelSpec:
    frontend, generator = arguments["frontend"], arguments["generator"]
    return consistency_spec(
        name,
        sample_rate=frontend["sample_rate"] or 44100,  # optional in the package
        hop_size=frontend["hop_size"],
        frame_length=frontend["hop_size"] * frontend["n_fft_factor"],
        halvings=list(generator["freq_downsample_list"]).count(0),
        latent_channels=generator["bottleneck_channels"],
        scale_factor=scale,
        identity={
            "package": "linear-cae",
            "package_version": version,
            **files.identity,
            "scale_factor": scale,
        },
        provenance={**files.provenance, "diffusion_steps": diffusion_steps},
    )
