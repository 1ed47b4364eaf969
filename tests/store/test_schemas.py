"""The folder `schemas/`: what the code generates, and what the stores hold."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_files import FORMATS

from latentmill.config import RunConfig
from latentmill.store.schema import RECORD_SCHEMA
from latentmill.store.schemas import encode_options, schema_files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "schemas"


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_generated_files_are_what_the_code_generates() -> None:
    for name, text in schema_files().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, "run `make schemas`"
    assert {path.name for path in FOLDER.iterdir()} == set(schema_files()), "a file too many"
    options = ROOT / "pipeline" / "latentmill" / "run" / "options.py"
    assert options.read_text(encoding="utf-8") == encode_options(), "run `make schemas`"


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_a_run_writes_is_valid(stores: dict[str, Path], format_name: str) -> None:
    store = stores[format_name]
    commits = sorted(store.glob("commits/*.json"))
    assert len(commits) > 3
    for path in commits:
        validator("commit").validate(json.loads(path.read_text()))
    dataset = json.loads((store / "dataset.json").read_text())
    validator("dataset").validate(dataset)
    with pytest.raises(jsonschema.ValidationError):
        validator("dataset").validate({**dataset, "dtype": "int8"})
    with pytest.raises(jsonschema.ValidationError):
        validator("commit").validate(dataset)


def test_a_config_is_valid() -> None:
    validator("config").validate({"source": "music", "out": "latents", "overlap": 0.25})
    config = RunConfig(source="music", out="latents", model_options={"scale_factor": 2.0})
    validator("config").validate(config.model_dump(mode="json"))
    with pytest.raises(jsonschema.ValidationError):
        validator("config").validate({"source": "music", "out": "latents", "typo": 1})


def test_a_shard_has_the_record_schema(stores: dict[str, Path]) -> None:
    shard = next(iter(stores["parquet"].glob("shards/*.parquet")))
    schema: pa.Schema = pq.read_schema(shard)
    assert schema.remove_metadata() == RECORD_SCHEMA
    assert json.loads(schema.metadata[b"latentmill"])["model"]["name"] == "mdct"
