"""Measures how fast one worker process feeds a model that costs nothing.

    nice -n -10 python benchmarks/feed.py [--rounds 3] [--results FOLDER]

Three parts, all in one run of at most eight minutes on two cores:

- `simulated`: loaders that run at 60 x real time a thread, as if each had a core, with 2 and 16
  threads. `of_possible` is the throughput over threads x 60, for a unit of items of one length, as
  many in each lane.
- `real`: music (the recordings beside the repository, else synthesised) as FLAC, MP3 and WAV,
  stereo, for a mono and a stereo model. `of_loading_alone` is the throughput of batches over that
  of the same number of threads that only load the same files, alternately, as median of the rounds;
  `by_cpu` is the same for audio per CPU second of the process. A single file is compared with as
  many threads that load a copy each, because FLAC and WAV are loaded in pieces, and an MP3 with one
  thread. The long MP3 has half an hour, because encoding it takes longest. Loading alone is what
  any design has to do before a model: open the file and check its header, decode, look for NaN,
  measure RMS and peak, downmix or resample, and write each block as float32, channel after channel,
  to memory that is used again. It does not include the hash of the file, the levels of the frames,
  chunks, batches, queues and the third thread, which takes the batches.
- `stages`: CPU seconds per hour of audio of what comes after loading, in one thread; `hash` is that
  of a 16-bit stereo WAV in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from common import SHARED_AUDIO, median, write_result
from gpu_corpus import recordings, synthesised
from latentmill.audio import open_audio, open_media, prepare
from latentmill.audio.stream import BLOCK
from latentmill.encoding.batches import Packer
from latentmill.encoding.chunks import Chunk, Chunker, Chunking
from latentmill.encoding.lanes import LANES
from latentmill.encoding.loading import EncodeSettings, Event, Facts, Loading, Opened
from latentmill.encoding.loudness import LevelMeter
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.models.base import ModelSpec
from latentmill.models.families import mdct
from latentmill.models.inference.device import worker_environment
from latentmill.models.inference.device_pipeline import PlainTransport
from latentmill.sources.base import Item
from latentmill.sources.folder import FolderSource
from latentmill.sources.reading import UnitReader

RATE = 44100
HOP = 1024
CHUNK_SECONDS = 10.0
BATCH = 32
SPEED = 60.0  # x real time of a simulated loader
LENGTHS = (3.0, 240.0, 1800.0)
SECONDS = 5  # of work for every simulated thread
FORMATS = {"flac": {"subtype": "PCM_16"}, "mp3": {}, "wav": {"subtype": "PCM_16"}}
CORPORA = {"3 s": (3.0, 200), "4 min": (240.0, 6), "2 h": (7200.0, 1)}  # length and files
LONG_MP3 = {"30 min": (1800.0, 1)}
RESAMPLED = 48000  # Hz, of a further model for the long FLAC


def spec_of(channels: int, rate: int = RATE) -> ModelSpec:
    return mdct.build(hop=HOP, sample_rate=rate, channels=channels).spec


@dataclass(frozen=True)
class SimulatedLoading(Loading):
    """Takes as long as a loader at `SPEED`, and uses no CPU."""

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        silence = np.zeros((1, self.chunking.samples), np.float32)
        yield Opened(0)
        left = round((item.seconds or 0.0) * RATE)
        while left > 0:
            samples = min(left, self.chunking.samples)
            time.sleep(samples / RATE / SPEED)
            yield Chunk(0, silence[:, :samples])
            left -= samples
        yield Facts(RATE, 1, "", 0, 0.0, 0.0, b"", {})


@dataclass(frozen=True)
class Spent:
    """Seconds and CPU seconds of this process."""

    seconds: float
    cpu: float


def timed(work: Callable[[], None]) -> Spent:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - began, time.process_time() - cpu)


def feed(items: list[Item], loading: Loading) -> None:
    """Load a unit and stack its batches."""
    packer, memory = Packer(loading.chunking, loading.settings.batch_size), PlainTransport()
    with contextlib.closing(LocalAudio(items, loading, Timings())) as audio:
        for number, _, event in audio:
            if isinstance(event, Chunk):
                for batch in packer.add(number, event):
                    batch.audio(out=memory.stage(batch.shape))
        for batch in packer.flush():
            batch.audio(out=memory.stage(batch.shape))


def load_alone(items: list[Item], spec: ModelSpec, threads: int) -> None:
    """Load files in threads, each file in one, and discard the audio."""

    def load(item: Item) -> None:
        with open_media(item.uri) as media:
            waveform = prepare(
                open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels
            )
            memory = np.empty((spec.channels, BLOCK), np.float32)
            for block in waveform.blocks(contiguous=False):
                memory[:, : block.shape[1]] = block

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(load, items))


def settings(threads: int) -> EncodeSettings:
    return EncodeSettings(batch_size=BATCH, load_threads=threads)


def simulated() -> dict[str, Any]:
    spec = spec_of(1)
    chunking = Chunking.for_model(spec, seconds=CHUNK_SECONDS)
    result: dict[str, Any] = {}
    for threads in (2, 16):
        row = {}
        for seconds in LENGTHS:
            # About as much work for every thread, in the same number of items for each lane.
            count = LANES * max(1, round(SECONDS * threads * SPEED / seconds / LANES))
            if seconds * count > 8 * SECONDS * threads * SPEED:
                continue  # takes minutes
            items = [Item(f"{n}", f"/{n}", 1, "", seconds=seconds) for n in range(count)]
            loading = SimulatedLoading(spec, chunking, settings(threads))
            began = time.perf_counter()
            feed(items, loading)
            taken = time.perf_counter() - began
            row[f"{seconds:g} s"] = round(seconds * count / taken / (threads * SPEED), 3)
        result[f"{threads} threads"] = row
        print("simulated", threads, row, flush=True)
    return result


def music(source: Path | None) -> np.ndarray:
    return synthesised() if source is None else recordings(source)


def write(folder: Path, audio: np.ndarray, suffix: str, seconds: float, files: int) -> list[Item]:
    """Write stereo files of one length, each from another position of the music."""
    folder.mkdir(parents=True)
    for number in range(files):
        with soundfile.SoundFile(
            folder / f"{number:04}.{suffix}", "w", RATE, 2, **FORMATS[suffix]
        ) as file:
            left, start = round(seconds * RATE), number * 7919 * 31 % len(audio)
            while left:
                block = audio[start : start + min(left, 60 * RATE)]
                file.write(block)
                left, start = left - len(block), (start + len(block)) % len(audio)
    return sorted(FolderSource(str(folder), (suffix,)).items(), key=lambda item: item.key)


def real(audio: np.ndarray, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for suffix in FORMATS:
        corpora = CORPORA if suffix != "mp3" else {**CORPORA, **LONG_MP3}
        for name, (seconds, files) in corpora.items():
            if suffix == "mp3" and name == "2 h":
                continue
            items = write(folder / suffix / name, audio, suffix, seconds, files)
            models = [spec_of(1), spec_of(2)]
            if (suffix, name) == ("flac", "2 h"):
                models.append(spec_of(2, RESAMPLED))
            for spec in models:
                label = f"{suffix}, {name}, {'mono' if spec.channels == 1 else 'stereo'}"
                if spec.sample_rate != RATE:
                    label += f", to {spec.sample_rate} Hz"
                result[label] = compared(items, spec, seconds * files, threads, rounds)
                print(label, result[label], flush=True)
    return result


def compared(
    items: list[Item], spec: ModelSpec, seconds: float, threads: int, rounds: int
) -> dict[str, float]:
    """Feeding over loading alone, of files that were just written and so are in the page cache."""
    chunking = Chunking.for_model(spec, seconds=CHUNK_SECONDS)
    loading = Loading(spec, chunking, settings(threads))
    in_pieces = len(items) == 1 and not items[0].uri.endswith(".mp3")
    copies = threads if in_pieces else 1
    alone = min(threads, len(items) * copies)
    pairs = [
        (
            timed(lambda: feed(items, loading)),
            timed(lambda: load_alone(items * copies, spec, alone)),
        )
        for _ in range(rounds)
    ]
    return {
        "x_real_time": round(seconds / median([one.seconds for one, _ in pairs])),
        "of_loading_alone": median([other.seconds / copies / one.seconds for one, other in pairs]),
        "by_cpu": median([other.cpu / copies / one.cpu for one, other in pairs]),
    }


def stages(audio: np.ndarray, rounds: int) -> dict[str, Any]:
    """CPU seconds per hour of audio of each stage after loading."""
    result: dict[str, Any] = {}
    for channels in (1, 2):
        spec = spec_of(channels)
        chunking = Chunking.for_model(spec, seconds=CHUNK_SECONDS)
        signal = np.ascontiguousarray(np.resize(audio, (600 * RATE, 2)).T[:channels])
        # The same few blocks again and again: a block that was just loaded is in the cache, too.
        few = [np.ascontiguousarray(signal[:, n * BLOCK : (n + 1) * BLOCK]) for n in range(4)]
        blocks = few * (signal.shape[1] // BLOCK // 4)
        interleaved = [np.ascontiguousarray(block.T).T for block in few] * (len(blocks) // 4)
        chunks = list(pushed(Chunker(spec, chunking), blocks))

        def chunk() -> None:
            for _ in pushed(Chunker(spec, chunking), interleaved):  # noqa: B023  called at once
                pass

        def measure_levels() -> None:
            meter = LevelMeter(spec)  # noqa: B023
            for block in blocks:  # noqa: B023
                meter.push(block)
            meter.finish(spec.frames(signal.shape[1]))  # noqa: B023

        def batch() -> None:
            packer, memory = Packer(chunking, BATCH), PlainTransport()  # noqa: B023
            for one in chunks:  # noqa: B023
                for full in packer.add(0, one):
                    full.audio(out=memory.stage(full.shape))

        result["mono" if channels == 1 else "stereo"] = {
            name: round(6 * median([cpu_seconds(stage) for _ in range(rounds)]), 4)
            for name, stage in (("chunks", chunk), ("levels", measure_levels), ("batches", batch))
        }
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        soundfile.write(file.name, np.resize(audio, (600 * RATE, 2)), RATE, "PCM_16")

        def hash_file() -> None:
            with open_media(file.name) as media:
                assert media.content_hash

        result["hash"] = round(6 * median([cpu_seconds(hash_file) for _ in range(rounds)]), 4)
    return result


def pushed(chunker: Chunker, blocks: list[np.ndarray]) -> Iterator[Chunk]:
    for block in blocks:
        yield from chunker.push(block)
    yield from chunker.finish()


def cpu_seconds(stage: Callable[[], None]) -> float:
    began = time.thread_time()
    stage()
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    if missing := worker_environment():  # memory is allocated as in a worker
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
    parser.add_argument("--audio", type=Path, default=SHARED_AUDIO / "flac")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    began, load = time.perf_counter(), os.getloadavg()
    source = arguments.audio if arguments.audio.is_dir() else None
    audio = music(source)
    result: dict[str, Any] = {
        "script": "benchmarks/feed.py",
        "audio": "synthesised" if source is None else "recordings",
        "threads": arguments.threads,
        "cpu_seconds_per_audio_hour": stages(audio, arguments.rounds),
    }
    print(result, flush=True)
    result["simulated_of_possible"] = simulated()
    with tempfile.TemporaryDirectory() as folder:
        result["real"] = real(audio, Path(folder), arguments.threads, arguments.rounds)
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    result["load"] = {"before": load, "after": os.getloadavg(), "nice": os.nice(0)}
    write_result("feed", result, *([arguments.results] if arguments.results else []))


if __name__ == "__main__":
    main()
