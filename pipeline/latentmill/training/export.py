"""Writes trained models as folders that `trained:PATH` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from latentmill.models.families.trained import FOLDER, MANIFEST, Trained
from latentmill.training.architectures import Trainable


def write_model(out: Path, network: Trainable, trained: Trained) -> None:
    """Replace the folder `model` of a run; for a moment between two renames there is none."""
    target, new, old = (out / name for name in (FOLDER, f".{FOLDER}.new", f".{FOLDER}.old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    network.write(new)
    text = trained.model_dump_json(indent=2) + "\n"
    (new / MANIFEST).write_text(text, encoding="utf-8")
    if target.exists():
        target.replace(old)
    new.replace(target)
    shutil.rmtree(old, ignore_errors=True)
