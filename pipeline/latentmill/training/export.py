"""Writes trained models as folders that `trained:PATH` loads."""

from __future__ import annotations

from pathlib import Path

from latentmill.models.base import Value
from latentmill.models.families.conv import ConvAutoencoder
from latentmill.models.families.trained import MANIFEST, WEIGHTS, Trained


def write_conv(
    folder: Path,
    network: ConvAutoencoder,
    *,
    run: str,
    step: int,
    linearity: dict[str, Value] | None,
) -> None:
    """Write `model.safetensors` and, last, `trained.json`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }
    save_file(state, folder / WEIGHTS)
    write_manifest(
        folder,
        Trained(
            architecture="conv",
            network=network.settings.model_dump(mode="json"),
            run=run,
            step=step,
            linearity=linearity,
        ),
    )


def write_manifest(folder: Path, trained: Trained) -> None:
    (folder / MANIFEST).write_text(trained.model_dump_json(indent=2) + "\n", encoding="utf-8")
