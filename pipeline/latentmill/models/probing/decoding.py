"""The checks of `decode`, each made by one function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from latentmill.models.probing.behaviour import batch_size_error, neighbour_error, repeatability
from latentmill.models.probing.subject import (
    BATCH,
    ROUNDING,
    Check,
    Subject,
    generators_check,
)


def lengths(model: Subject) -> Check:
    spec, latents = model.claimed, model.encode(model.one)
    check = Check("decoding", "every length up to samples(frames)", "every length")
    for frames in sorted({2, 3, min(9, latents.shape[-1])}):
        part = latents[..., :frames].contiguous().to(model.device)
        longest = spec.samples(frames)
        for samples in (longest, longest - min(7, longest // 2)):
            given = model.loaded.decode(part, samples)
            shape, wanted = list(given.shape), [1, spec.channels, samples]
            if shape != wanted:
                return check.failed(
                    f"decode returns audio of shape {shape} for {frames} frames and "
                    f"num_samples={samples}, but must return {wanted}: cut or pad it.",
                    measured=f"{shape} for {wanted}",
                )
            if not bool(given.isfinite().all()):
                return check.failed(
                    "The decoded audio of music is not finite (NaN or infinity): correct the "
                    "decoder.",
                    measured="NaN or infinity",
                )
    return check


def decoder(model: Subject) -> Check:
    spec, latents = model.claimed, model.encode(model.one)
    samples = spec.samples(latents.shape[-1])
    kind = "stochastic" if spec.stochastic_decoder else "deterministic"
    repeats = repeatability(
        lambda: model.decode(latents, samples, seed=7),
        lambda: model.decode(latents, samples, seed=8),
    )
    check = generators_check("decoder", "decode", "audio", repeats)
    if check.status == "failed":
        return check
    check = replace(check, claimed=kind, measured=kind)
    error = max(repeats.same_seed, repeats.other_seed)
    if not error <= ROUNDING:
        return check.failed(
            f"Decoding again with the same seed gives other audio (relative difference "
            f"{error:.2g}): draw all noise from a torch.Generator with the given seed."
        )
    first = model.decode(latents, samples, seed=7)
    differs = not torch.allclose(model.decode(latents, samples, seed=8), first, atol=ROUNDING)
    if differs != spec.stochastic_decoder:
        verb = "changes" if differs else "does not change"
        model.spec = replace(model.spec, stochastic_decoder=differs)
        return check.failed(
            f"The decoded audio {verb} with the seed, but the spec claims stochastic_decoder="
            f"{spec.stochastic_decoder}: set stochastic_decoder={differs}."
        )
    cut = model.decode(latents, samples - min(7, samples // 2), seed=7)
    if not torch.allclose(cut, first[..., : cut.shape[-1]], atol=ROUNDING):
        return check.failed(
            "decode returns other audio if fewer samples are requested: decode all samples, then "
            "cut."
        )
    around = tuple(model.encode(one) for one in model.around())
    decode = partial(model.decode, samples=samples)
    error = max(batch_size_error(decode, latents), neighbour_error(decode, latents, around))
    if not error <= BATCH:
        return check.failed(
            f"The rest of a batch changes decoded audio (relative difference {error:.2g}): "
            "decode each element independently."
        )
    return check
