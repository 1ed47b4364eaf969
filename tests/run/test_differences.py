"""A resume with other settings is refused by the options that a user types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from latentmill.config import RunConfig, fingerprint_document, item_settings, load_config
from latentmill.encoding.chunks import Chunking
from latentmill.models import registry
from latentmill.models.base import Context, ModelSpec
from latentmill.plan import Plan
from latentmill.run.differences import differences, explain

WEIGHTS = {"package": "some-package", "package_version": "1.0", "sha256_weights": "0123456789" * 6}


def configured(**settings: Any) -> RunConfig:
    return load_config(None, {"source": "/music", "out": "/latents", **settings})


def spec_of(config: RunConfig, **changes: Any) -> ModelSpec:
    """The model, as if it had a package and weights."""
    spec = registry.resolve("mdct", config.model_options, config.channels).spec
    spec = replace(spec, identity={**spec.identity, **WEIGHTS}, provenance={"revision": "a" * 40})
    return replace(spec, name=config.model.partition(":")[0], **changes)


def cut(config: RunConfig, spec: ModelSpec) -> Chunking:
    return Chunking.for_model(
        spec,
        stitch=config.stitch,
        seconds=config.chunk_seconds,
        samples=config.chunk_samples,
        overlap=config.overlap,
    )


def plan_of(config: RunConfig, spec: ModelSpec) -> Plan:
    return Plan(
        source=config.source,
        fingerprint=fingerprint_document(config, spec, cut(config, spec)),
        model=config.model,
        model_options=dict(config.model_options),
        channels=config.channels,
        format=config.format,
        ignored={},
        provenance=dict(spec.provenance),
        unit_seconds=config.unit_seconds,
        shard_size=config.shard_size,
        extensions=config.extensions,
        source_settings=item_settings(config),
    )


def refusal(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    config = configured(**asked)
    spec = spec_of(config)
    first = configured(**stored)
    found = differences(
        plan_of(first, spec_of(first)), config, spec, cut(config, spec), config.source
    )
    return explain(found) if found else ""


def changed(label: str, was: str, now: str) -> str:
    return f"{label} changed: this store was encoded with {was}, this run would use {now}"


# What the user gives when the store is made, and when it is resumed.
REFUSALS: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    ({"model": "mdct"}, {"model": "dac"}, changed("--model", "mdct", "dac")),
    (
        {"model": "dac:a/b"},
        {"model": "encodec:a/b", "dtype": "float32"},
        changed("--model", "dac:a/b", "encodec:a/b") + "; --dtype: float16, now float32",
    ),
    (
        {"model_options": {"scale_factor": 2.0}},
        {},
        changed("--model-option scale_factor", "2.0", "1.0"),
    ),
    ({}, {"model_options": {"hop": 256}}, changed("--model-option hop", "512", "256")),
    ({"channels": "split"}, {}, changed("--channels", "split", "mono")),
    (
        {"chunk_samples": 51200},
        {"chunk_samples": 40960},
        changed("--chunk-samples", "51200", "40960"),
    ),
    # 40 and 50 frames of 512 samples at 44.1 kHz, less the half that an MDCT's frames overlap
    (
        {"chunk_seconds": 0.47},
        {"chunk_seconds": 0.58},
        changed("--chunk-seconds", "0.476 s", "0.58 s"),
    ),
    (
        {"stitch": "none"},
        {"overlap": 0.25, "stitch": "crossfade", "precision": "bf16"},
        changed("--precision", "float32", "bf16") + "; --stitch: none, now crossfade",
    ),
    ({"overlap": 0.25}, {"overlap": 0.5}, changed("--overlap", "0.25", "0.5")),
    ({"compile": True}, {}, changed("--compile", "on", "off")),
    ({}, {"min_seconds": 0.5}, changed("--min-seconds", "no value", "0.5")),
    ({}, {"where": "bpm > 3"}, changed("--where", "no value", "bpm > 3")),
    ({}, {"source": "/other"}, changed("SOURCE", "/music", "/other")),
    ({}, {"format": "webdataset"}, changed("--format", "parquet", "webdataset")),
    ({"unit_seconds": 61}, {"unit_seconds": 30}, changed("--unit-seconds", "61.0", "30.0")),
    (
        {"include": ["*.wav"], "extensions": ["wav"]},
        {"include": ["*.mp3"], "key_column": "id", "extensions": ["mp3", "wav"]},
        changed("--include", "*.wav", "*.mp3")
        + "; --extensions: wav, now mp3 wav; --key-column: no value, now id",
    ),
    ({"include": ["*.wav"], "unit_seconds": 61}, {}, ""),
    ({"min_seconds": 1}, {"min_seconds": 1.0, "chunk_samples": None, "channels": "mono"}, ""),
)


@pytest.mark.parametrize(("stored", "asked", "text"), REFUSALS)
def test_a_refusal_begins_with_the_options(
    stored: dict[str, Any], asked: dict[str, Any], text: str
) -> None:
    assert refusal(stored, asked) == text


CONFIG = configured()
SPEC = spec_of(CONFIG)
DOCUMENT = plan_of(CONFIG, SPEC).fingerprint
LABELS = {
    ("model", "name"): "--model",
    ("model", "sha256_weights"): "--model weights",
    ("chunking", "stitch"): "--stitch",
    ("chunking", "samples"): "--chunk-seconds",
    ("chunking", "step"): "--stitch trim: step",
    ("chunking", "overlap"): "--overlap",
    ("chunking", "skew"): "--model context, left minus right",
    ("numeric", "precision"): "--precision",
}


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section in DOCUMENT for name in DOCUMENT[section]]
)
def test_every_field_of_a_fingerprint_is_shown_by_its_option(section: str, name: str) -> None:
    old = DOCUMENT[section][name]
    other: Any = "x" * 40
    if isinstance(old, int | float):
        other = old + 512
    if name == "stitch":
        other = "none"
    document = {**DOCUMENT, section: {**DOCUMENT[section], name: other}}
    plan = replace(plan_of(CONFIG, SPEC), fingerprint=document)
    found = differences(plan, CONFIG, SPEC, cut(CONFIG, SPEC), CONFIG.source)
    expected = f"{section} {name}"
    if section == "settings":
        expected = "--" + name.replace("_", "-")
    elif section == "model":
        expected = f"--model {name.replace('_', ' ')}"
    assert found[0].label == LABELS.get((section, name), expected)
    assert found[0].was != found[0].now
    assert "x" * 9 not in found[0].was or not name.startswith("sha256")  # hashes are shortened


def test_another_context_of_the_model_is_the_only_difference_that_is_named() -> None:
    """No option changes it. With it, the default overlap is another one, too."""
    earlier = replace(SPEC, context=Context(1, 0), overlap_frames=1)
    later = replace(SPEC, context=Context(1, 1), overlap_frames=4)
    found = differences(plan_of(CONFIG, earlier), CONFIG, later, cut(CONFIG, later), CONFIG.source)
    assert explain(found) == changed("--model context, left minus right", "1", "0")


def test_windows_of_an_earlier_version_are_another_fingerprint() -> None:
    """It padded the last window of a chunk of several windows."""
    spec = replace(SPEC, context=Context(0, 0), overlap_frames=0, short_last_chunk=True)
    spec = replace(spec, min_samples=1, overhang=0)
    document = fingerprint_document(CONFIG, spec, cut(CONFIG, spec))
    assert document["preprocessing"].pop("last_chunk") == "short"
    plan = replace(plan_of(CONFIG, spec), fingerprint=document)
    found = differences(plan, CONFIG, spec, cut(CONFIG, spec), CONFIG.source)
    assert explain(found) == changed("preprocessing last_chunk", "no value", "short")
    one = configured(chunk_samples=spec.hop)
    assert "last_chunk" not in fingerprint_document(one, spec, cut(one, spec))["preprocessing"]


def test_the_order_of_split_rows_is_no_option() -> None:
    spec = replace(SPEC, identity={**SPEC.identity, "split": True, "split_rows": "means first"})
    plan = plan_of(CONFIG, spec)
    config = configured(model_options={"hop": 1024})
    whole = spec_of(config)
    found = differences(plan, config, whole, cut(config, whole), config.source)
    assert [one.label for one in found] == ["--model-option hop", "--channels"]


def test_hashes_come_last_and_are_short() -> None:
    plan = plan_of(CONFIG, SPEC)
    config = configured(dtype="float32", model_options={"revision": "new"})
    spec = replace(
        SPEC,
        identity={**SPEC.identity, "sha256_weights": "f" * 64},
        provenance={"revision": "b" * 40},
    )
    found = differences(plan, config, spec, cut(config, spec), config.source)
    assert explain(found) == (
        changed("--revision", "no value", "new")
        + "; --dtype: float16, now float32"
        + f"; --model weights: 01234567 (--revision {'a' * 40}), now ffffffff "
        + f"(--revision {'b' * 40})"
    )


def test_an_option_that_only_decoding_needs_is_no_reason() -> None:
    spec = replace(SPEC, provenance={**SPEC.provenance, "diffusion_steps": 3})
    plan = plan_of(CONFIG, SPEC)
    config = CONFIG.model_copy(update={"model_options": {"diffusion_steps": 3}})
    assert differences(plan, config, spec, cut(config, spec), config.source) == []
    spec = replace(spec, identity={**spec.identity, "package_version": "2.0"})
    (found,) = differences(plan, config, spec, cut(config, spec), config.source)
    assert explain([found]) == (
        "--model package version changed: this store was encoded with 1.0 "
        "(`pip install some-package==1.0`), this run would use 2.0"
    )
