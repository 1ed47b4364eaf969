"""SQL over the records of a store, by DuckDB: their fields and metadata, without latents."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from latentmill.errors import ConfigError
from latentmill.storage.scratch import check_replaceable, partial_file
from latentmill.storage.storage import writing
from latentmill.store.metadata_file import metadata_source
from latentmill.store.store import LatentStore, open_store
from latentmill.text.log import get_logger
from latentmill.text.redact import redact_value

FILE_TYPES = (".csv", ".parquet")
_MEMORY = "4GB"  # of DuckDB, which cannot use temporary files here
_BATCH = 10_000  # rows
_READ = "a query is one SELECT statement about the table `records`."

_log = get_logger("curation")

# A store is never changed by a query, and a query reads nothing but the store.
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",  # of names by variables of Python
    "memory_limit": _MEMORY,
}


@dataclass(frozen=True)
class Rows:
    """The first rows of a result, as JSON values.

    Attributes:
        columns: Names of the columns.
        rows: The rows.
        total: Number of rows of the whole result.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    total: int


def query(store: str | os.PathLike[str] | LatentStore, sql: str) -> pa.Table:
    """Run a SELECT statement over the table `records` and return the result.

    Args:
        store: The store. Its records are the rows of `records`, with the columns of `store.table`.
        sql: One SELECT statement.

    Raises:
        ConfigError: The statement is invalid or not a SELECT, or DuckDB is not installed.
        StoreError: The store's metadata file is damaged.
    """
    with _result(store, sql) as result:
        return result.read_all()


def write_query(
    store: str | os.PathLike[str] | LatentStore, sql: str, file: Path, *, overwrite: bool = False
) -> int:
    """Write the result of a query to a CSV or Parquet file; return the number of its rows.

    Lists and objects are JSON in CSV.
    """
    if file.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"{file} must end in .csv or .parquet.")
    kind = file.suffix.lower().removeprefix(".")
    count = 0
    with writing(str(file)):
        check_replaceable(file)
        if file.exists() and not overwrite:
            raise ConfigError(f"{file} exists: choose another output path, or add --overwrite.")
        with _result(store, sql) as result, partial_file(file) as partial, _converted(kind):
            as_csv = kind == "csv"
            schema = _flat(result.schema) if as_csv else result.schema
            writer = pyarrow.csv.CSVWriter if as_csv else pq.ParquetWriter
            with writer(str(partial), schema) as out:
                for batch in result:
                    count += len(batch)
                    out.write(_flat_batch(batch, schema) if as_csv else batch)
            partial.replace(file)
    return count


@contextlib.contextmanager
def _converted(kind: str) -> Iterator[None]:
    """Turn errors of Arrow about types that a file cannot have into errors for users."""
    try:
        yield
    except pa.ArrowException as error:
        raise ConfigError(
            f"{kind} files cannot contain a column of the result ({_sentence(str(error))}): "
            "convert it with CAST(COLUMN AS VARCHAR)."
        ) from error


def first_rows(
    store: str | os.PathLike[str] | LatentStore, sql: str, limit: int | None = None
) -> Rows:
    """The first rows of the result of a query, or all; secrets in URLs are masked."""
    rows: list[tuple[Any, ...]] = []
    total = 0
    with _result(store, sql) as result:
        for batch in result:
            wanted = len(batch) if limit is None else max(0, min(len(batch), limit - len(rows)))
            columns = [_values(column.slice(0, wanted)) for column in batch.columns]
            rows += [tuple(map(_plain, row)) for row in zip(*columns, strict=True)]
            total += len(batch)
        return Rows(tuple(result.schema.names), tuple(rows), total)


