"""Checkpoints of a training run: written atomically, read without unpickling code."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentmill.errors import ConfigError
from latentmill.models.weights import LOAD_ERRORS
from latentmill.storage.storage import Storage
from latentmill.text.printing import one_line
from latentmill.training.settings import TrainSettings

_NAME = re.compile(r"step-(\d+)\.pt")


class Checkpoints:
    """The folder `checkpoints` of a run."""

    def __init__(self, out: Path, keep: int) -> None:
        self._folder, self._keep = out / "checkpoints", keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, then remove the oldest checkpoints."""
        data = io.BytesIO()
        torch.save(state, data)
        Storage(str(self._folder)).write(f"step-{step:09d}.pt", data.getvalue())
        for old in self._steps()[: -self._keep]:
            self._path(old).unlink(missing_ok=True)

    def clear_scratch(self) -> None:
        """Remove what runs that were killed while they wrote a checkpoint have left."""
        Storage(str(self._folder)).clear_scratch()

    def load(self, settings: TrainSettings, restore: Callable[[int, dict[str, Any]], None]) -> None:
        """Call `restore` with the newest state and its step, if there is one.

        Raises ConfigError if it does not load, or is of a run with other settings.
        """
        steps = self._steps()
        if not steps:
            return
        step, path = steps[-1], self._path(steps[-1])
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state["settings"], dict):
                raise TypeError
            check_same(state["settings"], settings.decisive(), self._folder)
            if state["step"] != step or step > settings.steps:
                raise ValueError(f"it is of step {state['step']!r}")
            restore(step, state)
        except LOAD_ERRORS as error:
            # The others' texts are Python's; PyTorch's advises to load files that can run code.
            own = isinstance(error, (RuntimeError, OSError, ValueError))
            reason = one_line(error) if own else "it is not a checkpoint of this run"
            raise ConfigError(
                f"{path} does not load ({reason}): delete it to resume from the one before, or "
                "use another folder."
            ) from error

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}.pt"

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)


def check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError if a run is resumed with another architecture or other settings."""
    changed = [name for name in now if now[name] != before.get(name)]
    if not changed:
        return
    name = next((n for n in ("model", "network") if n in changed), changed[0])
    kind = "another architecture" if name in ("model", "network") else "other settings"
    raise ConfigError(
        f"{folder} has checkpoints of {kind} ({name} was {before.get(name)!r}, is now "
        f"{now[name]!r}): use the same settings to resume, or another folder."
    )
