"""The demo's corpus: three songs as stems, and the files that a real corpus has as well.

One song is lossless and lies there with its mix: its stems add up to it sample by sample, so that
a mix of latents can be compared with the mix of the waveforms. The others come in OGG, MP3 and
mixed formats. Beside them: silence, a FLAC cut in the middle and an empty file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import xxhash
from numpy.typing import NDArray

from latentmill.demo.synth import Score, stems
from latentmill.record import FloatArray

# Changes whenever the corpus does: an older one is then written anew.
VERSION = 1
MARKER = ".corpus.json"
MIX = "mix"
SILENCE_SECONDS = 5

Samples = NDArray[np.int16]


@dataclass(frozen=True)
class Song:
    """A song of the corpus; a stem's key in a store is `name/role`.

    Attributes:
        name: Its folder in the corpus.
        title: What a person calls it.
        prompt: What a person would ask a generative model for.
        score: What is played.
        sample_rate: Hz, of all its files.
        channels: Of all its files.
        files: Extension of each file by role; a `mix`, where there is one, is the sum of the rest.
    """

    name: str
    title: str
    prompt: str
    score: Score
    sample_rate: int
    channels: int
    files: Mapping[str, str]

    @property
    def stem_keys(self) -> tuple[str, ...]:
        """The stems' keys, the mix left out."""
        return tuple(f"{self.name}/{role}" for role in self.files if role != MIX)

    @property
    def mix_key(self) -> str | None:
        """The mix's key, if the song has a mix."""
        return f"{self.name}/{MIX}" if MIX in self.files else None


SONGS = (
    Song(
        name="night-drive",
        title="Night Drive",
        prompt="calm synthwave at night, electric piano and a singing lead",
        score=Score(
            bpm=100.0,
            key="A minor",
            chords=(
                (45, 52, 60, 64),
                (41, 48, 57, 60),
                (48, 55, 64, 67),
                (43, 50, 59, 62),
                (45, 52, 60, 64),
            ),
            scale=(69, 72, 74, 76, 79, 81, 84),
            seed=11,
        ),
        sample_rate=44_100,
        channels=2,
        files={"drums": "wav", "bass": "flac", "keys": "flac", "lead": "wav", MIX: "flac"},
    ),
    Song(
        name="harbour",
        title="Harbour",
        prompt="sunny pop by the sea, bright and quick",
        score=Score(
            bpm=120.0,
            key="D major",
            chords=(
                (50, 57, 62, 66),
                (45, 52, 61, 64),
                (47, 54, 62, 66),
                (43, 50, 59, 62),
                (50, 57, 62, 66),
                (45, 52, 61, 64),
            ),
            scale=(74, 76, 78, 81, 83, 86),
            seed=23,
        ),
        sample_rate=48_000,
        channels=2,
        files={"drums": "ogg", "bass": "flac", "keys": "ogg", "lead": "mp3"},
    ),
    Song(
        name="old-tape",
        title="Old Tape",
        prompt="slow lo-fi beat from a worn cassette",
        score=Score(
            bpm=80.0,
            key="E minor",
            chords=((40, 47, 55, 59, 62), (45, 52, 60, 64, 67)) * 2,
            scale=(64, 67, 69, 71, 74, 76),
            seed=37,
        ),
        sample_rate=22_050,
        channels=1,
        files={"drums": "wav", "bass": "ogg", "keys": "flac", "lead": "mp3"},
    ),
)

# Keys of the files that no decoder can read to the end.
BROKEN = ("oddities/cut-short", "oddities/empty")
SILENT = "oddities/silence"

ABOUT = """# The demo's corpus

Synthesised by latentmill: three songs as stems, and in `oddities` what a real corpus has too.
`night-drive` is lossless, and its stems add up to its mix, sample by sample.
"""


@dataclass(frozen=True)
class CorpusSummary:
    """What lies in the corpus.

    Attributes:
        folder: Where it is.
        songs: Its songs; the first one is lossless and has a mix.
        broken: Keys of the items that must fail.
        silent: Key of the item that is silence.
        audio_files: How many files have an audio file's name, the broken ones included.
        seconds: Playing time of all files that can be read.
        size: Bytes of the audio files.
        written: Whether this call wrote it; False if it was there already.
    """

    folder: Path
    songs: tuple[Song, ...]
    broken: tuple[str, ...]
    silent: str
    audio_files: int
    seconds: float
    size: int
    written: bool


