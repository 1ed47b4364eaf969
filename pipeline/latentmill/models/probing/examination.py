"""Checks what a loaded model does: the claims of its spec, and the protocol of `base.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentmill.models.base import ModelSpec
from latentmill.models.probing import decoding, encoding
from latentmill.models.probing.subject import Check, Subject
from latentmill.text.printing import one_line

Measure = Callable[[Subject], Check]
COUNTS = ("hop", "sample_multiple", "min_samples", "sample_rate", "chunk_frames")


def examine(subject: Subject) -> list[Check]:
    """Make every check. Those that depend on a failed one are listed as not measured."""
    checks = spec_checks(subject.claimed)

    def passes(name: str, measure: Measure) -> bool:
        checks.append(measured(name, measure, subject))
        return checks[-1].status == "passed"

    def skip(reason: str, *names: str) -> None:
        checks.extend(Check(name, "", reason, "not measured") for name in names)

    if not passes("shape", encoding.shape):
        skip("encode fails", "values", *_AFTER_VALUES)
        return checks
    if not passes("values", encoding.values):
        skip("the latents are not finite", *_AFTER_VALUES)
        return checks
    passes("range", encoding.value_range)
    channels = passes("channels", encoding.channels)
    lengths = passes("lengths", encoding.lengths)
    passes("silence", encoding.silence)
    passes("input", encoding.unchanged_input)
    if passes("generators", encoding.generators) and passes("determinism", encoding.determinism):
        passes("batch", encoding.batch)
        passes("neighbours", encoding.neighbours)
        passes("context", encoding.context)
    else:
        skip("encode is not deterministic", "batch", "neighbours", "context")
    passes("codes", encoding.codes)
    if not subject.decodes:
        skip("the model cannot decode", "decoding", "decoder")
    elif not (channels and lengths):
        skip("it depends on the shape of latents", "decoding", "decoder")
    elif not passes("decoding", decoding.lengths):
        skip("decode fails", "decoder")
    else:
        passes("decoder", decoding.decoder)
    return checks


def spec_checks(spec: ModelSpec) -> list[Check]:
    check = Check("spec", "consistent", "consistent")
    return [check.failed(one, "inconsistent") for one in spec_faults(spec)] or [check]


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


def measured(name: str, measure: Measure, subject: Subject) -> Check:
    try:
        with torch.inference_mode():
            return measure(subject)
    except Exception as error:  # noqa: BLE001  of the user's code
        return Check(name, "", "an error").failed(
            f"Measuring {name} failed ({one_line(error)}): encode and decode must accept all that "
            "the spec allows."
        )


_AFTER_VALUES = (
    *("channels", "lengths", "silence", "input", "generators", "determinism", "batch"),
    *("neighbours", "context", "codes", "decoding", "decoder"),
)
