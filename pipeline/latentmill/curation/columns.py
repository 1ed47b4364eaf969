"""Values of a field for all records of a store."""

from __future__ import annotations

from typing import Any

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError
from latentmill.reader.fields import FIELDS, FieldReader
from latentmill.store.metadata import METADATA_SCHEMA, PREFIX
from latentmill.store.metadata_file import open_metadata
from latentmill.store.store import LatentStore


def values_of(store: LatentStore, name: str, option: str) -> list[Any]:
    """The values of a stored field, or of a name in the records' own metadata, in index order.

    A record without the name has None. `option` is the name of the option in the error.

    Raises:
        ConfigError: No record has the field.
    """
    if name in FIELDS and name != "metadata":
        return FieldReader(store, [name]).gather()[name].to_pylist()  # type: ignore[no-any-return]
    column = PREFIX + name
    opened = open_metadata(store)
    if opened is not None:
        with opened as file:
            if column in file.schema_arrow.names:
                table = file.read(columns=[column], use_threads=False)
                return table[column].to_pylist()  # type: ignore[no-any-return]
    texts = FieldReader(store, ["metadata"]).gather()["metadata"].to_pylist()
    every = [parse_json(text) for text in texts]
    if not any(name in own for own in every):
        known = sorted({name for own in every for name in own})
        raise ConfigError(
            f"{option} uses {name!r}, but no record of {store.url} has such a field: use one of "
            f"{', '.join([*METADATA_SCHEMA.names[:1], 'group', 'role', *known[:20]])}."
        )
    return [own.get(name) for own in every]
