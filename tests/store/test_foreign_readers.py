"""A store read without latentmill: pyarrow, DuckDB, datasets, webdataset, tarfile and numpy."""

from __future__ import annotations

import base64
import gc
import io
import json
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from store_files import HOP, KEYS, METADATA, RATE, make_record, model_latent

from latentmill.store.formats import open_writer
from support.field_stores import write_fields
from support.latent_store import write_latents

KEY = "album one/été"
PARQUET_PREFIX = 4  # bytes of a value's length

# webdataset leaves the shards that it has read to the garbage collector to close.
leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def latent(corpus: Path) -> np.ndarray:
    """What the model makes of KEY's file."""
    return model_latent(corpus, f"{KEY}.wav").astype(np.float16)


def shards(store: Path) -> list[str]:
    paths = sorted(str(path) for path in (store / "shards").iterdir())
    assert len(paths) > 2
    return paths


def from_row(row: dict) -> np.ndarray:
    """The recipe of the README: time-major bytes, so frames come first."""
    return np.frombuffer(row["latent"], row["dtype"]).reshape(row["frames"], row["channels"]).T


def test_pyarrow(stores: dict[str, Path], latent: np.ndarray) -> None:
    rows = pq.read_table(stores["parquet"] / "shards").to_pylist()
    assert sorted(row["key"] for row in rows) == KEYS
    row = next(row for row in rows if row["key"] == KEY)
    np.testing.assert_array_equal(from_row(row), latent)
    assert row["shape"] == list(latent.shape)
    assert json.loads(row["metadata"]) == {**METADATA, "text": "a caption — with a dash"}


def test_duckdb(stores: dict[str, Path], latent: np.ndarray) -> None:
    connection = duckdb.connect()
    table = f"read_parquet('{stores['parquet']}/shards/*.parquet')"
    [(count, seconds)] = connection.sql(f"SELECT count(*), sum(duration) FROM {table}").fetchall()
    assert count == len(KEYS)
    assert seconds == pytest.approx(8.802, abs=0.001)
    found = connection.sql(f"SELECT * FROM {table} WHERE key = '{KEY}'")
    [values] = found.fetchall()
    np.testing.assert_array_equal(from_row(dict(zip(found.columns, values, strict=True))), latent)
    titles = connection.sql(
        f"SELECT json_extract_string(metadata, '$.title') FROM {table} WHERE key = '{KEY}'"
    )
    assert titles.fetchall() == [(METADATA["title"],)]


def test_datasets(
    stores: dict[str, Path], latent: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset(
        "parquet", data_files=shards(stores["parquet"]), split="train", cache_dir=str(tmp_path)
    )
    assert sorted(dataset["key"]) == KEYS
    row = dataset.filter(lambda key: key == KEY, input_columns="key")[0]
    np.testing.assert_array_equal(from_row(row), latent)


def test_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors, ragged tokens and frames at another rate; `datasets` opens the folder of a field."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    store = write_latents(str(tmp_path / "store"), [3, 40, 7, 1, 12, 9, 5, 30, 2, 11])
    write_fields(store, [3, 40, 7, 1, 12, 9, 5, 30, 2, 11], names=["clap", "text", "fine"])
    for name in ("clap", "text", "fine", None):
        folder = store.url if name is None else f"{store.url}/fields/{name}"
        opened = store if name is None else store.field(name)
        expected = {record.key: record.latent for record in opened}
        rows = {
            "pyarrow": pq.read_table(f"{folder}/shards").to_pylist(),
            "duckdb": duckdb.sql(f"FROM '{folder}/shards/*.parquet'").to_arrow_table().to_pylist(),
            "datasets": datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path)),
        }
        for tool, found in rows.items():
            assert len(found) == len(expected), (name, tool)
            for row in found:
                np.testing.assert_array_equal(from_row(row), expected[row["key"]])


