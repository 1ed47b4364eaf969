"""The metrics of a training run: `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentmill.errors import ConfigError
from latentmill.storage.storage import Storage
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

FILE = "metrics.jsonl"

_log = get_logger("training")


class MetricsLog:
    """Appends one JSON object per logged step.

    A resumed run first removes the lines of the steps that it repeats (`start` and later), and
    damaged ones.
    """

    def __init__(self, out: Path, *, start: int, tensorboard: bool) -> None:
        kept = [line for line in read_metrics(out) if line["step"] < start]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        storage = Storage(str(out))
        storage.clear_scratch()  # of runs that were killed here
        storage.write(FILE, text.encode())
        self._file = (out / FILE).open("a", encoding="utf-8")
        self._board = _board(out, start) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; damaged ones, such as a last one that was cut, are skipped."""
    path = out / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    found = [line for line in map(_parsed, lines) if line is not None]
    if len(found) < len(lines):
        _log.warning("%s: skipped %s", path, counted(len(lines) - len(found), "damaged line"))
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line.decode())
    except ValueError:
        return None
    valid = isinstance(values, dict) and isinstance(values.get("step"), int)
    return values if valid else None


def _board(out: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard: true needs a package: run `pip install 'latentmill[training]'`."
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=start)
