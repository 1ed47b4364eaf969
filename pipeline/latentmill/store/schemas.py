"""The contracts on disk as files that people and other languages read: the folder `schemas/`.

    python -m latentmill.store.schemas schemas

writes them anew from the code; a test compares them with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel

from latentmill.config import RunConfig
from latentmill.store.index import INDEX_SCHEMA
from latentmill.store.schema import RECORD_SCHEMA, Commit, DatasetInfo

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_files() -> dict[str, str]:
    """The files of `schemas/`: name and content."""
    return {
        "commit.schema.json": _json_schema(Commit),
        "config.schema.json": _json_schema(RunConfig),
        "dataset.schema.json": _json_schema(DatasetInfo),
        "index.arrow.txt": _arrow_schema(INDEX_SCHEMA),
        "record.arrow.txt": _arrow_schema(RECORD_SCHEMA),
    }


def _json_schema(model: type[BaseModel]) -> str:
    schema = {"$schema": DIALECT, **model.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _arrow_schema(schema: pa.Schema) -> str:
    """One line per column: `name: Arrow type`, and `not null` where it is required."""
    return "".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}\n" for f in schema)


def main(folder: Path) -> None:
    """Write the files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schema_files().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