def read_webdataset(store: Path) -> list[dict]:
    samples = list(webdataset.WebDataset(shards(store), shardshuffle=False).decode())
    gc.collect()  # the files that webdataset leaves open
    return samples


@leaves_files_open
def test_webdataset(stores: dict[str, Path], latent: np.ndarray) -> None:
    samples = {sample["json"]["key"]: sample for sample in read_webdataset(stores["webdataset"])}
    assert sorted(samples) == KEYS
    np.testing.assert_array_equal(samples[KEY]["npy"], latent)
    assert json.loads(samples[KEY]["json"]["metadata"])["title"] == METADATA["title"]


def test_tarfile_and_numpy(stores: dict[str, Path], latent: np.ndarray) -> None:
    found = {}
    for shard in shards(stores["webdataset"]):
        with tarfile.open(shard) as tar:
            assert tar.pax_headers == {}
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                if member.name.endswith(".npy"):
                    found[member.name] = np.load(io.BytesIO(data.read()), allow_pickle=False)
    assert len(found) == len(KEYS)
    stored = found[f"{KEY}.npy"]
    np.testing.assert_array_equal(stored, latent)
    assert stored.flags.f_contiguous  # time-major bytes
    assert "album one/v1%2E5 (live).npy" in found


@leaves_files_open
def test_shards_agree_on_everything(stores: dict[str, Path]) -> None:
    rows = pq.read_table(stores["parquet"] / "shards").drop_columns(["latent"]).to_pylist()
    fields = [sample["json"] for sample in read_webdataset(stores["webdataset"])]
    for given in fields:  # JSON has no bytes
        given["levels"] = base64.b64decode(given["levels"])
    assert {row["key"]: row for row in rows} == {given["key"]: given for given in fields}
    row = next(row for row in rows if row["key"] == "drums")
    assert (row["sample_rate"], row["source_channels"]) == (RATE, 1)
    assert (row["num_samples"], row["channels"]) == (round(2.5 * RATE), HOP)


def test_parquet_columns_are_as_designed(tmp_path: Path) -> None:
    frames = [3] * 40 + [40000] + [3000] * 5 + [1]
    writer = open_writer("parquet", tmp_path / "shard.parquet", {})
    for number, count in enumerate(frames):
        writer.add(make_record(str(number), np.zeros((64, count), np.float16)))
    writer.close()
    file = pq.ParquetFile(tmp_path / "shard.parquet")
    column = file.schema_arrow.get_field_index("latent")
    leaf = file.schema.column(column)
    assert (leaf.path, leaf.physical_type) == ("latent", "BYTE_ARRAY")
    assert (leaf.max_definition_level, leaf.max_repetition_level) == (0, 0)  # REQUIRED
    groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [16, 16, 8, 1, 2, 2, 2]
    for number, group in enumerate(groups):
        latent = group.column(column)
        assert latent.compression == "UNCOMPRESSED"
        assert set(latent.encodings) <= {"PLAIN", "RLE"}  # RLE: levels, of which there are none
        assert not latent.has_dictionary_page
        assert not latent.is_stats_set
        values = file.read_row_group(number, columns=["latent"])["latent"].to_pylist()
        plain = sum(PARQUET_PREFIX + len(value) for value in values)
        # Beside the values there is one page header; a second page would have its own.
        assert 20 <= latent.total_compressed_size - plain < 40
        others = [group.column(n) for n in range(group.num_columns) if n != column]
        assert {other.compression for other in others} == {"ZSTD"}


def test_page_checksums(stores: dict[str, Path], tmp_path: Path) -> None:
    shard = Path(shards(stores["parquet"])[0])
    whole = pq.read_table(shard, page_checksum_verification=True)
    value = whole["latent"][0].as_py()
    data = bytearray(shard.read_bytes())
    data[data.index(value) + 5] ^= 1
    spoilt = tmp_path / "spoilt.parquet"
    spoilt.write_bytes(data)
    assert pq.read_table(spoilt)["latent"][0].as_py() != value
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(spoilt, page_checksum_verification=True)
