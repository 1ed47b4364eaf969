"""Compares what a loaded model does with what its spec and the protocol of `base.py` promise."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentmill.models.base import ModelSpec
from latentmill.models.probing import decoding, encoding
from latentmill.models.probing.subject import Promise, Subject
from latentmill.models.weights import one_line

Measure = Callable[[Subject], Promise]
COUNTS = ("hop", "sample_multiple", "min_samples", "sample_rate", "chunk_frames")


def examine(subject: Subject) -> list[Promise]:
    """Measure every promise. What depends on a broken one is listed as not measured."""
    promises = spec_promises(subject.claimed)

    def keeps(name: str, measure: Measure) -> bool:
        promises.append(measured(name, measure, subject))
        return promises[-1].status == "kept"

    def skip(reason: str, *names: str) -> None:
        promises.extend(Promise(name, "", reason, "not measured") for name in names)

    if not keeps("shape", encoding.shape):
        skip("encode fails", "values", *_AFTER_VALUES)
        return promises
    if not keeps("values", encoding.values):
        skip("the latents are not finite", *_AFTER_VALUES)
        return promises
    keeps("range", encoding.value_range)
    channels = keeps("channels", encoding.channels)
    lengths = keeps("lengths", encoding.lengths)
    keeps("silence", encoding.silence)
    keeps("input", encoding.unchanged_input)
    if keeps("generators", encoding.generators) and keeps("determinism", encoding.determinism):
        keeps("batch", encoding.batch)
        keeps("neighbours", encoding.neighbours)
        keeps("context", encoding.context)
    else:
        skip("encode is not deterministic", "batch", "neighbours", "context")
    keeps("codes", encoding.codes)
    if not subject.decodes:
        skip("the model cannot decode", "decoding", "decoder")
    elif not (channels and lengths):
        skip("it depends on the shape of latents", "decoding", "decoder")
    elif not keeps("decoding", decoding.lengths):
        skip("decode fails", "decoder")
    else:
        keeps("decoder", decoding.decoder)
    return promises


def spec_promises(spec: ModelSpec) -> list[Promise]:
    promise = Promise("spec", "consistent", "consistent")
    return [promise.broken(one, "inconsistent") for one in spec_faults(spec)] or [promise]


def spec_faults(spec: ModelSpec) -> list[str]:
    """What contradicts itself in a spec: one sentence each."""
    if not countable(spec):
        return [f"The spec is inconsistent: {', '.join(COUNTS)} must be at least 1."]
    chunk, overlap = spec.samples(spec.chunk_frames), spec.overlap_frames
    multiple, shortest = spec.sample_multiple, spec.min_samples
    values = (*spec.identity.values(), *spec.provenance.values())
    checks = {
        "hop must be a multiple of sample_multiple": spec.hop % multiple == 0,
        "min_samples must be a multiple of sample_multiple": shortest % multiple == 0,
        f"encode must accept a chunk of chunk_frames ({chunk} samples)": (
            chunk >= shortest and chunk % multiple == 0
        ),
        "overlap_frames must be at least the context and at most half of chunk_frames": (
            sum(spec.context or ()) <= overlap <= spec.chunk_frames / 2
        ),
        "batch_size must have entries for cpu and cuda": set(spec.batch_size) == {"cpu", "cuda"},
        'stitch must be "trim" or "state" if there is a context, and another one if not': (
            (spec.context is None) == (spec.stitch not in ("trim", "state"))
        ),
        'stitch "state" needs step_frames': spec.stitch != "state" or spec.step_frames > 0,
        "values of identity and provenance must be text, numbers, booleans or None": all(
            value is None or isinstance(value, str | int | float | bool) for value in values
        ),
    }
    return [f"The spec is inconsistent: {text}." for text, holds in checks.items() if not holds]


def countable(spec: ModelSpec) -> bool:
    """Whether lengths can be computed at all; nothing can be measured if not."""
    return all(getattr(spec, name) >= 1 for name in COUNTS)


def measured(name: str, measure: Measure, subject: Subject) -> Promise:
    try:
        with torch.inference_mode():
            return measure(subject)
    except Exception as error:  # noqa: BLE001  of the user's code
        return Promise(name, "", "an error").broken(
            f"Measuring {name} failed ({one_line(error)}): encode and decode must accept all that "
            "the spec allows."
        )


_AFTER_VALUES = (
    *("channels", "lengths", "silence", "input", "generators", "determinism", "batch"),
    *("neighbours", "context", "codes", "decoding", "decoder"),
)
