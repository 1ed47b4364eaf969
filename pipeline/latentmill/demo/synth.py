"""Synthesis of short songs as stems with four instruments.

The synthesis is additive: a note is a sum of decaying partials below the Nyquist frequency, so
there is no aliasing. Levels are those of real stems (-20 to -14 dBFS RMS), and the stems of a song
add up without clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from latentmill.record import FloatArray

STEREO = 2
BEATS_PER_BAR = 4
TAIL_SECONDS = 0.5
MIX_PEAK = 0.97
# RMS of each stem in dBFS.
LEVELS = {"drums": -17.5, "bass": -17.0, "keys": -18.0, "lead": -18.0}


@dataclass(frozen=True)
class Score:
    """The notes of a song.

    Attributes:
        bpm: Quarter notes per minute.
        key: Name of the key, such as `A minor`.
        chords: One chord per bar: a tuple of MIDI notes, of which the first and lowest is the root.
        scale: MIDI notes of the melody, in ascending order.
        seed: Seed of the melody and of the drums' noise.
    """

    bpm: float
    key: str
    chords: tuple[tuple[int, ...], ...]
    scale: tuple[int, ...]
    seed: int

    def seconds(self) -> float:
        """Length of the song: its bars, and a tail in which the last notes fade out."""
        return len(self.chords) * BEATS_PER_BAR * 60 / self.bpm + TAIL_SECONDS


def stems(score: Score, sample_rate: int, channels: int) -> dict[str, FloatArray]:
    """Synthesise a score: audio `[channels, T]` by role, float32, all of one length.

    The peak of the stems' sum is at most `MIX_PEAK`.
    """
    length = round(score.seconds() * sample_rate)
    players: dict[str, Callable[[_Track, Score], None]] = {
        "drums": _play_drums,
        "bass": _play_bass,
        "keys": _play_keys,
        "lead": _play_lead,
    }
    played: dict[str, FloatArray] = {}
    for role, play in players.items():
        track = _Track(length, sample_rate, score.bpm)
        play(track, score)
        audio = track.audio if channels == STEREO else track.audio.mean(axis=0, keepdims=True)
        played[role] = _at_level(audio, LEVELS[role])
    peak = float(np.abs(np.sum(list(played.values()), axis=0)).max())
    gain = np.float32(min(1.0, MIX_PEAK / peak))
    return {role: audio * gain for role, audio in played.items()}


class _Track:
    """A stereo track to which notes are added at beats."""

    def __init__(self, length: int, sample_rate: int, bpm: float) -> None:
        self.audio: FloatArray = np.zeros((STEREO, length), np.float32)
        self.sample_rate = sample_rate
        self.beat_seconds = 60 / bpm

    def time(self, seconds: float) -> FloatArray:
        """Times of the samples of a sound, in seconds."""
        return (np.arange(round(seconds * self.sample_rate)) / self.sample_rate).astype(np.float32)

    def add(self, sound: FloatArray, beat: float, gain: float, pan: float = 0.0) -> None:
        """Add a mono sound; `pan` from -1 (left) to 1 (right), at constant power."""
        start = round(beat * self.beat_seconds * self.sample_rate)
        left = self.audio.shape[1] - start
        angle = (pan + 1) * np.pi / 4
        sides = np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)
        self.audio[:, start : start + len(sound)] += gain * sides * sound[:left]

    def saturate(self, drive: float) -> None:
        """Saturate as tape does: the track gets louder at the same peak."""
        self.audio = np.tanh(drive / np.abs(self.audio).max() * self.audio)


def _tone(
    track: _Track, midi: float, seconds: float, partials: Sequence[float], decay: float
) -> FloatArray:
    """A note: partial k has k times the pitch and decays k ** 0.5 times as fast as the first.

    `midi` is the pitch (69 is 440 Hz), `partials` are the amplitudes of the partials, the first one
    is the fundamental, and `decay` is the time in seconds after which the fundamental is at 1/e.
    """
    time = track.time(seconds)
    pitch = 440.0 * 2 ** ((midi - 69) / 12)
    sound = np.zeros_like(time)
    for k, amplitude in enumerate(partials, start=1):
        if k * pitch < 0.45 * track.sample_rate:
            fade = np.exp(time * np.float32(-(k**0.5) / decay))
            sound += amplitude * fade * np.sin(time * np.float32(2 * np.pi * k * pitch))
    return sound * _ramps(len(sound), round(0.005 * track.sample_rate))


def _ramps(length: int, ramp: int) -> FloatArray:
    """An envelope that rises and falls over `ramp` samples, to avoid clicks."""
    position = np.arange(length, dtype=np.float32)
    edges: FloatArray = np.minimum(position, position[::-1]) / ramp
    return np.minimum(edges, np.float32(1))


def _play_drums(track: _Track, score: Score) -> None:
    """Add the kick on one and three, the snare on two and four, and hats on the eighths."""
    noise = np.random.default_rng(score.seed).standard_normal(track.sample_rate).astype(np.float32)
    kick_time, snare_time, hat_time = track.time(0.35), track.time(0.22), track.time(0.08)
    # The pitch falls from 160 to 48 Hz; this is the integral of that frequency.
    phase = 48 * kick_time + 112 * 0.03 * (1 - np.exp(-kick_time / 0.03))
    kick = np.sin(2 * np.pi * phase) * np.exp(-kick_time / 0.11)
    rattle = np.diff(noise[: len(snare_time) + 1]) * np.exp(-snare_time / 0.06)
    snare = 0.5 * rattle + np.sin(2 * np.pi * 185 * snare_time) * np.exp(-snare_time / 0.05)
    hat = np.diff(noise[: len(hat_time) + 2], 2) * np.exp(-hat_time / 0.018)
    for beat in range(len(score.chords) * BEATS_PER_BAR):
        if beat % 2 == 0:
            track.add(kick.astype(np.float32), beat, 1.0)
        else:
            track.add(snare.astype(np.float32), beat, 0.55)
        track.add(hat.astype(np.float32), beat, 0.1, pan=0.3)
        track.add(hat.astype(np.float32), beat + 0.5, 0.16, pan=-0.3)
    track.saturate(6.0)


def _play_bass(track: _Track, score: Score) -> None:
    """Add the chord's root in eighths; the last one in a bar is an octave higher."""
    partials = [1.0, 0.5, 0.3, 0.18, 0.1, 0.06]
    for bar, chord in enumerate(score.chords):
        for eighth in (0, 1, 3, 4, 6, 7):
            note = chord[0] - 12 + (12 if eighth == 7 else 0)
            sound = _tone(track, note, 0.95 * track.beat_seconds, partials, decay=0.5)
            track.add(sound, bar * BEATS_PER_BAR + eighth / 2, 1.0 if eighth % 4 == 0 else 0.8)
    track.saturate(3.0)


