"""SQL over the records, and the table of a store."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest

import latentmill as lm
from latentmill.curation.query import first_rows, write_query
from latentmill.errors import ConfigError, StoreError
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore
from support.latent_store import write_latents
from support.runs import call

METADATA = [
    {"bpm": 60 + 10 * n, "genre": "rock\x1b[31m" if n % 2 else "été", "tags": [n]} for n in range(6)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    folder = tmp_path_factory.mktemp("query")
    return write_latents(str(folder / "s"), [3, 4, 5, 6, 7, 8], per_unit=2, metadata=METADATA)


def test_the_table_has_a_row_for_each_record(store: LatentStore, tmp_path: Path) -> None:
    table = store.table()
    assert table["key"].to_pylist() == list(store.keys())
    for name in ("duration", "group", "role", "frames", "source_uri"):
        assert table[name].to_pylist() == [getattr(record, name) for record in store]
    assert table["metadata_bpm"].to_pylist() == [own["bpm"] for own in METADATA]
    some = store.table(["metadata_bpm", "key"])
    assert some.column_names == ["metadata_bpm", "key"]
    frame = some.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["metadata_bpm"].sum() == sum(own["bpm"] for own in METADATA)
    with pytest.raises(
        ConfigError, match=r"no column 'metadata_bmp': did you mean metadata_bpm or "
    ):
        store.table(["metadata_bmp"])
    unsealed = write_latents(str(tmp_path / "u"), [3, 4], sealed=False)
    assert unsealed.table(["key"])["key"].to_pylist() == list(unsealed.keys())


QUERIES = [
    ("SELECT count(*), sum(frames) FROM records", [(6, 33)]),
    (
        "SELECT key FROM records WHERE metadata_bpm > 90 ORDER BY key DESC LIMIT 1",
        [("item/00005",)],
    ),
    (
        'SELECT "group", count(*) FROM records GROUP BY 1 ORDER BY 1',
        [("group 0", 4), ("group 1", 2)],
    ),
    (
        "SELECT CAST(metadata->>'$.tags[0]' AS INT) FROM records ORDER BY key",
        [(n,) for n in range(6)],
    ),
    ("SELECT count(*) FROM records a JOIN records b ON a.role = b.role", [(10,)]),
    ("WITH r AS (FROM records) SELECT min(frames) FROM r", [(3,)]),
    ("SELECT key FROM records WHERE false", []),
]


@pytest.mark.parametrize(("sql", "rows"), QUERIES)
def test_a_query(store: LatentStore, sql: str, rows: list[tuple[object, ...]]) -> None:
    found = lm.query(store, sql)
    assert list(zip(*found.to_pydict().values(), strict=True)) == rows
    assert lm.query(store.url, sql).equals(found)


REFUSED = [
    ("SELECT 1; SELECT 2", "found 2 statements: a query is one SELECT statement"),
    ("", "found 0 statements"),
    ("COPY records TO '{}/x.csv'", "COPY is not allowed: a query is one SELECT statement"),
    ("ATTACH '{}/x.db'", "ATTACH is not allowed"),
    ("INSTALL httpfs", "is not allowed"),
    ("LOAD httpfs", "LOAD is not allowed"),
    ("SET enable_external_access = true", "is not allowed"),
    ("PRAGMA database_list", "PRAGMA is not allowed"),
    ("CREATE TABLE x AS SELECT 1", "CREATE is not allowed"),
    ("DELETE FROM records", "DELETE is not allowed"),
    ("EXPORT DATABASE '{}/x'", "is not allowed"),
    ("SELECT * FROM read_csv('/etc/passwd')", "a query reads the table `records` only, no files"),
    ("SELECT * FROM glob('/etc/*')", "a query reads the table `records` only, no files"),
    ("SELECT * FROM '/etc/passwd'", "the query failed: Table with name /etc/passwd does not exist"),
    ("SELECT * FROM store", "the query failed: Table with name store does not exist"),
    ("SELECT durtion FROM records", 'the query failed: .*durtion.*Candidate bindings: "duration"'),
    ("SELCT 1", "the query failed: syntax error at or near"),
    ("SELECT CAST(key AS INT) FROM records", "the query failed: Could not convert string"),
    ("SELECT '\udcff'", "character 9 of the query is not valid UTF-8: remove it"),
    ("SELECT error('One. Two! Three?')", "the query failed: One"),
]


@pytest.mark.parametrize(("sql", "message"), REFUSED)
def test_a_query_that_is_refused_is_one_sentence(
    store: LatentStore,
    tmp_path: Path,
    sql: str,
    message: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    before = {p: p.read_bytes() for p in Path(store.url).rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=message) as error:
        lm.query(store, sql.format(tmp_path))
    one_sentence(error.value)
    assert not list(tmp_path.iterdir())
    assert {p: p.read_bytes() for p in Path(store.url).rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "value", ["'infinity'::DATE", "'infinity'::TIMESTAMP", "'10000-01-01'::DATE"]
)
def test_dates_that_python_does_not_have(
    store: LatentStore, tmp_path: Path, value: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"convert its column with CAST\(COLUMN AS VARCHAR\)"
    ) as error:
        first_rows(store, f"SELECT {value}")
    one_sentence(error.value)
    with pytest.raises(ConfigError, match=r"convert its column with CAST\(COLUMN AS VARCHAR\)"):
        write_query(store, f"SELECT [{value}]", tmp_path / "x.csv")
    assert len(first_rows(store, f"SELECT CAST({value} AS VARCHAR)").rows) == 1


def test_the_command(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT key, frames, metadata_genre AS genre, duration * 'nan'::FLOAT AS x FROM records"
    shown = call(capsys, "query", store.url, f"{sql} ORDER BY key LIMIT 2")
    assert shown.code == 0
    assert [line.rstrip() for line in shown.out.splitlines()] == [
        "key         frames  genre         x",
        "----------  ------  ------------  -",
        "item/00000       3  été",
        "item/00001       4  rock\\x1b[31m",
        "(2 rows)",
    ]
    limited = call(capsys, "query", store.url, "SELECT key FROM records", "--limit", 2).out
    assert limited.splitlines()[-1] == "... 2 of 6 rows; -o FILE writes all, --limit N prints N"
    printed = call(capsys, "query", store.url, sql, "--json")
    found = json.loads(printed.out)
    assert found["columns"] == ["key", "frames", "genre", "x"]
    assert found["rows"][1] == ["item/00001", 4, "rock\x1b[31m", None]
    assert (len(found["rows"]), found["total"]) == (6, 6)
    assert "\x1b" not in printed.out + shown.out
    long = call(capsys, "query", store.url, "SELECT * FROM range(1000)").out.splitlines()
    assert len(long) == 53
    refused = call(capsys, "query", store.url, "COPY records TO 'x.csv'")
    assert refused.code == 2
    assert refused.err.startswith("latentmill: COPY is not allowed")


def test_output_files(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = "SELECT key, shape, metadata_genre FROM records ORDER BY key"
    for name in ("r.parquet", "r.csv"):
        done = call(capsys, "query", store.url, sql, "-o", tmp_path / name)
        assert (done.code, done.out) == (0, f"{tmp_path / name}: 6 rows\n")
    table = pq.read_table(tmp_path / "r.parquet")
    assert table["key"].to_pylist() == list(store.keys())
    assert table["shape"].to_pylist() == [[4, frames] for frames in range(3, 9)]
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["key", "shape", "metadata_genre"], ["item/00000", "[4, 3]", "été"]]
    assert len(rows) == 7
    # What `query` writes can be given to `annotate`, and the file is not replaced by accident.
    again = call(capsys, "query", store.url, sql, "-o", tmp_path / "r.csv")
    assert (again.code, again.err) == (
        2,
        f"latentmill: {tmp_path / 'r.csv'} exists: choose another output path, or add "
        "--overwrite.\n",
    )
    assert call(capsys, "query", store.url, sql, "-o", tmp_path / "r.csv", "--overwrite").code == 0
    wrong = call(capsys, "query", store.url, sql, "-o", tmp_path / "r.txt")
    assert wrong.err == f"latentmill: {tmp_path / 'r.txt'} must end in .csv or .parquet.\n"
    failing = call(
        capsys, "query", store.url, "SELECT CAST(key AS INT) FROM records", "-o", tmp_path / "x.csv"
    )
    assert failing.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.parquet"]


def test_output_paths(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long names and missing folders; paths that are not files are refused."""

    def written(path: Path, *options: str) -> tuple[int, str]:
        done = call(capsys, "query", store.url, "SELECT 1", "-o", path, *options)
        return done.code, done.out + done.err

    for file in (tmp_path / "new" / "folder" / "x.csv", tmp_path / f"{'n' * 251}.csv"):
        assert written(file) == (0, f"{file}: 1 row\n")
    (tmp_path / "f.csv").mkdir()
    os.mkfifo(tmp_path / "p.csv")
    for name, message in (("f.csv", "is a folder"), ("p.csv", "is not a regular file")):
        for options in ((), ("--overwrite",)):
            code, text = written(tmp_path / name, *options)
            assert code == 2
            assert message in text
    (tmp_path / "a").touch()
    code, text = written(tmp_path / "a" / "x.csv")
    assert code == 6
    assert text.startswith(f"latentmill: Cannot write {tmp_path}/a/x.csv: ")
    code, text = written(tmp_path / f"{'n' * 252}.csv")
    assert code == 6
    assert "File name too long" in text
    assert len(list(tmp_path.iterdir())) == 5


