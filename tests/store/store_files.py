"""A small corpus of real files, and stores of it, written without Ray."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from latentmill.config import RunConfig, fingerprint_document
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.fingerprint import fingerprint
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.models import registry
from latentmill.plan import Plan, UnitLimits, draft, freeze, read_items
from latentmill.record import Record
from latentmill.sources.filters import Filters
from latentmill.sources.open import open_source
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.seal import seal, write_origin
from latentmill.store.store import LatentStore

FORMATS = list(SHARD_FORMATS)
RATE = 22050
HOP = 64
MODEL_OPTIONS = {"hop": HOP, "sample_rate": RATE}
SECONDS = {
    "album one/été.wav": 0.7,
    "album one/v1.5 (live).flac": 1.3,
    "drums.wav": 2.5,
    f"{'long' * 40}/{'name' * 30}.wav": 0.3,
    "one-frame.wav": 0.002,
    **{f"many/{number:02d}.wav": 0.2 for number in range(20)},
}
METADATA = {"title": "Été à 東京 🎵", "bpm": 127.5, "tags": ["a", None, {"deep": True}]}
KEYS = sorted(name.rpartition(".")[0] for name in SECONDS)


def write_corpus(folder: Path) -> Path:
    """Files that are encoded (SECONDS), one that is skipped, one that fails, one that is none."""
    rng = np.random.default_rng(3)
    for name, seconds in SECONDS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(round(seconds * RATE)) / RATE
        tone = 0.4 * np.sin(2 * np.pi * rng.uniform(100, 2000) * time)
        noise = 0.05 * rng.standard_normal(len(time))
        soundfile.write(path, (tone + noise).astype(np.float32), RATE, subtype="PCM_16")
    (folder / "album one/été.json").write_text(json.dumps(METADATA), encoding="utf-8")
    (folder / "album one/été.txt").write_text("a caption — with a dash\n", encoding="utf-8")
    soundfile.write(folder / "too-short.wav", np.zeros(10, np.float32), RATE)
    (folder / "broken.wav").write_text("this is no audio")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8")
    return folder


def write_store(url: str, source: Path, *, sealed: bool = True, **options: Any) -> LatentStore:
    """Encode a corpus into several units, commit them, seal the store."""
    options = {"model_options": MODEL_OPTIONS, "min_seconds": 0.001, "unit_seconds": 0.5, **options}
    config = RunConfig(source=str(source), out=url, **options)
    handle = registry.resolve(config.model, config.model_options)
    chunking = Chunking.for_model(handle.spec, stitch=config.stitch, seconds=config.chunk_seconds)
    document = fingerprint_document(config, handle.spec, chunking)
    opened = open_source(config)
    storage = Storage(url)
    with draft(opened.items(), UnitLimits(config.unit_seconds)) as drafted:
        plan = Plan(
            source=opened.uri,
            fingerprint=document,
            model=config.model,
            model_options=config.model_options,
            format=config.format,
            ignored=dict(opened.ignored),
        )
        plan = freeze(plan, drafted, storage)
    model = handle.load("cpu")
    silence = torch.zeros(1, handle.spec.channels, chunking.samples)
    write_origin(storage, model.encode(silence)[0].numpy())
    settings = EncodeSettings(dtype=config.dtype, filters=Filters(min_seconds=config.min_seconds))
    for unit in plan.units:
        audio = LocalAudio(
            read_items(storage, unit), Loading(handle.spec, chunking, settings), Timings()
        )
        with contextlib.closing(audio):
            commit = write_unit(
                storage,
                unit.name,
                UnitEncoder(model, chunking, settings).encode(audio),
                format_name=config.format,
                fingerprint=fingerprint(document),
                info={"model": document["model"], "dtype": config.dtype},
            )
        write_commit(storage, commit, {"total_seconds": 1.23456})
    if sealed:
        seal(storage, plan)
    return LatentStore(url, device="cpu")


def index_file(folder: Path) -> Path:
    """The index of a sealed store."""
    (path,) = folder.glob("index.*")
    return path


def model_latent(source: Path, name: str) -> np.ndarray:
    """What the model makes of a whole file, float32 `[D, Z]`, without any of latentmill's rooms."""
    samples, rate = soundfile.read(source / name, dtype="float32", always_2d=True)
    assert rate == RATE
    padded = np.pad(samples.T, ((0, 0), (0, -len(samples) % HOP)))
    model = registry.resolve("mdct", MODEL_OPTIONS).load("cpu")
    return model.encode(torch.from_numpy(padded)[None])[0].numpy()


def make_record(key: str, latent: np.ndarray, metadata: dict[str, Any] | None = None) -> Record:
    return Record(
        key=key,
        latent=latent,
        num_samples=1000,
        sample_rate=RATE,
        source_uri=f"/music/{key}.wav",
        source_sample_rate=48000,
        source_channels=2,
        content_hash="xxh3:0123",
        rms=0.1234567890123,
        peak=0.5,
        group="song",
        metadata=metadata or {},
    )


class Latents(torch.utils.data.Dataset):
    """The records of a store, for a DataLoader."""

    def __init__(self, store: LatentStore) -> None:
        self.store = store
        self.keys = list(store.keys())

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> tuple[str, np.ndarray]:
        record = self.store[self.keys[position]]
        return record.key, np.array(record.latent)
