"""Settings from a file and options, and what of them the fingerprint knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentmill.config import (
    RunConfig,
    fingerprint_document,
    load_config,
    settings_of,
)
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import fingerprint
from latentmill.errors import ConfigError
from latentmill.models import registry

BASE: dict[str, Any] = {"source": "/music", "out": "/latents"}


def document(**settings: Any) -> dict[str, dict[str, Any]]:
    config = load_config(None, {**BASE, **settings})
    spec = registry.resolve(config.model, config.model_options, config.channels).spec
    chunking = Chunking.for_model(
        spec,
        stitch=config.stitch,
        seconds=config.chunk_seconds,
        samples=config.chunk_samples,
        overlap=config.overlap,
    )
    return fingerprint_document(config, spec, chunking)


# Another value than the default for every setting. A new setting must be added here.
LATENTS: dict[str, Any] = {
    "model_options": {"hop": 256},
    "channels": "split",
    "dtype": "float32",
    "precision": "bf16",
    "compile": True,
    "stitch": "crossfade",
    "chunk_seconds": 3.0,
    "chunk_samples": 51200,
    "overlap": 0.25,
    "allow_truncated": True,
    "min_seconds": 1.0,
    "max_seconds": 60.0,
    "min_rms": -60.0,
    "min_sample_rate": 16_000,
    "max_sample_rate": 96_000,
    "min_channels": 1,
    "max_channels": 2,
    "where": "genre == 'rock'",
}
PLACE_AND_SPEED: dict[str, Any] = {
    "with_fields": {"clap": "clap:laion/larger_clap_music"},
    "source": "/other",
    "out": "/elsewhere",
    "format": "webdataset",
    "extensions": ("wav",),
    "unit_seconds": 10.0,
    "shard_size": "512MiB",
    "extend": True,
    "retry_changed": True,
    "refresh_metadata": True,
    "probe": True,
    "device": "cpu",
    "workers": 2,
    "threads": 3,
    "load_threads": 4,
    "load_tasks": 2,
    "load_timeout": 60.0,
    "batch_size": 5,
    "address": "ray://host:10001",
    "stall_minutes": 5.0,
    "log_format": "json",
    "retry_failed": True,
    "source_type": "manifest",
    "include": ("*.wav",),
    "exclude": ("*/rejected/*",),
    "path_column": "file",
    "start_column": "begin",
    "duration_column": "length",
    "key_column": "id",
    "audio_column": "audio",
    "group_by": "(?P<group>.*)/",
}


def test_every_setting_is_known_here() -> None:
    assert {*LATENTS, *PLACE_AND_SPEED, "model"} == set(RunConfig.model_fields)
    assert set(PLACE_AND_SPEED) == {*settings_of("run"), *settings_of("items")}


@pytest.mark.parametrize("name", LATENTS)
def test_what_changes_latents_changes_the_fingerprint(name: str) -> None:
    before, after = document(), document(**{name: LATENTS[name]})
    assert fingerprint(before) != fingerprint(after)


def test_another_model_changes_the_fingerprint() -> None:
    before = document()
    after = {**before, "model": {**before["model"], "sha256": "00ff"}}
    assert fingerprint(before) != fingerprint(after)


def test_mono_of_a_mono_model_is_what_it_is_anyway() -> None:
    assert document(channels="mono") == document()


@pytest.mark.parametrize("name", PLACE_AND_SPEED)
def test_what_does_not_change_latents_leaves_the_fingerprint(name: str) -> None:
    assert document(**{name: PLACE_AND_SPEED[name]}) == document()


def test_the_fingerprint_is_stable_and_survives_json() -> None:
    import json

    stored = json.loads(json.dumps(document(min_seconds=1)))
    assert fingerprint(stored) == fingerprint(document(min_seconds=1.0))
    assert stored == document(min_seconds=1.0)
    assert len(fingerprint(stored)) == 32


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "source: /from-file\nout: /out\nmodel_options: {hop: 256}\nbatch_size: 3\nstitch: trim\n"
    )
    config = load_config(path, {"source": "/from-option", "batch_size": None, "stitch": "none"})
    assert config.source == "/from-option"
    assert config.batch_size == 3  # an option that was not given
    assert config.stitch == "none"
    assert config.model_options == {"hop": 256}
    more = load_config(path, {"model_options": {"scale_factor": 2.0}})
    assert more.model_options == {"hop": 256, "scale_factor": 2.0}
    assert load_config(path, {"model_options": {"hop": 64}}).model_options == {"hop": 64}
    assert load_config(None, BASE) == RunConfig(source="/music", out="/latents")


FILES = {
    "unknown": ("batchsize: 3", "unknown setting batchsize in FILE: did you mean batch_size?"),
    "unknown and far": ("zzz: 3", "unknown setting zzz"),
    "no text": ("1: 3", "unknown setting 1"),
    "of another kind": (
        "batch_size: many",
        "invalid batch_size 'many' in FILE: expected a whole number",
    ),
    "out of range": (
        "overlap: 0.7",
        "invalid overlap 0.7 in FILE: it must be less than or equal to 0.5",
    ),
    "zero": ("batch_size: 0", "invalid batch_size 0 in"),
    "no choice": (
        "format: zip",
        "invalid format 'zip' in FILE: it must be 'parquet'",
    ),
    "no channels": ("channels: stereo", "it must be 'mono' or 'split'"),
    "infinite": ("chunk_seconds: .inf", "finite number"),
    "not a number": ("min_seconds: .nan", "min_seconds"),
    "nested": ("model_options: {hop: [1]}", "invalid model_options hop [1] in FILE: expected text"),
    "no field's model": (
        "with_fields: {x: 3}",
        "invalid with_fields x 3 in FILE: expected a model",
    ),
    "no condition": ('where: "genre = 1"', "invalid where condition 'genre = 1'"),
    "a call": ("where: open('x')", "only comparisons with and, or, not are allowed"),
    "no pattern": ("group_by: '('", "--group-by '(': not a valid regular expression"),
    "no group": ("group_by: '.*'", "must contain (?P<group>...)"),
    "no field": ("group_by: 'metadata:'", "give one or two fields"),
    "no source type": ("source_type: zip", "it must be 'folder', 'manifest', "),
    "empty rates": (
        "{min_sample_rate: 9, max_sample_rate: 3}",
        "--min-sample-rate 9 is above --max-sample-rate 3",
    ),
    "empty range": ("{min_seconds: 9, max_seconds: 3}", "--min-seconds 9.0 is above"),
    "missing": ("{source: }", "invalid source None in FILE: expected text"),
    "a list": ("- a", "must contain lines"),
    "empty": ("", "must contain lines"),
    "no yaml": ("a: [", "not valid YAML"),
    "code": ("!!python/object/apply:os.getcwd []", "not valid YAML"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_setting_is_refused_in_one_sentence(
    kind: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    text, says = FILES[kind]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    options = BASE if kind != "missing" else {"out": "/out"}
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    assert says.replace("FILE", str(path)) in one_sentence(caught.value)


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("missing.yaml", "No such file"),
        (".", "Is a directory"),
        ("binary.yaml", "not valid YAML"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name, BASE)
        assert says in one_sentence(caught.value)


def test_a_setting_that_nobody_gave_is_named(one_sentence: Callable[[BaseException], str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"source": "/music"})
    assert "STORE is missing" in one_sentence(caught.value)