def _play_keys(track: _Track, score: Score) -> None:
    """Add an electric piano: the chord twice per bar, low notes left and high notes right."""
    partials = [1.0, 0.25, 0.12, 0.2, 0.04, 0.08]
    for bar, chord in enumerate(score.chords):
        for beat, beats in ((0.0, 2.5), (2.5, 1.5)):
            for voice, note in enumerate(chord):
                pan = 0.8 * (2 * voice / (len(chord) - 1) - 1)
                sound = _tone(track, note + 12, beats * track.beat_seconds, partials, decay=1.2)
                # The notes of a chord start 0.03 beats after one another.
                track.add(sound, bar * BEATS_PER_BAR + beat + 0.03 * voice, 0.5, pan)
    track.saturate(2.0)


def _play_lead(track: _Track, score: Score) -> None:
    """Add a melody: a random walk on the scale, with an echo on the other side."""
    walk = np.random.default_rng(score.seed + 1)
    partials = [1 / k for k in range(1, 9)]
    place, beat, end = len(score.scale) // 2, 0.0, len(score.chords) * BEATS_PER_BAR
    while beat < end:
        beats = float(walk.choice([0.5, 0.5, 1.0, 1.5]))
        place = int(np.clip(place + walk.integers(-2, 3), 0, len(score.scale) - 1))
        sound = _tone(track, score.scale[place], beats * track.beat_seconds, partials, decay=0.8)
        track.add(sound, beat, 1.0, pan=-0.2)
        if beat + 0.75 < end:
            track.add(sound, beat + 0.75, 0.3, pan=0.6)
        beat += beats
    track.saturate(2.0)


def _at_level(audio: FloatArray, dbfs: float) -> FloatArray:
    """Scale to an RMS over both channels in dBFS."""
    rms = float(np.sqrt(np.mean(audio**2)))
    return audio * np.float32(10 ** (dbfs / 20) / rms)
