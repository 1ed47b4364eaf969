"""Random weights of the real linear-cae classes, laid out as the Hugging Face hub has them.

    python tests/support/linear_cae_weights.py --size full DIR
    HF_HOME=DIR HF_HUB_OFFLINE=1 latentmill encode ... --model lin-cae

`tiny` has the trained models' front end, downsampling and latent shape, but few channels;
`full` has their architecture: the encoder costs 46 GFLOP per second of audio, counted by torch's
FlopCounterMode after `torch.backends.mha.set_fastpath_enabled(False)`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import yaml
from linear_cae.components.generator import UNet
from linear_cae.inference import HF_REPO, id_to_hash

if TYPE_CHECKING:
    import pytest

FRONTEND = {
    "hop_size": 512,
    "n_fft_factor": 4,
    "alpha_rescale": 0.65,
    "beta_rescale": 0.34,
    "sample_rate": 44100,
}
GENERATORS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hop": 512,
        "base_channels": 4,
        "bottleneck_base_channels": 32,
        "cond_channels": 16,
        "layers_list": [1, 1, 1, 1, 1],
    },
    "full": {"hop": 512},  # the rest are the class's defaults
}
DIFFUSION = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
NORMS = (torch.nn.GroupNorm,)


def random_state(size: str, seed: int) -> dict[str, torch.Tensor]:
    """State dict `generator.* + frontend.*` with every parameter random, zero-initialised or not.

    Weights keep the variance (1 / fan-in), norms and gains stay near 1, and the encoder's last
    convolution is scaled for a standard deviation of about 0.3 before the tanh.
    """
    generator = UNet(**GENERATORS[size])
    random = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, m in generator.named_modules() if isinstance(m, NORMS)} | {
        "encoder.gain.scale"
    }
    state = {"frontend.window": torch.hann_window(FRONTEND["hop_size"] * FRONTEND["n_fft_factor"])}
    for name, parameter in generator.state_dict().items():
        noise = torch.randn(parameter.shape, generator=random)
        if name in norms:
            value = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            value = 0.05 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        if name == "encoder.conv_out.weight":
            value *= 0.5
        state[f"generator.{name}"] = value
    return state


def write_folder(root: Path, name: str = "lin-cae", size: str = "tiny", seed: int = 0) -> Path:
    """Write a model's four files into `root/{hash}_weights`, as the hub repository holds them."""
    folder = root / f"{id_to_hash[name]}_weights"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_state(size, seed), folder / "autoencoder_inference_model_last.pth")
    parts = {"frontend": FRONTEND, "generator": GENERATORS[size], "diffusion": DIFFUSION}
    for part, arguments in parts.items():
        (folder / f"{part}_kwargs_last.yaml").write_text(yaml.safe_dump(arguments))
    return folder


def write_cache(
    hf_home: Path, names: Sequence[str] = ("lin-cae",), size: str = "tiny", seed: int = 0
) -> Path:
    """Write models into the cache layout below `hf_home`, as if they had been downloaded.

    Returns:
        The snapshot: the models' folders lie in it, its name is the revision.
    """
    repo = hf_home / "hub" / f"models--{HF_REPO.replace('/', '--')}"
    revision = hashlib.sha1(f"{sorted(names)} {size} {seed}".encode()).hexdigest()
    snapshot = repo / "snapshots" / revision
    for name in names:
        write_folder(snapshot, name, size, seed)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(revision)
    return snapshot


def use_cache(patch: pytest.MonkeyPatch, hf_home: Path) -> None:
    """Let huggingface_hub, which read its variables at import, use another cache, offline."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hf_home / "hub"))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random linear-cae weights as an HF_HOME.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=sorted(GENERATORS), default="tiny")
    parser.add_argument("--name", nargs="+", choices=sorted(id_to_hash), default=["lin-cae"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    snapshot = write_cache(args.directory, args.name, args.size, args.seed)
    print(f"wrote {snapshot}\nuse it with HF_HOME={args.directory} HF_HUB_OFFLINE=1")


if __name__ == "__main__":
    main()
