"""A store, and a field that is added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentmill.run.add import run_add
from latentmill.run.run import RunSummary

OPTIONS = {"hop": 100, "sample_rate": 16000}


def added(store: Path, name: str = "second", **options: Any) -> RunSummary:
    """Add a field with another rate and other channels than the store."""
    given = {"model": "mdct", "model_options": OPTIONS, "device": "cpu", "threads": 1}
    return run_add(str(store), name, given | options)


def files(store: Path) -> dict[str, tuple[int, bytes]]:
    """The files of a store except those of fields, with the times at which they were written."""
    return {
        str(path.relative_to(store)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in store.rglob("*")
        if path.is_file() and "fields" not in path.relative_to(store).parts
    }
