"""The demo corpus: three songs as stems, and files with the problems of a real corpus.

One song is lossless and has its mix: its stems add up to the mix sample by sample, so that a mix of
latents can be compared with the mix of the waveforms. The other songs are in OGG, MP3 and mixed
formats. The other files are silence, a truncated FLAC file and an empty file.
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

# Changes when the corpus changes, so that a corpus of an older version is written again.
VERSION = 1
MARKER = ".corpus.json"
MIX = "mix"
SILENCE_SECONDS = 5

Samples = NDArray[np.int16]


@dataclass(frozen=True)
class Song:
    """A song of the corpus; a stem's key in a store is `name/role`.

    Attributes:
        name: Folder of the song in the corpus.
        title: Title of the song.
        prompt: Text prompt for a generative model.
        score: Notes of the song.
        sample_rate: Sample rate of all files, Hz.
        channels: Audio channels of all files.
        files: Extension of each file, by role. The role `mix` is the sum of the others.
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
        """Keys of the stems, without the mix."""
        return tuple(f"{self.name}/{role}" for role in self.files if role != MIX)

    @property
    def mix_key(self) -> str | None:
        """Key of the mix, if the song has one."""
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

# Keys of the files that cannot be loaded completely.
BROKEN = ("oddities/cut-short", "oddities/empty")
SILENT = "oddities/silence"

ABOUT = """# The demo corpus

Synthesised by latentmill: three songs as stems, and in `oddities` silence and damaged files.
`night-drive` is lossless, and its stems add up to its mix, sample by sample.
"""


@dataclass(frozen=True)
class CorpusSummary:
    """Contents of the corpus.

    Attributes:
        folder: Folder of the corpus.
        songs: The songs; the first one is lossless and has a mix.
        broken: Keys of the items that must fail.
        silent: Key of the item that is silence.
        audio_files: Number of audio files, including the broken ones.
        seconds: Total length of the files that can be loaded.
        size: Size of the audio files in bytes.
        written: Whether this call wrote the corpus; False if it existed.
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
    """Write the demo corpus into a folder, unless it is already there and complete.

    The audio is deterministic. Other files in the folder are not changed.
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
    """Whether the marker has this version and no file has changed."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["version"] != VERSION:
            return False
        hashes = {name: _hash((folder / name).read_bytes()) for name in marker["files"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return bool(hashes == marker["files"])


def _files(folder: Path) -> list[Path]:
    """The files of the corpus, as listed in its marker."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return [folder / name for name in marker["files"]]


def _write(folder: Path) -> None:
    """Write all files, the marker last."""
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
    """A song's audio files, JSON sidecars and the caption of the keys, by name."""
    tracks = {
        role: np.round(audio.T * 32767).astype(np.int16)  # [C, T] in -1..1 to [T, C]
        for role, audio in stems(song.score, song.sample_rate, song.channels).items()
    }
    # Added after quantisation, so that the integers add up exactly. `MIX_PEAK` prevents overflow.
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
    """The content of a file's JSON sidecar."""
    return {
        "title": song.title,
        "group": song.name,
        "role": role,
        "bpm": song.score.bpm,
        "key": song.score.key,
        "prompt": song.prompt,
    }


def _encoded(samples: Samples, sample_rate: int, extension: str) -> bytes:
    """Encode samples as an audio file of a format; return its bytes."""
    file = io.BytesIO()
    # Floats for lossy formats: libsndfile 1.2 distorts 16-bit stereo samples in MP3.
    lossless = extension in {"wav", "flac"}
    audio = samples if lossless else samples / np.float32(32768)
    soundfile.write(file, audio, sample_rate, format=extension.upper())
    return file.getvalue()


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
