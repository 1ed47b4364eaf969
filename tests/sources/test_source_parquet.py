"""Parquet with audio bytes: as `datasets` writes it, and each row group read once."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from latentmill.audio import open_audio
from latentmill.encoding.lanes import in_turn, lanes_of, reading_order
from latentmill.errors import ItemError, SourceError
from latentmill.plan import UnitLimits, draft
from latentmill.plan.items import to_items
from latentmill.sources import parquet, parquet_cells
from latentmill.sources.address import address_of, item_at
from latentmill.sources.base import Item, TableCell
from latentmill.sources.group import GroupedSource
from latentmill.sources.manifest import ManifestSource
from latentmill.sources.open import source_type
from latentmill.sources.parquet import ParquetSource
from latentmill.sources.parquet_cells import CellReader
from latentmill.sources.reading import UnitReader
from support.sources import sorted_items

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(count: int, size: int = 10, **columns: Any) -> pa.Table:
    audio = [{"bytes": bytes([n % 251]) * size, "path": f"{n}.wav"} for n in range(count)]
    return pa.table({"audio": pa.array(audio, AUDIO), **columns})


def write(path: Path, data: pa.Table, rows: int = 100) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, row_group_size=rows)
    return str(path)


def test_what_datasets_writes_is_read(tmp_path: Path, corpus: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(corpus / "boundary.wav"), str(corpus / "lame.mp3")]
    audio = pa.array([{"bytes": Path(file).read_bytes(), "path": file} for file in files], AUDIO)
    made = datasets.Dataset(pa.table({"audio": audio, "text": ["one", "two"]}))
    made = made.cast_column("audio", datasets.Audio())
    made.to_parquet(tmp_path / "train.parquet")
    assert source_type(str(tmp_path / "train.parquet")) == "parquet"
    items = sorted_items(ParquetSource(str(tmp_path / "train.parquet")))
    assert [item.key for item in items] == ["train/00000000", "train/00000001"]
    assert [json.loads(item.metadata)["text"] for item in items] == ["one", "two"]
    reader = CellReader(items)
    for item, file in zip(items, files, strict=True):
        assert isinstance(item.place, TableCell)
        assert reader.read(item.uri, item.place) == Path(file).read_bytes()
    reader.close()


def test_columns_of_bytes_keys_and_paths(tmp_path: Path) -> None:
    plain = pa.table({"flac": [b"1", b"2"], "id": ["x/1", "x/2"], "n": [1.5, None]})
    uri = write(tmp_path / "a.parquet", plain)
    items = sorted_items(ParquetSource(uri, key_column="id"))
    assert [item.key for item in items] == ["x/1", "x/2"]
    assert items[0].place == TableCell(0, 0, "flac")
    assert json.loads(items[0].metadata) == {"id": "x/1", "n": 1.5}
    assert json.loads(items[1].metadata) == {"id": "x/2"}
    item = sorted_items(ParquetSource(write(tmp_path / "b.parquet", table(1))))[0]
    assert json.loads(item.metadata) == {"path": "0.wav"}
    assert source_type(uri) == "parquet"
    paths = write(tmp_path / "c.parquet", pa.table({"path": ["a.wav"]}))
    assert source_type(paths) == "manifest"


def test_no_column_is_taken_for_a_part_of_the_audio_s(tmp_path: Path) -> None:
    data = pa.table({"audio_text": [b"1"], "text": ["one"], "audio": ["two"]})
    uri = write(tmp_path / "a.parquet", data)
    (item,) = sorted_items(ParquetSource(uri, key_column="text"))
    assert (item.key, json.loads(item.metadata)) == ("one", {"text": "one", "audio": "two"})


def test_keys_never_become_paths(tmp_path: Path) -> None:
    data = pa.table({"audio": [b"1", b"2", b"3"], "id": ["../../x", "/etc/x", "a//b/"]})
    items = sorted_items(ParquetSource(write(tmp_path / "a.parquet", data), key_column="id"))
    assert [item.key for item in items] == ["%2E%2E/%2E%2E/x", "a/b", "etc/x"]


def test_an_empty_key_is_refused_with_its_row(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    uri = write(tmp_path / "a.parquet", pa.table({"audio": [b"1", b"2"], "id": ["x", "./"]}))
    with pytest.raises(SourceError) as caught:
        sorted_items(ParquetSource(uri, key_column="id"))
    assert "empty key in row 1" in one_sentence(caught.value)


def test_text_that_is_none_is_refused(tmp_path: Path, one_sentence: Callable[..., str]) -> None:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    uri = write(tmp_path / "a.parquet", pa.table({"audio": [b"1"], "text": text}))
    with pytest.raises(SourceError) as caught:
        sorted_items(ParquetSource(uri))
    assert "a.parquet cannot be read" in one_sentence(caught.value)


def test_a_column_is_chosen_or_asked_for(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    two = pa.table({"left": [b"1"], "right": [b"2"], "n": [1]})
    uri = write(tmp_path / "a.parquet", two)
    assert sorted_items(ParquetSource(uri, audio_column="right"))[0].place == TableCell(
        0, 0, "right"
    )
    none = write(tmp_path / "b.parquet", pa.table({"n": [1]}))
    for found, says in (
        (ParquetSource(uri), "several audio columns, left, right"),
        (ParquetSource(uri, audio_column="n"), "column n contains no audio bytes"),
        (
            ParquetSource(uri, audio_column="left", key_column="k"),
            "no key column k: choose one of n.",
        ),
        (ParquetSource(none), "no audio column, only n"),
    ):
        with pytest.raises(SourceError) as caught:
            sorted_items(found)
        assert says in one_sentence(caught.value)


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """300 cells of 10 kB in row groups of 100."""
    return sorted_items(ParquetSource(write(tmp_path / "a.parquet", table(300, 10_000))))


def byte(item: Item) -> int:
    return int(item.key.rpartition("/")[2]) % 251


def read_all(reader: CellReader, wanted: list[Item]) -> None:
    def check(item: Item) -> None:
        assert isinstance(item.place, TableCell)
        assert reader.read(item.uri, item.place) == bytes([byte(item)]) * 10_000

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, wanted))
    reader.close()


@pytest.mark.parametrize("order", ["forward", "backward", "mixed", "some"])
@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_row_group_is_read_once(
    order: str, limit: int, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_cells, "KEPT_LIMIT", limit)  # 0: what waits goes to a file
    opened: list[str] = []
    real = parquet_cells.open_table
    monkeypatch.setattr(
        parquet_cells, "open_table", lambda uri, *args: opened.append(uri) or real(uri, *args)
    )
    orders = {
        "forward": items,
        "backward": items[::-1],
        "mixed": sorted(items, key=lambda item: hash(item.key) % 97),
        "some": items[5::7],
    }
    read_all(CellReader(orders[order]), orders[order])
    assert len(opened) == 3


class Reads:
    """Counts the row groups that are opened, those that are open, and the rows decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = self.open = self.most_open = self.rows = 0
        batches, close = pq.ParquetFile.iter_batches, pq.ParquetFile.close

        lock = threading.Lock()

        def counted(file: Any, *args: Any, **more: Any) -> Iterator[Any]:
            with lock:
                self.opened += 1
                self.open += 1
                self.most_open = max(self.most_open, self.open)
            return rows_of(batches(file, *args, **more))

        def rows_of(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                with lock:
                    self.rows += len(batch)
                yield batch

        def closed(file: Any, *args: Any) -> None:
            with lock:
                self.open -= 1
            close(file, *args)

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
        monkeypatch.setattr(pq.ParquetFile, "close", closed)


SPEAKERS = 7


@pytest.fixture
def shuffled(tmp_path: Path) -> str:
    """400 cells in row groups of 20; neither ids nor speakers are in the order of the rows."""
    chance = random.Random(0)
    ids = [f"{number:04d}" for number in range(400)]
    chance.shuffle(ids)
    speakers = [f"s{chance.randrange(SPEAKERS)}" for _ in ids]
    data = table(400, 1000, id=ids, speaker=speakers, row=range(400))
    return write(tmp_path / "a.parquet", data, rows=20)


def planned(source: Any) -> list[Item]:
    """The items of a source in the order in which one unit of a new plan opens them."""
    with draft(source.items(), UnitLimits(unit_seconds=1e9)) as drafted:
        assert len(drafted.sizes) == 1
        return opened_in_lanes([item for rows in drafted.tables() for item in to_items(rows)])


def opened_in_lanes(items: list[Item]) -> list[Item]:
    return [item for _, item in in_turn(map(iter, lanes_of(reading_order(items))))]


def check_cells(reader: CellReader, wanted: list[Item], threads: int) -> None:
    def check(item: Item) -> None:
        assert isinstance(item.place, TableCell)
        number = json.loads(item.metadata)["row"]
        assert reader.read(item.uri, item.place) == bytes([number % 251]) * 1000

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(check, wanted))
    reader.close()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("order", ["rows", "ids", "speakers", "ids of an earlier plan"])
