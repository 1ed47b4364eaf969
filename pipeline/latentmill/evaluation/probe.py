"""Measures what a model's spec claims, on the user's recordings or on synthesised music."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentmill.audio import open_audio, prepare
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked, encode_whole
from latentmill.errors import ItemError, LatentmillError, SourceError
from latentmill.evaluation.audio_metrics import rms
from latentmill.models.base import Autoencoder, ModelHandle, ModelSpec
from latentmill.models.families.audio_encoder import can_decode
from latentmill.models.inference.device import pick_device
from latentmill.models.inference.precision import numeric_mode
from latentmill.models.probing.behaviour import distance
from latentmill.models.probing.context import TOLERANCE
from latentmill.models.probing.examination import (
    countable,
    examine,
    measured,
    spec_checks,
)
from latentmill.models.probing.music import music, repeated
from latentmill.models.probing.subject import (
    CALL_ERRORS,
    Check,
    LatentStatistics,
    Subject,
    samples_needed,
)
from latentmill.models.registry import resolve
from latentmill.record import FloatArray
from latentmill.sources.base import Item
from latentmill.sources.open import open_source
from latentmill.sources.reading import UnitReader
from latentmill.sources.settings import SourceSettings
from latentmill.text.printing import counted, one_line

LISTED = 10_000  # items of a source that are listed, at most
FILES = 24  # items that are loaded, about
FILE_SECONDS = 30.0  # that are loaded of each item
PARTS = 6  # recordings that are joined if they are long
QUIET = 1e-3  # RMS of recordings that are not used
SEAM_FRAMES = 48  # least length of the chunks whose seams are measured
SYNTHESISED = "synthesised music (give --audio FOLDER for real recordings)"


@dataclass(frozen=True)
class Probe:
    """Result of `probe`.

    Attributes:
        model: The model's name, as given.
        device: Where it ran.
        audio: What it was measured with.
        checks: Each claim, the measured value and whether it holds.
        failed: A sentence for each failed check.
        latents: Statistics of the scaled latents; None if encoding failed.
        spec: The spec with measured values in place of wrong ones.
    """

    model: str
    device: str
    audio: str
    checks: tuple[Check, ...]
    failed: tuple[str, ...]
    latents: LatentStatistics | None
    spec: ModelSpec


def probe(
    model: str | ModelHandle,
    *,
    audio: str | os.PathLike[str] | None = None,
    device: str = "auto",
    model_options: Mapping[str, Any] | None = None,
    channels: str | None = None,
) -> Probe:
    """Measure everything that a model's spec claims.

    Args:
        model: Name of a model, as for `encode`, or a handle.
        audio: Folder or other source with recordings; None: synthesised music.
        device: Device of the model.
        model_options: Options of the model.
        channels: `mono` or `split`, as for `encode`.

    Raises:
        ModelError: The model cannot be loaded.
        SourceError: The source has no recording that can be loaded.
    """
    given = model if isinstance(model, str) else None
    handle = resolve(model, model_options, channels) if isinstance(model, str) else model
    chosen = pick_device(device)
    if not countable(handle.spec):
        return _unloaded(given or handle.spec.name, chosen, handle, spec_checks(handle.spec))
    chunks = _short_chunks(handle.spec)
    samples = max(samples_needed(handle.spec), _seam_samples(handle.spec, chunks))
    if audio is None:
        label = SYNTHESISED
        sound = music(handle.spec.sample_rate, handle.spec.channels, samples)
    else:
        sound, label = _recorded(os.fspath(audio), handle.spec, samples)
    checks = [_handle_check(handle)]
    try:
        loaded = handle.load(chosen)
    except LatentmillError:
        raise
    except Exception as error:  # noqa: BLE001  of the user's code
        checks.append(
            Check("load", "loads", "an error").failed(
                f"Loading the model failed ({one_line(error)}): correct load."
            )
        )
        return _unloaded(given or handle.spec.name, chosen, handle, checks)
    with numeric_mode("float32", chosen), torch.inference_mode():
        subject = Subject(loaded, sound, can_decode(handle))
        checks += examine(subject)
        checks.append(measured("seams", lambda _: _seams(loaded, sound, chunks, checks), subject))
    return Probe(
        model=given or handle.spec.name,
        device=chosen,
        audio=label,
        checks=tuple(checks),
        failed=tuple(one.sentence for one in checks if one.sentence is not None),
        latents=subject.values,
        spec=subject.spec,
    )


def _unloaded(name: str, device: str, handle: ModelHandle, checks: list[Check]) -> Probe:
    """The result if nothing could be measured."""
    failed = tuple(one.sentence for one in checks if one.sentence is not None)
    return Probe(name, device, "nothing", tuple(checks), failed, None, handle.spec)


def _handle_check(handle: ModelHandle) -> Check:
    check = Check("handle", "can be pickled", "can be pickled")
    try:
        pickle.dumps(handle)
    except Exception as error:  # noqa: BLE001  of the user's code
        return check.failed(
            f"The model's handle cannot be pickled ({one_line(error)}), but workers receive it by "
            "pickle: make it a dataclass of plain values.",
            measured="an error",
        )
    return check


def _short_chunks(spec: ModelSpec) -> Chunking | None:
    """Chunks as short as the overlap allows, so that there are seams; None if the spec is wrong."""
    frames = min(spec.chunk_frames, max(SEAM_FRAMES, 2 * spec.overlap_frames + 1))
    try:
        return Chunking.for_model(spec, seconds=spec.samples(frames) / spec.sample_rate)
    except CALL_ERRORS:
        return None


def _seam_samples(spec: ModelSpec, chunking: Chunking | None) -> int:
    return 0 if chunking is None else chunking.samples + 2 * chunking.step + spec.hop


def _seams(
    model: Autoencoder, sound: Tensor, chunking: Chunking | None, checks: list[Check]
) -> Check:
    """Compare stitched chunks with the whole: with `trim` and `state` they must be equal."""
    needed = ("spec", "shape", "channels", "lengths", "generators", "determinism", "context")
    wrong = [one.name for one in checks if one.name in needed and one.status != "passed"]
    spec = model.spec
    if wrong or chunking is None:
        reason = f"it depends on {wrong[0]}" if wrong else "the spec allows no chunks"
        return Check("seams", "", reason, "not measured")
    if spec.stitch == "none":
        return Check("seams", "chunks are stored as they are", "", "not measured")
    length = _seam_samples(spec, chunking)
    whole = encode_whole(model, sound[:, :length]).cpu()
    error = distance(encode_chunked(model, sound[:, :length], chunking), whole)
    seconds = chunking.samples / spec.sample_rate
    found = f"{spec.stitch} of {seconds:.2f} s chunks: difference {error:.2g}"
    if spec.stitch not in ("trim", "state"):
        return Check("seams", "not equal", found)
    check = Check("seams", f"difference up to {TOLERANCE:g}", found)
    if error <= TOLERANCE:
        return check
    if spec.stitch == "state":
        return check.failed(
            f"Chunks that continue from a state differ from the whole item (relative difference "
            f"{error:.2g}): encode_step must return everything that later frames depend on."
        )
    return check.failed(
        f"Trimmed chunks differ from the whole item (relative difference {error:.2g}), although "
        "the context is right: encode must not depend on the length of the chunk."
    )


def _recorded(source: str, spec: ModelSpec, samples: int) -> tuple[Tensor, str]:
    """Parts of recordings that are spread over a source, one after another; none is silent."""
    items = list(itertools.islice(open_source(SourceSettings(source=source)).items(), LISTED))
    wanted = items[:: max(1, len(items) // FILES)]
    longest = max(spec.sample_rate, -(-samples // PARTS))
    parts: list[FloatArray] = []
    length = 0
    for audio in _loaded(wanted, spec):
        parts.append(_loudest(audio, longest))
        length += parts[-1].shape[1]
        if length >= samples:
            break
    if not parts:
        raise SourceError(
            f"Source {source} has no recording that can be loaded and is not silent: use another "
            "folder."
        )
    seconds = length / spec.sample_rate
    label = f"{seconds:.1f} s of {counted(len(parts), 'recording')} in {source}"
    return repeated(np.concatenate(parts, axis=1), samples), label


def _loaded(items: Sequence[Item], spec: ModelSpec) -> Iterator[FloatArray]:
    for item in items:
        blocks: list[FloatArray] = []
        with (
            contextlib.suppress(ItemError),
            UnitReader([item]) as reader,
            reader.open(item) as file,
        ):
            waveform = prepare(
                open_audio(file), sample_rate=spec.sample_rate, channels=spec.channels
            )
            for block in waveform.blocks():
                blocks.append(block)
                if sum(b.shape[1] for b in blocks) > FILE_SECONDS * spec.sample_rate:
                    break
        if blocks:
            audio = np.concatenate(blocks, axis=1)
            if rms(torch.from_numpy(audio)) >= QUIET:
                yield audio


def _loudest(audio: FloatArray, length: int) -> FloatArray:
    """The loudest part of a length, of those that start at multiples of half of it."""
    starts = range(0, max(1, audio.shape[1] - length + 1), max(1, length // 2))
    start = max(starts, key=lambda one: float(np.square(audio[:, one : one + length]).sum()))
    return audio[:, start : start + length]
