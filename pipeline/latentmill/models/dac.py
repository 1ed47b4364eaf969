"""The model `dac:REPO`: the Descript Audio Codec, as transformers has it.

R. Kumar and others, "High-Fidelity Audio Compression with Improved RVQGAN", NeurIPS 2023. The
latents are the encoder's, before quantisation: 1024 channels for the published models, twice as
many bytes in 16 bits as the audio has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import ModelSpec, Value
from latentmill.models.codec import (
    CodecHandle,
    Network,
    Output,
    as_indices,
    check_output,
    dac_encoder_context,
    with_quantiser,
)
from latentmill.models.transformers_codec import find_model, load_model
from latentmill.models.weights import ModelFiles

CHUNK_SECONDS = 10.0


class DacNetwork:
    """`DacModel`; see `QuantisingNetwork`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        """The encoder's output."""
        latents: Tensor = self._model.encoder(audio)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's output."""
        audio: Tensor = self._model.decoder(latents)
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        """Codes of all codebooks."""
        codes: Tensor = self._model.quantizer(latents)[1]
        return codes.float()

    def dequantise(self, codes: Tensor) -> Tensor:
        """The sum of the codebooks' entries."""
        indices = as_indices(codes, self._model.config.codebook_size)
        latents: Tensor = self._model.quantizer.from_codes(indices)[0]
        return latents


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> Network:
    """Build the network; see `Loader`. The options are `build`'s."""
    return with_quantiser(DacNetwork(load_model(name, "dac", files, device)), **options)


def build(
    repo: str,
    *,
    revision: str | None = None,
    scale_factor: float = 1.0,
    quantise: bool = False,
    output: Output = "latents",
) -> CodecHandle:
    """Find the model's files and make its handle.

    Args:
        repo: Hub repository, local folder, or local weights file beside its `config.json`.
        revision: Branch, tag or commit of a hub repository.
        scale_factor: What latents are multiplied by.
        quantise: Whether decoding quantises the latents first, as the codec does; the stored
            latents are the same.
        output: `latents`: those before quantisation. `codes`: the quantiser's codes
            `[codebooks, frames]`, whole numbers.

    Raises:
        ModelError: The package or the weights are missing, they are another model's, or an option
            has no meaning for codes.
    """
    name = f"dac:{repo}"
    scale = check_output(name, output, scale_factor, quantise)
    codes = output == "codes"
    files, config, version = find_model(name, "dac", repo, revision)
    context = dac_encoder_context(config.downsampling_ratios)
    hop, rate = config.hop_length, config.sampling_rate
    spec = ModelSpec(
        name="dac",
        sample_rate=rate,
        channels=1,
        latent_channels=config.n_codebooks if codes else config.hidden_size,
        hop=hop,
        overhang=0,
        sample_multiple=hop,
        min_samples=hop,
        context=context,
        stitch="trim",
        chunk_frames=max(4 * context, round(CHUNK_SECONDS * rate / hop)),
        overlap_frames=2 * context,
        batch_size={"cpu": 1, "cuda": 16},
        scale_factor=scale,
        stochastic_decoder=False,
        identity={
            "package": "transformers",
            "package_version": version,
            "output": output,
            **files.identity,
        },
        provenance={**files.provenance, "quantise": quantise},
        codebook_size=config.codebook_size if codes else None,
    )
    return CodecHandle(spec, files, load, {"quantise": quantise, "output": output})