@contextlib.contextmanager
def _result(
    store: str | os.PathLike[str] | LatentStore, sql: str
) -> Iterator[pa.RecordBatchReader]:
    try:
        import duckdb
    except ImportError:
        raise ConfigError("query needs DuckDB: run `pip install 'latentmill[query]'`.") from None
    opened = store if isinstance(store, LatentStore) else open_store(store)
    with contextlib.closing(duckdb.connect(":memory:", config=_SETTINGS)) as connection:
        try:
            sql.encode()  # arguments that are not text have surrogates
            statements = connection.extract_statements(sql)
            if len(statements) != 1:
                raise ConfigError(f"found {len(statements)} statements: {_READ}")
            (statement,) = statements
            if statement.type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
                raise ConfigError(f"{statement.type.name} is not allowed: {_READ}")
            _register(connection, _records(opened))
            connection.execute("SET lock_configuration = true")
            relation = _interruptible(connection, lambda: connection.sql(statement).materialize())
            yield relation.to_arrow_reader(_BATCH)
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"character {error.start + 1} of the query is not valid UTF-8: remove it, or run "
                "the command in a terminal that uses UTF-8."
            ) from error
        except duckdb.PermissionException as error:
            raise ConfigError(
                "a query reads the table `records` only, no files: to write the result to a file, "
                "add -o FILE."
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise ConfigError(
                f"the query needs more than {_MEMORY} of memory: select fewer columns, or "
                "aggregate."
            ) from error
        except duckdb.Error as error:
            raise ConfigError(f"the query failed: {_sentence(str(error))}.") from error


def _interruptible(connection: Any, run: Callable[[], Any]) -> Any:
    """Run a query in a thread: while DuckDB works, Python does not handle signals."""
    with ThreadPoolExecutor(1, thread_name_prefix="query") as pool:
        running = pool.submit(run)
        try:
            return running.result()
        finally:
            while not running.done():
                connection.interrupt()
                wait([running], timeout=0.1)


def _register(connection: Any, records: ds.Dataset) -> None:
    """Make the table `records`. Warn of columns that DuckDB, which ignores case, renames."""
    connection.register("records", records)
    called, renamed = connection.table("records").columns, []
    for place, name in enumerate(records.schema.names):
        if called[place] != name:
            same = (other for other in called[:place] if other.lower() == name.lower())
            renamed.append(f"{name} is renamed to {called[place]}, because {next(same)} exists")
    if renamed:
        _log.warning("SQL ignores the case of column names: column %s.", "; ".join(renamed))


def _records(store: LatentStore) -> ds.Dataset:
    """The metadata file as a dataset, of which DuckDB reads the columns that a query uses."""
    kind = ds.ParquetFileFormat()
    fragment = kind.make_fragment(metadata_source(store))
    return ds.FileSystemDataset([fragment], fragment.physical_schema, kind)


def _sentence(message: str) -> str:
    """DuckDB's message on one line, without the kind of the error and the quoted query."""
    text = re.sub(r"^[A-Z][\w ]* Error: ", "", message.partition("\n\nLINE ")[0].strip())
    lines = [line.strip().rstrip("!.") for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(". ", "; ").replace("! ", "; ")


def _values(column: pa.Array) -> list[Any]:
    """The values of a column. ConfigError if Python has no such dates or times."""
    try:
        found: list[Any] = column.to_pylist()
    except (OverflowError, ValueError) as error:
        raise ConfigError(
            "the result has a date or time before the year 1, after the year 9999 or at infinity: "
            "convert its column with CAST(COLUMN AS VARCHAR)."
        ) from error
    return found


def _plain(value: Any) -> Any:
    """A value of a result as a JSON value."""
    plain: Any = str(value)  # times and others
    match value:
        case str():
            plain = redact_value(value)
        case Decimal():
            plain = int(value) if value == value.to_integral_value() else float(value)
        case float() if not math.isfinite(value):  # JSON has no such numbers
            plain = None
        case None | bool() | int() | float():
            plain = value
        case dict():
            plain = {str(name): _plain(part) for name, part in value.items()}
        case list() | tuple():
            plain = [_plain(part) for part in value]
        case bytes():
            plain = value.hex()
    return plain


def _flat(schema: pa.Schema) -> pa.Schema:
    """The schema with text for the types that CSV does not have."""
    return pa.schema([pa.field(f.name, pa.string()) if _nested(f.type) else f for f in schema])


def _flat_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns: Sequence[Any] = [
        pa.array([None if v is None else json.dumps(_plain(v)) for v in _values(column)])
        if _nested(column.type)
        else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind))
