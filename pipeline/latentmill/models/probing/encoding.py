"""The checks of `encode`, each made by one function."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from latentmill.models.base import Context, Stitch
from latentmill.models.probing.behaviour import (
    COPIES,
    batch_size_error,
    neighbour_error,
    repeatability,
)
from latentmill.models.probing.context import TOLERANCE, edge_errors
from latentmill.models.probing.lengths import Formula, fit, lengths_to_try
from latentmill.models.probing.subject import (
    BATCH,
    ROUNDING,
    Check,
    LatentStatistics,
    Subject,
    generators_check,
)
from latentmill.text.printing import one_line

FLOAT16_MAX = 65504.0


def shape(model: Subject) -> Check:
    spec, given = model.claimed, list(model.one.shape)
    wanted = [1, spec.latent_channels, spec.frames(given[2])]
    check = Check("shape", f"float32 [{spec.latent_channels}, frames]", "")
    try:
        latents = model.loaded.encode(model.one.clone())
    except Exception as error:  # noqa: BLE001  of the user's code
        return check.failed(
            f"encode fails for audio of shape {given}, which the spec allows "
            f"({one_line(error)}): correct channels, sample_multiple or min_samples.",
            measured="an error",
        )
    shape = list(latents.shape)
    kind = str(latents.dtype).removeprefix("torch.")
    check = replace(check, measured=f"{kind} {shape[1:]}")
    if len(shape) != 3 or shape[0] != 1 or (shape != wanted and shape[1:] == wanted[:0:-1]):
        return check.failed(
            f"encode returns a tensor of shape {shape} for audio of shape {given}, but latents "
            "have the shape [batch, channels, frames]: change the order of the dimensions."
        )
    if latents.dtype != torch.float32:
        return check.failed(f"encode returns {kind}, but latents must be float32: convert them.")
    if latents.requires_grad:
        return check.failed(
            "encode returns latents that require gradients: use torch.inference_mode."
        )
    return check


def channels(model: Subject) -> Check:
    claimed, found = model.claimed.latent_channels, model.encode(model.one).shape[1]
    check = Check("channels", f"{claimed} per frame", f"{found} per frame")
    if found == claimed:
        return check
    model.spec = replace(model.spec, latent_channels=found)
    return check.failed(
        f"encode returns {found} latent channels, but the spec claims {claimed}: set "
        f"latent_channels={found}."
    )


def values(model: Subject) -> Check:
    latents = model.encode(model.one)
    peak = model.one.abs().max().clamp_min(1e-6)
    largest = float(model.encode(model.one / peak).abs().max())
    spread = float(latents.std()) if latents.numel() > 1 else 0.0
    model.values = LatentStatistics(
        float(latents.min()), float(latents.max()), float(latents.mean()), spread
    )
    model.largest = largest
    check = Check("values", "finite", "finite")
    if math.isfinite(largest) and bool(latents.isfinite().all()):
        return check
    return check.failed(
        "The latents of music are not finite (NaN or infinity): correct the model.",
        measured="NaN or infinity",
    )


def value_range(model: Subject) -> Check:
    largest = model.largest
    check = Check("range", "float16", f"at most {largest:.3g} at full scale")
    if largest > FLOAT16_MAX:
        return check.failed(
            f"Music at full scale gives latents up to {largest:.3g}, but the largest float16 value "
            f"is {FLOAT16_MAX:.0f}: lower scale_factor, or encode with --dtype float32."
        )
    return check


def lengths(model: Subject) -> Check:
    spec = model.claimed
    frames, failed = _tried(model)
    check = Check(
        "lengths",
        f"hop {spec.hop}, overhang {spec.overhang}, from {spec.min_samples} samples",
        f"{len(frames)} lengths from {min(frames)} to {max(frames)} samples",
    )
    found = fit(frames, Formula(spec.hop, spec.overhang))
    if failed:
        return _with_failures(model, check, frames, failed, found)
    wrong = next((one for one, count in frames.items() if count != spec.frames(one)), None)
    if wrong is None:
        return check
    begin = (
        f"encode returns {frames[wrong]} frames for {wrong} samples, but by the spec they have "
        f"{spec.frames(wrong)}:"
    )
    if found is None:
        model.fitted = False
        return check.failed(
            f"{begin} no hop and overhang fit the numbers of frames, so pad the audio inside "
            "encode to whole frames."
        )
    model.spec = replace(model.spec, hop=found.hop, overhang=found.overhang)
    check = replace(check, measured=f"hop {found.hop}, overhang {found.overhang}")
    return check.failed(f"{begin} set hop={found.hop} and overhang={found.overhang}.")


def _tried(model: Subject) -> tuple[dict[int, int], dict[int, str]]:
    """Frames of the lengths that `encode` accepts, and the reason for each other one."""
    spec, longest = model.claimed, model.audio.shape[1]
    frames: dict[int, int] = {}
    failed: dict[int, str] = {}

    def attempt(lengths: Iterable[int]) -> None:
        for length in sorted({*lengths} - {*frames, *failed}):
            try:
                frames[length] = model.encode(model.audio[None, :, :length]).shape[-1]
            except Exception as error:  # noqa: BLE001  of the user's code
                failed[length] = one_line(error)

    attempt([*lengths_to_try(spec, longest), model.one.shape[-1]])
    if not failed or max(failed) > min(frames):
        return frames, failed
    step = spec.sample_multiple  # find the shortest length, and try some that are longer
    while (gap := min(frames) - max(failed)) > step and max(failed) < min(frames):
        attempt([max(failed) + gap // 2 // step * step])
    attempt(lengths_to_try(replace(spec, min_samples=min(frames)), longest))
    attempt(range(min(frames), longest + 1, math.lcm(step, spec.hop * 3)))
    return frames, failed


def _with_failures(
    model: Subject,
    check: Check,
    frames: dict[int, int],
    failed: dict[int, str],
    found: Formula | None,
) -> Check:
    """The one sentence about lengths that fail, with everything that must change."""
    spec, shortest = model.claimed, min(frames)
    formula = found or Formula(spec.hop, spec.overhang)
    only_short = max(failed) < shortest
    length = max(failed) if only_short else min(failed)
    multiple = spec.sample_multiple if only_short else math.gcd(*frames)
    model.spec = replace(
        model.spec,
        hop=formula.hop,
        overhang=formula.overhang,
        sample_multiple=multiple,
        min_samples=shortest,
    )
    model.fitted = all(model.spec.frames(one) == count for one, count in frames.items())
    changes = []
    if formula != (spec.hop, spec.overhang):
        changes += [f"hop={formula.hop}", f"overhang={formula.overhang}"]
    changes += [] if only_short else [f"sample_multiple={multiple}"]
    changes.append(f"min_samples={shortest}")
    listed = ", ".join(changes[:-1]) + (", and " if len(changes) > 2 else " and ")
    claim = (
        f"the spec claims min_samples={spec.min_samples}"
        if only_short
        else f"the spec allows every multiple of {spec.sample_multiple} from {spec.min_samples} on"
    )
    return check.failed(
        f"encode fails for {length} samples ({failed[length]}), although {claim}: set "
        f"{listed if len(changes) > 1 else ''}{changes[-1]}."
    )


def silence(model: Subject) -> Check:
    shortest = model.one[..., : model.spec.min_samples]
    silent = [model.encode(torch.zeros_like(one)) for one in (model.one, shortest)]
    finite = all(bool(one.isfinite().all()) for one in silent)
    check = Check("silence", "finite", f"at most {float(silent[0].abs().max()):.3g}")
    if finite:
        return check
    return check.failed(
        "The latents of silence are not finite (NaN or infinity), so items with silence fail: "
        "do not divide by a level that can be zero."
    )


def unchanged_input(model: Subject) -> Check:
    given = model.one.clone()
    model.loaded.encode(given)
    check = Check("input", "unchanged", "unchanged")
    if torch.equal(given, model.one):
        return check
    return check.failed(
        "encode changes the audio that it is given: copy it before you change it in place.",
        measured="changed",
    )


def generators(model: Subject) -> Check:
    one, other = model.one, model.other
    model.repeats = repeatability(lambda: model.encode(one), lambda: model.encode(other))
    return generators_check("generators", "encode", "latents", model.repeats)


def determinism(model: Subject) -> Check:
    assert model.repeats is not None, "generators are measured first"
    error = max(model.repeats.same_seed, model.repeats.other_seed)
    check = Check("determinism", "equal", f"difference {error:.2g}")
    if error <= ROUNDING:
        return check
    return check.failed(
        f"Encoding the same audio again gives other latents (relative difference {error:.2g}): "
        "use no noise (the mean of a posterior) and keep no state between calls."
    )


def batch(model: Subject) -> Check:
    error = batch_size_error(model.encode, model.one)
    check = Check("batch", f"difference up to {BATCH:g}", f"difference {error:.2g}")
    if error <= BATCH:
        return check
    return check.failed(
        f"{COPIES} equal elements in a batch get other latents than one alone (relative "
        f"difference {error:.2g}): let nothing depend on the size of the batch."
    )


def neighbours(model: Subject) -> Check:
    error = neighbour_error(model.encode, model.one, model.around())
    check = Check("neighbours", f"difference up to {BATCH:g}", f"difference {error:.2g}")
    if error <= BATCH:
        return check
    return check.failed(
        f"Neighbours in a batch change latents (relative difference {error:.2g}): normalise "
        "each element by its own values only."
    )


def context(model: Subject) -> Check:
    """Not judged if the lengths are wrong, but measured for the spec."""
    claimed = model.claimed.context
    if not model.fitted:
        return Check("context", "", "it depends on the lengths", "not measured")
    errors = edge_errors(model.encode, model.audio, model.spec)
    reach = errors.reach
    measured = "every frame differs" if reach is None else f"{reach[0]} left, {reach[1]} right"
    if model.spec.hop != model.claimed.hop:
        _set_context(model, reach)
        return Check("context", "", f"{measured}, in frames of the measured hop", "not measured")
    if claimed is None:
        return Check("context", "none is enough", measured)
    beyond = errors.beyond(*claimed)
    measured += f" (error {beyond:.2g} beyond the claimed context)"
    check = Check("context", f"{claimed.left} left, {claimed.right} right", measured)
    if beyond <= TOLERANCE:
        return check
    _set_context(model, reach)
    begin = (
        f"Frames beyond the claimed context ({claimed.left} left, {claimed.right} right) still "
        f"differ from those of the whole item (by {beyond:.2g} of their norm):"
    )
    if reach is None:
        return check.failed(
            f'{begin} set context=None and stitch="{model.spec.stitch}", because every frame '
            "differs."
        )
    return check.failed(f"{begin} set context=Context({reach[0]}, {reach[1]}).")


def _set_context(model: Subject, reach: tuple[int, int] | None) -> None:
    spec = model.spec
    if reach is None:
        blended = spec.stitch != "none" and spec.codebook_size is None
        stitch: Stitch = "crossfade" if blended else "none"
        model.spec = replace(spec, context=None, stitch=stitch)
    elif spec.context is not None:
        overlap = max(spec.overlap_frames, sum(reach))
        chunk = max(spec.chunk_frames, 2 * overlap)
        model.spec = replace(
            spec, context=Context(*reach), overlap_frames=overlap, chunk_frames=chunk
        )


def codes(model: Subject) -> Check:
    latents, size = model.encode(model.one)[0], model.claimed.codebook_size
    whole = (latents == latents.round()).all(dim=1)
    if size is None:
        check = Check("codes", "continuous latents", f"{len(latents)} channels")
        if not bool(whole.all()) or not bool(latents.any()):
            return check
        return check.failed(
            "All latents are whole numbers, but the spec claims continuous latents: set "
            "codebook_size if they are codes."
        )
    inside = whole & (latents >= 0).all(dim=1) & (latents < size).all(dim=1)
    check = Check(
        "codes", f"whole numbers below {size}", f"{int(inside.sum())} of {len(inside)} channels"
    )
    # EnCodec 48 kHz adds a row with the loudness, the last one.
    if bool(inside[: max(1, len(inside) - 1)].all()):
        return check
    return check.failed(
        f"Latents contain values that are not codes from 0 to {size - 1}: correct "
        "codebook_size, or set it to None if latents are continuous."
    )