# Values, and whether CSV and Parquet have a type for them.
VALUES = [
    ("INTERVAL '3' DAY", False, False),
    ("[INTERVAL '3' DAY]", True, False),
    ("CAST('0101' AS BIT)", False, True),
    ("CAST('\\xFF' AS BLOB)", False, True),
    ("TIME '01:02:03'", True, True),
    ("CAST(1 AS HUGEINT)", True, True),
]


@pytest.mark.parametrize(("value", "in_csv", "in_parquet"), VALUES)
def test_types_that_a_file_cannot_have(
    store: LatentStore,
    tmp_path: Path,
    value: str,
    in_csv: bool,
    in_parquet: bool,
    one_sentence: Callable[[BaseException], str],
) -> None:
    for kind, known in (("csv", in_csv), ("parquet", in_parquet)):
        file = tmp_path / f"x.{kind}"
        if not known:
            with pytest.raises(ConfigError, match=f"^{kind} files cannot contain a col") as error:
                write_query(store, f"SELECT {value} AS a", file)
            assert "CAST(COLUMN AS VARCHAR)" in one_sentence(error.value)
            assert list(tmp_path.iterdir()) == []
        text = tmp_path / f"text.{kind}"
        assert write_query(store, f"SELECT ({value})::VARCHAR AS a", text) == 1
        text.unlink()
        if known:
            assert write_query(store, f"SELECT {value} AS a", file) == 1
            file.unlink()


