"""The mixing desk: records mixed in latent space, and the same mix of waveforms to compare.

A mix is a list of channels on one grid of latent frames. A part of it is decoded: its frames are
read, mixed and decoded window by window, so only they are in memory.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import soundfile

from latentmill.decoding.decoder import LatentSource
from latentmill.decoding.files import fitted, mixed
from latentmill.errors import ConfigError, ItemError
from latentmill.models.base import ModelSpec
from latentmill.pictures.drawing import heat_map
from latentmill.record import FloatArray, Latent
from latentmill.store.remote_sources import source_is_near
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source
from latentmill.view.query import MAX_SECONDS, Channel, MixRequest

Side = Literal["latent", "decoded", "original"]
_KEPT_BYTES = 128 << 20  # of decoded channels: changing a gain decodes nothing again
_SOURCE_SECONDS = 600.0  # sources are loaded from their start


@dataclass(frozen=True)
class MixRange:
    """A part of a mix: `frames` frames from `start` on, of `total`, and `samples` of audio."""

    total: int
    start: int
    frames: int
    samples: int
    seconds: float


class Desk:
    """Mixes and decodes records of a store. Not thread-safe.

    `remote_sources` allows reading source audio from other addresses than this machine and the
    bucket or server of the store.
    """

    def __init__(self, store: LatentStore, *, remote_sources: bool = False) -> None:
        self._store, self._remote_sources = store, remote_sources
        self._decoded: OrderedDict[tuple[object, ...], FloatArray] = OrderedDict()

    @property
    def spec(self) -> ModelSpec:
        return self._store.model().spec

    @property
    def codes(self) -> bool:
        """Whether the latents are codes, which cannot be mixed."""
        return self._store.codes

    @property
    def chunked(self) -> bool:
        """Whether the latents are overlapping chunks, which can neither be moved nor cut."""
        return self._store.chunking.stitch == "none"

    def part(self, mix: MixRequest) -> MixRange:
        """The part of a mix that is decoded.

        Raises:
            ConfigError: The records cannot be mixed or panned, or the part is too long or not in
                the mix.
        """
        if not _plain(mix):
            self._store.origin.check_arithmetic()
        if any(channel.pan for channel in mix.channels) and (why := why_no_pan(self._store)):
            raise ConfigError(f"Records of this store cannot be panned: {why}")
        if self.chunked:
            return self._chunks(mix)
        spec = self.spec
        entries = [self._store.entry(channel.key) for channel in mix.channels]
        total = max(e.frames + c.offset for e, c in zip(entries, mix.channels, strict=True))
        samples = max(
            e.num_samples + c.offset * spec.hop for e, c in zip(entries, mix.channels, strict=True)
        )
        if total <= mix.start or samples <= mix.start * spec.hop:
            raise ConfigError(
                "Nothing sounds in this part of the mix: choose an earlier start or other offsets."
            )
        frames = min(total - mix.start, mix.frames or total)
        samples = min(samples - mix.start * spec.hop, spec.samples(frames))
        if samples < 1:
            raise ConfigError("This part of the mix has no samples: choose a longer one.")
        self._check_length(samples)
        return MixRange(total, mix.start, frames, samples, samples / spec.sample_rate)

    def _chunks(self, mix: MixRequest) -> MixRange:
        """The whole mix of records that are stored as chunks."""
        entries = [self._store.entry(channel.key) for channel in mix.channels]
        if any(channel.offset for channel in mix.channels) or mix.start:
            raise ConfigError(
                "This store has overlapping chunks (stitch none), which cannot be moved or cut: "
                "use no offsets, and mix whole records."
            )
        if len({entry.shape for entry in entries}) > 1:
            raise ConfigError(
                "Records of different lengths cannot be mixed in a store with overlapping chunks "
                "(stitch none): choose records of one length."
            )
        samples = max(entry.num_samples for entry in entries)
        self._check_length(samples)
        seconds = samples / self.spec.sample_rate
        return MixRange(entries[0].chunks, 0, entries[0].chunks, samples, seconds)

    def _check_length(self, samples: int) -> None:
        seconds = samples / self.spec.sample_rate
        most = MAX_SECONDS * self.spec.sample_rate + 2 * self.spec.hop + max(0, self.spec.overhang)
        if samples > most:  # whole frames that cover MAX_SECONDS, and one more
            raise ConfigError(
                f"This part of the mix is {seconds:.1f} s long, but at most {MAX_SECONDS:g} s are "
                "decoded at once: choose a shorter part, or use `latentmill mix`."
            )

    def audio(
        self, mix: MixRequest, side: Side, check: Callable[[], None] = lambda: None
    ) -> FloatArray:
        """Decode a part of a mix to `[channels, samples]`.

        `latent` is the mix in latent space, `decoded` the sum of the decoded channels, `original`
        the sum of their source audio. `check` is called between windows; it raises to stop.
        """
        part = self.part(mix)
        if side == "latent":
            source = self._placed(mix.channels[0], part) if self.codes else self._mixed(mix, part)
            return self._decode(source, part, check)
        total: FloatArray = np.zeros((self.spec.channels, part.samples), np.float32)
        for channel in mix.channels:
            check()
            if channel.gain:
                gains: Any = channel.gain  # any number of channels
                if channel.pan:  # two channels
                    gains = np.array(self.gains(channel), np.float32)[:, None]
                total += gains * self._sound(channel, part, side, check)
        return total

    def gains(self, channel: Channel) -> tuple[float, float]:
        """Gains of the left and the right channel: the pan lowers the opposite one."""
        left, right = min(1.0, 1.0 - channel.pan), min(1.0, 1.0 + channel.pan)
        return round(channel.gain * left, 6), round(channel.gain * right, 6)

    def _mixed(self, mix: MixRequest, part: MixRange) -> LatentSource:
        """The mix, of which only the frames that are decoded are read."""
        origin = self._store.origin
        sources = [self._placed(channel, part) for channel in mix.channels]
        gains = [self.gains(channel) for channel in mix.channels]
        if not any(channel.pan for channel in mix.channels):
            return mixed(sources, [left for left, _ in gains], origin=origin)
        half = len(origin.frames) // 2
        sides = [
            mixed(
                [_rows(source, rows) for source in sources],
                [pair[side] for pair in gains],
                origin=replace(origin, frames=origin.frames[rows]),
            )
            for side, rows in enumerate((slice(0, half), slice(half, None)))
        ]
        shape = (2 * half, part.total)
        return LatentSource(
            shape, lambda start, n: np.concatenate([one.read(start, n) for one in sides])
        )

    def _placed(self, channel: Channel, part: MixRange) -> LatentSource:
        source = self._store.source(channel.key)
        if len(source.shape) == 3 or self._store.codes:
            return source
        return fitted(source, part.total, origin=self._store.origin, offset=channel.offset)

    def _decode(
        self, source: LatentSource, part: MixRange, check: Callable[[], None]
    ) -> FloatArray:
        if len(source.shape) == 2:
            whole = source

            def read(start: int, count: int) -> Latent:
                return whole.read(part.start + start, count)

            source = LatentSource((whole.shape[0], part.frames), read)
        blocks = []
        for block in self._store.decode_blocks(source, part.samples):
            check()
            blocks.append(block)
        return np.concatenate(blocks, axis=1)

    def _sound(
        self, channel: Channel, part: MixRange, side: Side, check: Callable[[], None]
    ) -> FloatArray:
        """One channel's waveform in a part of the mix, without its gain."""
        name = (side, channel.key, channel.offset, part)
        if name not in self._decoded:
            self._decoded[name] = (
                self._decode(self._placed(channel, part), part, check)
                if side == "decoded"
                else self._original(channel, part)
            )
            kept = self._decoded
            while len(kept) > 1 and sum(one.nbytes for one in kept.values()) > _KEPT_BYTES:
                kept.popitem(last=False)
        self._decoded.move_to_end(name)
        return self._decoded[name]

    def latent_picture(self, key: str, seconds: float) -> bytes:
        """The heat map of a latent, of at most its first `seconds`."""
        store = self._store
        source, rate = store.source(key), store.info.model["sample_rate"]
        if self.chunked:
            count = min(source.shape[0], math.ceil(seconds * rate / store.chunking.step))
        else:
            rate /= store.info.model["hop"]
            count = min(source.shape[1], max(1, round(seconds * rate)))
        mean, deviation = (None, None) if store.codes else (store.mean, store.std)
        return heat_map(source.read(0, count), mean=mean, deviation=deviation).data

    def _original(self, channel: Channel, part: MixRange) -> FloatArray:
        spec = self.spec
        first = (part.start - channel.offset) * spec.hop  # sample of the record
        audio: FloatArray = np.zeros((spec.channels, part.samples), np.float32)
        end = first + part.samples
        if end <= 0:
            return audio
        if end > _SOURCE_SECONDS * spec.sample_rate:
            raise ConfigError(
                f"Source audio can be heard up to {_SOURCE_SECONDS / 60:g} minutes from its start: "
                "choose an earlier part."
            )
        record = self._store.without_latent(channel.key)
        if not self._remote_sources and not source_is_near(self._store, record):
            raise ConfigError(
                f"The source of {channel.key} is at another address: if you trust the store, start "
                "`latentmill view` with --remote-sources."
            )
        try:
            sound = read_source(record, spec.channels, end)
        except ItemError as error:
            raise ConfigError(f"The source of {channel.key} cannot be read: {error}.") from error
        sound = sound[:, max(0, first) :]
        begin = max(0, -first)
        audio[:, begin : begin + sound.shape[1]] = sound[:, : part.samples - begin]
        return audio


def wav(audio: FloatArray, rate: int) -> bytes:
    """A WAV file of 32-bit floats."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def why_no_sound(store: LatentStore) -> str:
    """Why records can be neither decoded nor mixed; empty if they can be."""
    if store.decodable:
        return ""
    return "Its values are not latents of audio, so they cannot be decoded or mixed."


def why_no_pan(store: LatentStore) -> str:
    """Why records cannot be panned in latent space; empty if they can be."""
    if store.info.model.get("split") != 2:
        if store.info.model["channels"] == 1:
            return "its latents are mono. Encode with --channels split for two channels."
        return "its model encodes all channels into the same latent values."
    if store.origin.deviations or store.chunking.stitch == "none":
        return "its latents are not the two channels side by side."
    return ""


def _plain(mix: MixRequest) -> bool:
    """Whether a mix is one unchanged record."""
    first, *others = mix.channels
    return not others and first == Channel(key=first.key)


def _rows(source: LatentSource, rows: slice) -> LatentSource:
    count = len(range(*rows.indices(source.shape[0])))
    return LatentSource((count, source.shape[1]), lambda start, n: source.read(start, n)[rows])
