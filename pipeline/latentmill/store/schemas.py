"""Generates files from the code: the folder `schemas/`, and `run/options.py`.

    make schemas

regenerates them; a test checks that they match the code.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, ByteSize

from latentmill.config import FIELD_SETTINGS, RunConfig
from latentmill.store.index import INDEX_SCHEMA
from latentmill.store.metadata import METADATA_SCHEMA
from latentmill.store.schema import RECORD_SCHEMA, Commit, DatasetInfo

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_files() -> dict[str, str]:
    """Return the files of `schemas/`: content by name."""
    return {
        "commit.schema.json": _json_schema(Commit),
        "config.schema.json": _json_schema(RunConfig),
        "dataset.schema.json": _json_schema(DatasetInfo),
        "index.arrow.txt": _arrow_schema(INDEX_SCHEMA),
        "metadata.arrow.txt": _arrow_schema(METADATA_SCHEMA),
        "record.arrow.txt": _arrow_schema(RECORD_SCHEMA),
    }


def _json_schema(model: type[BaseModel]) -> str:
    schema = {"$schema": DIALECT, **model.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _arrow_schema(schema: pa.Schema) -> str:
    """Format a schema with one line per column: `name: type`, and `not null` if required."""
    return "".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}\n" for f in schema)


_OPTIONS = '''"""Keyword settings of `encode` and `add`, for editors and type checkers.

Generated from `RunConfig` by `make schemas`. What each setting means: `latentmill encode --help`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class EncodeOptions(TypedDict, total=False):
    """Settings of `encode`; None is the same as omitting the setting."""

{encode}


class AddOptions(TypedDict, total=False):
    """Settings of `add`; None is the same as omitting the setting."""

{add}
'''


def encode_options() -> str:
    """Return the source of the module `run/options.py`."""
    arguments = ("source", "out")  # of `encode`; `model` is one of `add`
    names = [name for name in RunConfig.model_fields if name not in arguments]
    added = [name for name in FIELD_SETTINGS if name != "model"]
    return _OPTIONS.format(encode=_options(names), add=_options(added))


def _options(names: Sequence[str]) -> str:
    kinds = {name: _written(RunConfig.model_fields[name].annotation) for name in names}
    return "\n".join(
        f"    {name}: {kind if kind.endswith('None') else f'{kind} | None'}"
        for name, kind in kinds.items()
    )


def _written(kind: Any) -> str:
    """Format a type as Python source, including all types that validation converts."""
    origin, members = get_origin(kind), get_args(kind)
    if isinstance(kind, types.UnionType) or origin is Union:
        return " | ".join(map(_written, members))
    if origin is Literal:
        return f"Literal[{', '.join(json.dumps(one) for one in members)}]"
    if origin is tuple:
        return f"Sequence[{_written(members[0])}]"
    if origin is dict:
        return f"Mapping[{', '.join(map(_written, members))}]"
    if kind is ByteSize:
        return "int | str"
    return "None" if kind is types.NoneType else str(kind.__name__)


def main(root: Path) -> None:
    """Write the files into a checkout at `root`."""
    for name, text in schema_files().items():
        (root / "schemas" / name).write_text(text, encoding="utf-8")
    options = root / "pipeline" / "latentmill" / "run" / "options.py"
    options.write_text(encode_options(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
