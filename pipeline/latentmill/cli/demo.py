"""`latentmill demo`: encode a corpus, mix latents, decode the mix and compare it with the audio."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from latentmill.cli import show
from latentmill.config import load_config
from latentmill.demo.corpus import write_corpus
from latentmill.engine.progress import for_stream
from latentmill.ops import mix
from latentmill.run.run import run
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import read_source

MAX_MIX_SECONDS = 30.0


def run_demo(folder: Path, source: str | None, print_line: Callable[[str], None]) -> None:
    """Encode `source`, or a synthetic corpus, and mix two or more of its records.

    Everything is written to `folder`; each line of output is passed to `print_line`.
    """
    store_folder = folder / "latents"
    if source is None:
        corpus = write_corpus(folder / "corpus")
        print_line(
            f"corpus: {corpus.audio_files} files, {corpus.seconds:.0f} s of audio in "
            f"{corpus.folder} ({len(corpus.broken)} deliberately broken)"
        )
        source, keys = str(corpus.folder), list(corpus.songs[0].stem_keys)
    else:
        source, keys = str(Path(source).expanduser()), []
        digest = hashlib.sha256(str(Path(source).resolve()).encode()).hexdigest()[:8]
        store_folder = folder / f"latents-{digest}"
    summary = run(load_config(None, {"source": source, "out": str(store_folder)}), for_stream())
    print_line(show.summary(summary))
    store = open_store(str(store_folder))
    keys = keys or [key for key, _ in zip(store.keys(), range(2), strict=False)]
    if len(keys) < 2:
        print_line(
            "nothing to mix: fewer than two records were encoded; try a folder with more audio"
        )
        return
    print_line(_mix(store, keys, folder / "mix.wav"))
    # After `make demo` the command is in .venv/bin, which is often not in PATH.
    program = "latentmill" if shutil.which("latentmill") else sys.argv[0]
    print_line(
        f"next: {program} info {store_folder}; {program} verify {store_folder} --decode 3; "
        f"{program} report {store_folder}"
    )


def _mix(store: LatentStore, keys: Sequence[str], path: Path) -> str:
    """Mix records up to the end of the shortest one, and write the decoded mix."""
    records = [store[key] for key in keys]
    spec = store.model().spec
    longest = spec.frames(round(MAX_MIX_SECONDS * spec.sample_rate))
    frames = min(longest, *(record.frames for record in records))
    samples = min(spec.samples(frames), *(record.num_samples for record in records))
    latent = mix([record.latent[:, :frames] for record in records], origin=store.origin)
    decoded = store.decode_latent(latent, samples)  # [C, T]
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, decoded.T, spec.sample_rate, subtype="FLOAT")
    waveform = np.zeros((spec.channels, samples), np.float32)
    for record in records:
        waveform += read_source(record, spec.channels)[:, :samples]
    noise = np.square(waveform - decoded, dtype=np.float64).sum()
    signal = np.square(waveform, dtype=np.float64).sum()
    snr = 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else float("inf")
    return (
        f"mix of {' + '.join(keys)} in latent space, decoded to {path}: {snr:.1f} dB SNR against "
        f"the mix of the waveforms ({samples / spec.sample_rate:.1f} s)"
    )
