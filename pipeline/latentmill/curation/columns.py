"""Values of a field for all records of a store."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError
from latentmill.reader.fields import FIELDS, gather
from latentmill.store.metadata import METADATA_SCHEMA, PREFIX
from latentmill.store.metadata_file import open_metadata
from latentmill.store.store import LatentStore


def stored_values(store: LatentStore, name: str) -> list[Any]:
    """The values of a stored field in index order."""
    return gather(store, [name])[name].to_pylist()  # type: ignore[no-any-return]


def values_of(store: LatentStore, name: str, option: str) -> list[Any]:
    """The values of a stored field, or of a name in the records' own metadata, in index order.

    A record without the name has None. `option` is the name of the option in the error.

    Raises:
        ConfigError: No record has the field.
    """
    if name in FIELDS and name != "metadata":
        stored = stored_values(store, name)
        if all(value is None for value in stored):
            raise ConfigError(
                f"{option} uses {name!r}, but no record of {store.url} has a value of this field: "
                "use another field, or leave out the option."
            )
        return stored
    column = PREFIX + name
    opened = open_metadata(store)
    if opened is not None:
        with opened as file:
            schema = file.schema_arrow
            # A column of text may have values of other types as JSON, in which 5 is like "5".
            if column in schema.names and schema.field(column).type != pa.string():
                values = file.read(columns=[column], use_threads=False)[column]
                if values.null_count < len(values):
                    return values.to_pylist()  # type: ignore[no-any-return]
    texts = gather(store, ["metadata"])["metadata"].to_pylist()
    found, known = [], set[str]()
    for text in texts:
        own = parse_json(text)
        known |= own.keys()
        found.append(own.get(name))
    if name not in known:
        names = [*METADATA_SCHEMA.names[:1], "group", "role", *sorted(known)[:20]]
        raise ConfigError(
            f"{option} uses {name!r}, but no record of {store.url} has such a field: use one of "
            f"{', '.join(names)}."
        )
    return found