def test_a_unit_reads_each_row_group_once_whatever_its_keys_and_groups(
    order: str, threads: int, shuffled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = ParquetSource(shuffled, key_column=None if order == "rows" else "id")
    if order == "speakers":
        source = GroupedSource(source, "metadata:speaker")
    if order == "ids of an earlier plan":
        wanted = opened_in_lanes(sorted_items(source))
    else:
        wanted = planned(source)
    assert len(wanted) == 400
    reads = Reads(monkeypatch)
    check_cells(CellReader(wanted), wanted, threads)
    assert (reads.opened, reads.rows, reads.open) == (20, 400, 0)
    assert reads.most_open <= parquet_cells.OPEN_PASSES + threads


def test_cells_without_a_group_are_planned_in_the_order_of_their_rows(shuffled: str) -> None:
    with draft(ParquetSource(shuffled, key_column="id").items(), UnitLimits()) as drafted:
        rows = [text for rows in drafted.tables() for text in rows["metadata"].to_pylist()]
    assert [json.loads(text)["row"] for text in rows] == list(range(400))


def test_cells_of_a_group_stay_together(shuffled: str) -> None:
    source = GroupedSource(ParquetSource(shuffled, key_column="id"), "metadata:speaker")
    with draft(source.items(), UnitLimits(unit_seconds=1e-3)) as drafted:
        found = [
            pair
            for rows in drafted.tables()
            for pair in zip(rows["group"].to_pylist(), rows["key"].to_pylist(), strict=True)
        ]
        assert len(drafted.sizes) == SPEAKERS
    assert found == sorted(found)


def test_a_key_of_two_rows_is_refused(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    ids = [f"{number:03d}" for number in range(100)]
    ids[90] = ids[3]
    uri = write(tmp_path / "a.parquet", table(100, id=ids), rows=10)
    with (
        pytest.raises(SourceError) as caught,
        draft(ParquetSource(uri, key_column="id").items(), UnitLimits()),
    ):
        pass
    assert f"Two items have the key '003' (in {uri})" in one_sentence(caught.value)


def no_space(*_: Any, **__: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reason", ["reserve", "error"])
def test_cells_that_the_disk_has_no_space_for_are_read_again(
    reason: str, shuffled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_cells, "KEPT_LIMIT", 50_000)
    if reason == "error":
        monkeypatch.setattr(tempfile, "TemporaryFile", no_space)
    else:
        full = os.statvfs_result((4096, 4096, 10**6, 10**5, 10**5, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "fstatvfs", lambda _: full)
    wanted = sorted_items(ParquetSource(shuffled, key_column="id"))
    reads = Reads(monkeypatch)
    check_cells(CellReader(wanted), wanted, 8)
    assert reads.opened > 20
    assert reads.open == 0
    assert reads.most_open <= parquet_cells.OPEN_PASSES + 8


def test_cells_of_skipped_items_are_not_kept(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_cells, "OPEN_PASSES", 1)
    reads = Reads(monkeypatch)
    with UnitReader(items) as reader:
        reader.open(items[50]).close()  # keeps those before
        before = reads.rows
        for item in items[:100]:
            reader.release(item)
        reader.open(items[100]).close()  # closes the first row group
        assert before <= 56
        assert reads.rows - before <= 8
        assert not reader._cells._kept._cells


def test_a_damaged_row_group_fails_its_own_items_alone(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parquet_cells._RowGroup._needed_cells

    def damaged(group: Any, *args: Any) -> Iterator[Any]:
        for number, data in real(group, *args):
            if group._name[1] == 0 and number == 60:
                raise pa.ArrowInvalid("damaged")
            yield number, data

    monkeypatch.setattr(parquet_cells._RowGroup, "_needed_cells", damaged)
    monkeypatch.setattr(parquet_cells, "OPEN_PASSES", 1)
    reader = CellReader(items)

    def read(item: Item) -> bytes:
        assert isinstance(item.place, TableCell)
        return reader.read(item.uri, item.place)

    for number in (0, 100, 59, 200, 99, 60, 10, 199):
        if number in (60, 99):
            with pytest.raises(pa.ArrowInvalid, match="damaged"):
                read(items[number])
        else:
            assert read(items[number]) == bytes([byte(items[number])]) * 10_000
    reader.close()


def test_few_row_groups_are_open_at_a_time(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_cells, "OPEN_PASSES", 1)
    wanted = [items[n * 100 + k] for k in range(0, 100, 20) for n in range(3)]
    reads = Reads(monkeypatch)
    read_all(CellReader(wanted), wanted)
    assert reads.open == 0
    assert reads.most_open <= 2  # one is open, another one is decoded


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    size, count = 1 << 20, 64
    big = table(count, size)
    pq.write_table(  # pages of a few rows, as writers of long values make them
        big,
        tmp_path / "a.parquet",
        row_group_size=count,
        write_batch_size=4,
        compression="none",
        use_dictionary=False,
    )
    del big
    found = sorted_items(ParquetSource(str(tmp_path / "a.parquet")))
    reader = CellReader(found)
    before, most = pa.total_allocated_bytes(), 0
    for item in found:
        assert isinstance(item.place, TableCell)
        assert len(reader.read(item.uri, item.place)) == size
        most = max(most, pa.total_allocated_bytes() - before)
    reader.close()
    assert 0 < most < count * size / 2


def test_cells_that_are_not_there(items: list[Item], tmp_path: Path) -> None:
    empty = pa.table({"audio": pa.array([{"bytes": None, "path": None}], AUDIO)})
    (nothing,) = sorted_items(ParquetSource(write(tmp_path / "b.parquet", empty)))
    wrong = [
        (nothing.uri, TableCell(0, 0, "audio"), "the cell contains no audio"),
        (items[0].uri, TableCell(0, 100, "audio"), "has 100 rows, but no row 100"),
        (items[0].uri, TableCell(3, 0, "audio"), "no row group 3"),
        (items[0].uri, TableCell(0, 0, "sound"), "no column sound"),
    ]
    reader = CellReader([])
    for uri, cell, says in wrong * 2:
        with pytest.raises(ItemError, match=says):
            reader.read(uri, cell)
    assert len(reader.read(items[0].uri, TableCell(0, 7, "audio"))) == 10_000
    assert len(reader.read(items[0].uri, TableCell(0, 7, "audio"))) == 10_000
    reader.close()


def test_a_row_group_that_is_shorter_than_it_says(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parquet_cells._RowGroup._needed_cells
    monkeypatch.setattr(
        parquet_cells._RowGroup,
        "_needed_cells",
        lambda *args, **more: islice(real(*args, **more), 5),
    )
    reader = CellReader(items)
    cell = items[7].place
    assert isinstance(cell, TableCell)
    for _ in range(2):
        with pytest.raises(ItemError, match="row group 0 ends before row 7"):
            reader.read(items[7].uri, cell)
    assert len(reader.read(items[0].uri, TableCell(0, 4, "audio"))) == 10_000
    reader.close()


def loaded(items: list[Item]) -> list[tuple[int, np.ndarray]]:
    """Sample rates and samples `[n, C]`."""
    found = []
    with UnitReader(items) as reader:
        for item in items:
            with reader.open(item) as media:
                stream = open_audio(media)
                found.append((stream.sample_rate, np.concatenate(list(stream.blocks()), 1).T))
    return found


MONO = (np.sin(np.arange(800) / 9) / 2).astype(np.float32)
STEREO = np.stack([MONO, -MONO / 2])
STRUCT = [("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64()), ("path", pa.string())]
CHANNELS = pa.struct([("array", pa.list_(pa.list_(pa.float32()))), ("sampling_rate", pa.int32())])
CELL = {"array": MONO.tolist(), "sampling_rate": 16000, "path": "a.wav"}
ARRAYS = {
    "struct": (pa.array([CELL], pa.struct(STRUCT)), {}, 16000, MONO),
    "channels": (
        pa.array([{"array": STEREO.tolist(), "sampling_rate": 44100}], CHANNELS),
        {},
        44100,
        STEREO.T,
    ),
    "floats": (
        pa.array([MONO.tolist()], pa.list_(pa.float32())),
        {"sampling_rate": [8000]},
        8000,
        MONO,
    ),
    "halves": (
        pa.array([MONO.astype(np.float16)], pa.list_(pa.float16())),
        {"sr": [8000]},
        8000,
        MONO.astype(np.float16),
    ),
    "int16": (
        pa.array([(MONO * 32768).astype(np.int16)], pa.large_list(pa.int16())),
        {"sample_rate": [22050.0]},
        22050,
        (MONO * 32768).astype(np.int16) / 32768,
    ),
    "fixed": (
        pa.array([MONO.tolist()], pa.list_(pa.float32(), 800)),
        {"rate": [48000]},
        48000,
        MONO,
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_samples_in_a_table_are_audio(tmp_path: Path, name: str) -> None:
    column, others, rate, wanted = ARRAYS[name]
    data = pa.table({"audio": column, "text": ["one"], **others})
    uri = write(tmp_path / "a.parquet", data)
    assert source_type(uri) == "parquet"
    (item,) = sorted_items(ParquetSource(uri))
    assert item.key == "a/00000000"
    path = {"path": "a.wav"} if name == "struct" else {}
    assert json.loads(item.metadata) == {"text": "one", **path} | {
        name: values[0] for name, values in others.items()
    }
    ((found_rate, samples),) = loaded([item])
    assert found_rate == rate
    assert np.array_equal(samples, np.asarray(wanted, np.float32).reshape(len(samples), -1))
    # A record's address alone leads there, too.
    assert np.array_equal(loaded([item_at(address_of(item))])[0][1], samples)


REFUSED = {
    "no column gives their sample rate": {"audio": [[0.5]]},
    "holds lists of int64": {"audio": [[1, 2]], "sampling_rate": [8000]},
    "has no audio column": {"embedding": [[0.5]], "sampling_rate": [8000]},
}


@pytest.mark.parametrize("text", REFUSED)
def test_lists_that_are_no_audio_are_refused_in_one_sentence(
    tmp_path: Path, text: str, one_sentence: Callable[[BaseException], str]
) -> None:
    uri = write(tmp_path / "a.parquet", pa.table(REFUSED[text]))
    with pytest.raises(SourceError) as caught:
        sorted_items(ParquetSource(uri))
    assert text in one_sentence(caught.value)
    assert len(str(caught.value)) < 300


def test_a_list_is_no_path_of_a_manifest(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    uri = write(tmp_path / "a.parquet", pa.table({"file": [[0.5] * 9999]}))
    with pytest.raises(SourceError) as caught:
        sorted_items(ManifestSource(uri))
    assert "column file holds a list in row 1, not a path" in one_sentence(caught.value)


def test_cells_that_are_no_audio_fail_alone(tmp_path: Path) -> None:
    cells = [MONO.tolist(), [], None, [0.5, None], MONO.tolist(), MONO.tolist()]
    rates = [8000, 8000, 8000, 8000, 0, 8000]
    data = pa.table({"audio": pa.array(cells, pa.list_(pa.float32())), "sampling_rate": rates})
    items = sorted_items(ParquetSource(write(tmp_path / "a.parquet", data)))
    reasons = []
    with UnitReader(items) as reader:
        for item in items:
            try:
                reader.open(item).close()
                reasons.append("")
            except ItemError as error:
                reasons.append(str(error))
    assert reasons == [
        "",
        "it holds no samples",
        "the cell contains no audio",
        "some of its samples are missing",
        "its sample rate is not valid: 0",
        "",
    ]


def test_audio_rows_with_a_path_alone_stand_for_that_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b c"):
        sf.write(tmp_path / f"in/{name}.wav", MONO, 8000, subtype="FLOAT")
    paths = [f"{tmp_path}/in/a.wav", "in/b c.wav", f"file://{tmp_path}/in/b%20c.wav"]
    audio = pa.array([{"bytes": None, "path": path} for path in paths], AUDIO)
    uri = write(tmp_path / "t.parquet", pa.table({"audio": audio, "n": [1, 2, 3]}))
    items = sorted_items(ParquetSource(uri))
    assert [item.key for item in items] == [f"t/0000000{n}" for n in range(3)]
    assert [item.uri for item in items] == [f"{tmp_path}/in/{n}.wav" for n in ("a", "b c", "b c")]
    for rate, samples in loaded(items):
        assert rate == 8000
        assert np.array_equal(samples[:, 0], MONO)


def test_apple_double_files_beside_tables_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", table(1))
    (tmp_path / "in" / "._a.parquet").write_bytes(b"\0\5\26\7")
    source = ParquetSource(str(tmp_path / "in"))
    assert [item.key for item in source.items()] == ["a/00000000"]
    assert source.ignored == {"files of macOS (._*, __MACOSX)": 1}


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_with_only_a_path_need_no_statistics(tmp_path: Path, statistics: bool) -> None:
    def items(name: str, *cells: bytes | None) -> list[Item]:
        audio = [{"bytes": data, "path": f"{n}.wav"} for n, data in enumerate(cells)]
        data = pa.table({"audio": pa.array(audio, AUDIO)})
        pq.write_table(data, tmp_path / name, row_group_size=20, write_statistics=statistics)
        return list(ParquetSource(str(tmp_path / name)).items())

    paths = items("a.parquet", *[None] * 30)
    assert [item.uri for item in paths] == [f"{tmp_path}/{n}.wav" for n in range(30)]
    assert {item.place for item in paths} == {None}
    mixed = items("b.parquet", *[None] * 19, b"audio", *[None] * 10)
    assert [item.place is None for item in mixed] == [False] * 20 + [True] * 10
    for audio in (b"", os.urandom(2 << 20)):
        assert items("c.parquet", audio, None)[0].place == TableCell(0, 0, "audio")


def test_large_audio_is_not_read_while_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(2, size=2 << 20)
    pq.write_table(data, tmp_path / "a.parquet", write_statistics=False, use_dictionary=False)

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(parquet, "_has_only_nulls", refuse)
    assert len(sorted_items(ParquetSource(str(tmp_path / "a.parquet")))) == 2