def test_annotated_values_are_columns(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "s"), [3, 3, 3], per_unit=2)
    (tmp_path / "f.csv").write_text("key,mood\nitem/00001,calm\n")
    lm.annotate(store, tmp_path / "f.csv")
    sql = "SELECT key FROM records WHERE metadata_mood = 'calm'"
    assert lm.query(store, sql)["key"].to_pylist() == ["item/00001"]
    assert store.table(["metadata_mood"])["metadata_mood"].to_pylist() == [None, "calm", None]


def test_names_that_differ_only_in_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("BPM", "bpm", "bpm_1", "genre")
    metadata = [{name: f"{name} {n}" for name in names} for n in range(3)]
    store = write_latents(str(tmp_path / "s"), [3, 4, 5], metadata=metadata)
    (tmp_path / "a.csv").write_text("key,Bpm,loud,mood\nitem/00001,x,1,calm\n")
    lm.annotate(store, tmp_path / "a.csv")
    (warned,) = caplog.messages
    assert "the names BPM and Bpm and bpm differ only in case" in warned
    caplog.clear()
    (tmp_path / "a.csv").write_text("key,Bpm,loud\nitem/00002,y,2\n")
    lm.annotate(store, tmp_path / "a.csv")  # no new names
    assert caplog.messages == []
    columns = store.table().column_names
    called = {row["column_name"] for row in lm.query(store, "DESCRIBE records").to_pylist()}
    (warned,) = caplog.messages
    assert warned.startswith("SQL ignores the case of column names: ")
    for name in sorted(set(columns) - called):
        pattern = rf"{name} is renamed to (\w+), because (\w+) exists[;.]"
        ((new, other),) = re.findall(pattern, warned)
        assert other.lower() == name.lower()
        found = lm.query(store, f"SELECT {new} FROM records WHERE {new} IS NOT NULL ORDER BY key")
        assert found[new].to_pylist() == store.table([name])[name].drop_null().to_pylist()
    assert len(set(columns) - called) == 3
    caplog.clear()
    plain = write_latents(str(tmp_path / "p"), [3, 4, 5], metadata=[{"bpm": 1}] * 3)
    assert lm.query(plain, "SELECT metadata_BPM FROM records LIMIT 1").num_rows == 1
    assert caplog.messages == []


def test_a_store_without_a_metadata_file(store: LatentStore, tmp_path: Path) -> None:
    """Earlier versions sealed stores without it."""
    url = str(tmp_path / "s")
    write_latents(url, [3, 4, 5])
    document = json.loads((tmp_path / "s" / DATASET_PATH).read_text())
    name = document.pop("metadata")
    document.pop("metadata_hash")
    (tmp_path / "s" / DATASET_PATH).write_text(json.dumps(document))
    (tmp_path / "s" / name).unlink()
    assert lm.query(url, "SELECT sum(frames) AS n FROM records")["n"].to_pylist() == [12]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_metadata_file_is_one_sentence(
    tmp_path: Path, damage: str, one_sentence: Callable[[BaseException], str]
) -> None:
    store = write_latents(str(tmp_path / "s"), [3, 4])
    assert store.info.metadata is not None
    file = tmp_path / "s" / store.info.metadata
    data = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(data[:-9])
    for read in (lambda: lm.query(store, "SELECT 1"), store.table):
        with pytest.raises(StoreError, match="is missing or damaged: run the same") as error:
            read()
        one_sentence(error.value)


def test_without_duckdb(
    store: LatentStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    refused = call(capsys, "query", store.url, "SELECT 1")
    assert (refused.code, refused.err) == (
        2,
        "latentmill: query needs DuckDB: run `pip install 'latentmill[query]'`.\n",
    )


ENDLESS = "SELECT * FROM range(100000000000) t(a) ORDER BY a"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_long_query(store: LatentStore, number: int) -> None:
    """While DuckDB works, Python handles no signals."""
    code = f"""
import os, signal, sys, threading, time
from latentmill.cli import entry
from latentmill.curation import query

run = query._interruptible

def interrupted(connection, work):
    def begin():
        threading.Timer(0.5, os.kill, (os.getpid(), {int(number)})).start()
        return work()
    return run(connection, begin)

query._interruptible = interrupted
sys.argv = ["latentmill", "query", {store.url!r}, {ENDLESS!r}]
entry.main()
"""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(lm.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130
    assert "latentmill: interrupted" in done.stderr
