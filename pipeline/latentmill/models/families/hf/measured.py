"""What is measured of an audio tokenizer: lengths, latents, context, and whether batches matter.

It is measured once, with music on the CPU, and kept in the user's cache under a name that has the
hashes of all files and the versions. It becomes part of the model's identity, so a store contains
it, and whoever continues or decodes the store uses the values from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec
from latentmill.models.families.hf.network import CodesShape, TokenizerNetwork, codes_of
from latentmill.models.probing.behaviour import batch_size_error, neighbour_error, repeatability
from latentmill.models.probing.context import edge_errors
from latentmill.models.probing.lengths import fit
from latentmill.models.probing.music import music
from latentmill.models.probing.subject import BATCH, CALL_ERRORS
from latentmill.models.weights import ModelFiles
from latentmill.text.log import get_logger
from latentmill.text.printing import one_line

VERSION = 1  # increases if the same model gives other values
SHORT = (*range(1, 13), 21, 34, 64)  # lengths in frames
CONTEXT_FRAMES = 192  # length of the audio whose parts are compared with the whole
EXACT = 1e-5  # largest error of a frame beyond the context
LARGEST = 2**20  # no measured number is larger
SPARE = 8  # frames beyond the context that must be equal

_log = get_logger("models")


@dataclass(frozen=True)
class MeasuredTokenizer:
    """Properties of an audio tokenizer, measured on the CPU.

    Attributes:
        hop: Samples per frame.
        extra: Frames that the model adds to those of whole hops.
        shortest: The smallest number of hops that it encodes.
        latent_channels: Rows of a latent.
        frames_first: Whether its latents are `[B, Z, D]`.
        context: Frames on each side that differ in a chunk; None if all do.
        one_by_one: Whether the elements of a batch change each other.
        codes: Shape of its codes, and the axes of batch and frames; None without a quantiser.
        decoded: Samples per frame that it decodes to.
        options: Other arguments that decoding needs.
    """

    hop: int
    extra: int
    shortest: int
    latent_channels: int
    frames_first: bool
    context: tuple[int, int] | None
    one_by_one: bool
    codes: tuple[tuple[int, ...], int, int] | None
    decoded: int
    options: dict[str, Any]

    def text(self) -> str:
        """One line of JSON, for the identity."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> MeasuredTokenizer:
        """Raises ValueError, TypeError or LookupError if the text is damaged."""
        try:
            given = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(given, dict):
            raise TypeError("it is not a JSON object")
        context, codes = given.pop("context"), given.pop("codes")
        found = cls(
            **given,
            context=None if context is None else (context[0], context[1]),
            codes=None if codes is None else (tuple(codes[0]), codes[1], codes[2]),
        )
        numbers = [found.hop, found.shortest, found.latent_channels, found.decoded]
        numbers += [found.extra, *(found.context or ())]
        numbers += [] if found.codes is None else [*found.codes[0], *found.codes[1:]]
        if any(type(one) is not int for one in numbers):
            raise TypeError("it has other values than whole numbers")
        # A store may be hostile: the numbers become sizes of tensors.
        least = min(found.context or (0,))
        if min(numbers[:4]) < 1 or least < 0 or max(map(abs, numbers)) > LARGEST:
            raise ValueError("it has numbers out of range")
        if found.codes is not None and not (
            min(found.codes[0], default=0) >= 1
            and math.prod(found.codes[0]) <= LARGEST
            and {*found.codes[1:]} <= {*range(len(found.codes[0]))}
        ):
            raise ValueError("its codes have an impossible shape")
        flags = {type(found.frames_first), type(found.one_by_one)}
        if type(found.options) is not dict or flags != {bool}:
            raise TypeError("it has values of other types")
        return found

    def apply(self, network: TokenizerNetwork) -> None:
        network.frames_first, network.one_by_one = self.frames_first, self.one_by_one
        network.codes = None if self.codes is None else CodesShape(*self.codes)
        if not {*self.options} <= {*network.required()}:
            raise ModelError(
                f"The measured values have arguments for decoding ({', '.join(self.options)}) that "
                "this model does not require: restore the store that they are from."
            )
        network.options = self.options
        if self.decoded != self.hop:
            common = math.gcd(self.decoded, self.hop)
            network.resample = (self.decoded // common, self.hop // common)

    def spec(self, sample_rate: int, channels: int) -> ModelSpec:
        second = math.ceil(sample_rate / self.hop)
        context = None if self.context is None else Context(*self.context)
        overlap = max(second, 2) if context is None else sum(context)
        overlap = max(overlap, self.extra)
        spec = codec_spec(
            "hf",
            sample_rate=sample_rate,
            channels=channels,
            latent_channels=self.latent_channels,
            hop=self.hop,
            context=context,
            chunk_frames=max(4 * overlap, 10 * second),
            overlap_frames=overlap,
        )
        return replace(spec, overhang=-self.extra * self.hop, min_samples=self.shortest * self.hop)


def from_cache(
    files: ModelFiles, versions: tuple[str, ...], measure: Callable[[], MeasuredTokenizer]
) -> MeasuredTokenizer:
    """The measured values from the user's cache, or from `measure`."""
    key = json.dumps([VERSION, *versions, sorted(files.sha256.items())])
    name = hashlib.sha256(key.encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    path = home / "latentmill" / "measured" / f"{name}.json"
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError, LookupError):
        return MeasuredTokenizer.parse(path.expanduser().read_text(encoding="utf-8"))
    found = measure()
    try:
        path = path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(found.text())
        Path(file.name).replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder for `~`
        _log.warning(
            "cannot write %s (%s): the model will be measured again", path, one_line(error)
        )
    return found


@torch.inference_mode()
def measure(
    network: TokenizerNetwork, sample_rate: int, channels: int, hops: list[int]
) -> MeasuredTokenizer:
    """Measure a tokenizer on the CPU; `hops` are likely numbers of samples per frame.

    Raises ModelError with the reason, without the model's name, if it cannot be used.
    """
    rough = _order(network, music(sample_rate, channels, 3 * sample_rate), sample_rate)
    hop = _hop(network, music(sample_rate, channels, math.ceil(20 * rough)), rough, hops)
    sound = music(sample_rate, channels, (CONTEXT_FRAMES + 2) * hop)
    extra, shortest = _lengths(network, sound, hop)
    one, other = sound[None, :, : 16 * hop], sound[None, :, 32 * hop : 48 * hop]
    network.one_by_one = not _independent(network, one, other)
    latent_channels = network.encode(one).shape[1]
    lengths = codec_spec(
        "hf",
        sample_rate=sample_rate,
        channels=channels,
        latent_channels=latent_channels,
        hop=hop,
        context=None,
    )
    errors = edge_errors(network.encode, sound, replace(lengths, overhang=-extra * hop))
    longer = sound[None, :, : 24 * hop]
    codes, network.options = codes_of(network, (one, longer, one.repeat(2, 1, 1)))
    network.codes = codes
    try:
        json.dumps(network.options)  # a loudness, for example, is not a constant
        decoded = [network.decode(network.encode(each)).shape[-1] for each in (one, longer)]
    except CALL_ERRORS as failure:
        raise ModelError(f"its latents cannot be decoded ({one_line(failure)})") from failure
    return MeasuredTokenizer(
        hop=hop,
        extra=extra,
        shortest=shortest,
        latent_channels=latent_channels,
        frames_first=network.frames_first,
        context=errors.reach_at(EXACT, SPARE),
        one_by_one=network.one_by_one,
        codes=None if codes is None else (codes.shape, codes.batch, codes.frames),
        decoded=(decoded[1] - decoded[0]) // 8,
        options=network.options,
    )


def _order(network: TokenizerNetwork, sound: Tensor, sample_rate: int) -> float:
    """Find which dimension of the latents is time; return the approximate samples per frame."""
    if network.whole(sound[None])[1] > 1:
        raise ModelError("it encodes long audio in chunks of its own")
    shapes = [network.raw(sound[None, :, : n * sample_rate]).shape for n in (1, 3)]
    growing = [axis for axis in (1, 2) if len(shapes[0]) == 3 and shapes[0][axis] < shapes[1][axis]]
    if len(growing) != 1:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise ModelError(f"its latents have the shapes {listed} for 1 s and 3 s of audio")
    network.frames_first = growing == [1]
    return 2 * sample_rate / (shapes[1][growing[0]] - shapes[0][growing[0]])


def _independent(network: TokenizerNetwork, one: Tensor, other: Tensor) -> bool:
    """Whether the rest of a batch does not change an element; ModelError if equal calls differ."""
    repeats = repeatability(lambda: network.encode(one), lambda: network.encode(other))
    if not max(repeats.same_seed, repeats.other_seed) <= EXACT:
        raise ModelError("its latents differ from call to call")
    around = (other / other.abs().max().clamp_min(1e-6), 0.01 * other)
    error = max(batch_size_error(network.encode, one), neighbour_error(network.encode, one, around))
    return error <= BATCH


def _hop(network: TokenizerNetwork, sound: Tensor, rough: float, hops: list[int]) -> int:
    """One of the likely hops that fits, or the distance of lengths with one frame more."""

    def frames(samples: int) -> int:
        return network.encode(sound[None, :, :samples]).shape[-1]

    for hop in hops:
        if abs(hop - rough) > max(2, rough / 4):
            continue
        with contextlib.suppress(*CALL_ERRORS):
            counts = [frames(number * hop) for number in (4, 5, 9, 16)]
            if [count - counts[0] for count in counts] == [0, 1, 5, 12]:
                return hop
    counted: dict[int, int] = {}
    for wanted in (6, 12):
        low, high = int((wanted - 4) * rough), int((wanted + 4) * rough)
        while high - low > 1:
            middle = (low + high) // 2
            counted[middle] = frames(middle)
            low, high = (low, middle) if counted[middle] >= wanted else (middle, high)
    found = fit(counted)
    if found is None:
        raise ModelError("no hop fits the lengths of its latents")
    return found.hop


def _lengths(network: TokenizerNetwork, sound: Tensor, hop: int) -> tuple[int, int]:
    """Frames beyond those of whole hops, and the smallest number of hops."""
    extra: dict[int, int] = {}
    for number in SHORT:
        with contextlib.suppress(*CALL_ERRORS):
            extra[number] = network.encode(sound[None, :, : number * hop]).shape[-1] - number
    usual = extra.get(SHORT[-1])
    shortest = SHORT[-1]
    for number in reversed(SHORT):
        if extra.get(number) != usual:
            break
        shortest = number
    if usual is None or shortest > SHORT[-4] or usual + shortest < 1:
        raise ModelError(f"the lengths of its latents follow no rule (frames added: {extra})")
    return usual, shortest
