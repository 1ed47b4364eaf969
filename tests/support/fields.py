"""A store, and a field that is added to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill.cli import show_status
from latentmill.fields.status import FieldStatus
from latentmill.models.embedder import EmbedderSpec
from latentmill.run.add import run_add
from latentmill.run.run import RunSummary
from latentmill.store.store import open_store

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


def state(store: Path, name: str = "second") -> FieldStatus:
    found = show_status.StoreStatus.of(open_store(str(store))).fields
    return next(one for one in found if one.name == name)


def write_import(path: Path, rows: dict[str, Any]) -> Path:
    """Write values in the format of the path's extension; none: a folder of .npy files."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"key": list(rows), "embedding": list(rows.values())}), path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"id": key, "values": value}) for key, value in rows.items())
        path.write_text("\n".join(lines))
    else:
        for key, value in rows.items():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{key}.npy", np.array(value, np.float32))
    return path


class Given:
    """An embedder of latents or texts that is set by each test."""

    def __init__(self, spec: EmbedderSpec, embed: Any) -> None:
        self.spec, self._embed = spec, embed

    def load(self, device: str) -> Given:
        del device
        return self

    def embed(self, values: Any) -> list[Any]:
        return [self._embed(value) for value in values]


def given(monkeypatch: pytest.MonkeyPatch, spec: EmbedderSpec, embed: Any) -> str:
    """The name of such a model."""
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "made", lambda: Given(spec, embed), raising=False)
    return f"python:{__name__}:made"