def write_corpus(folder: Path) -> CorpusSummary:
    """Write the demo's corpus into a folder, or find it there whole.

    The audio is the same whenever and wherever it is written; files of other names are left alone.

    Raises:
        OSError: The folder cannot be written to.
    """
    written = not _is_intact(folder)
    if written:
        _write(folder)
    audio = [path for path in _files(folder) if path.suffix not in {".json", ".txt", ".md"}]
    lengths = [song.score.seconds() * len(song.files) for song in SONGS]
    return CorpusSummary(
        folder=folder,
        songs=SONGS,
        broken=BROKEN,
        silent=SILENT,
        audio_files=len(audio),
        seconds=sum(lengths) + SILENCE_SECONDS,
        size=sum(path.stat().st_size for path in audio),
        written=written,
    )


def _is_intact(folder: Path) -> bool:
    """Whether the marker is of this version and every file is as it was written."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["version"] != VERSION:
            return False
        hashes = {name: _hash((folder / name).read_bytes()) for name in marker["files"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return bool(hashes == marker["files"])


def _files(folder: Path) -> list[Path]:
    """The corpus's own files, as its marker lists them."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return [folder / name for name in marker["files"]]


def _write(folder: Path) -> None:
    """Write every file, and the marker last."""
    contents: dict[str, bytes] = {"about.md": ABOUT.encode()}
    with ThreadPoolExecutor() as pool:
        for files in pool.map(_song_files, SONGS):
            contents |= files
    silence = np.zeros((SILENCE_SECONDS * 44_100, 1), np.int16)
    contents[f"{SILENT}.wav"] = _encoded(silence, 44_100, "wav")
    whole = contents["night-drive/keys.flac"]
    contents["oddities/cut-short.flac"] = whole[: len(whole) // 2]
    contents["oddities/empty.wav"] = b""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    marker = {"version": VERSION, "files": {n: _hash(c) for n, c in contents.items()}}
    (folder / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _song_files(song: Song) -> dict[str, bytes]:
    """A song's audio files and sidecars by name: JSON for each, a caption for the keys."""
    played = stems(song.score, song.sample_rate, song.channels)
    tracks = {role: _quantised(audio) for role, audio in played.items()}
    # Added after quantisation, so that integers add up exactly; the peak leaves room.
    tracks[MIX] = np.sum(list(tracks.values()), axis=0, dtype=np.int32).astype(np.int16)
    contents: dict[str, bytes] = {}
    for role, extension in song.files.items():
        name = f"{song.name}/{role}"
        contents[f"{name}.{extension}"] = _encoded(tracks[role], song.sample_rate, extension)
        contents[f"{name}.json"] = json.dumps(_metadata(song, role), indent=1).encode()
    caption = f"{song.title}: an electric piano in {song.score.key}, two chords a bar."
    contents[f"{song.name}/keys.txt"] = caption.encode()
    return contents


def _metadata(song: Song, role: str) -> dict[str, str | float]:
    """What the JSON sidecar of a file says."""
    return {
        "title": song.title,
        "group": song.name,
        "role": role,
        "bpm": song.score.bpm,
        "key": song.score.key,
        "prompt": song.prompt,
    }


def _quantised(audio: FloatArray) -> Samples:
    """Audio `[C, T]` in -1..1 as 16-bit samples `[T, C]`."""
    samples: Samples = np.round(audio.T * 32767).astype(np.int16)
    return samples


def _encoded(samples: Samples, sample_rate: int, extension: str) -> bytes:
    """The bytes of an audio file of that extension."""
    file = io.BytesIO()
    # Floats for the lossy ones: libsndfile 1.2 distorts 16-bit stereo samples on the way to MP3.
    lossless = extension in {"wav", "flac"}
    audio = samples if lossless else samples / np.float32(32768)
    soundfile.write(file, audio, sample_rate, format=extension.upper())
    return file.getvalue()


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
