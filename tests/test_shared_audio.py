"""The main job on real recordings: every file accounted for, and back to audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import latentmill as lm
from latentmill.store.verify import read_source, verify
from support.linear_cae_weights import use_cache, write_cache

SHARED_AUDIO = Path(__file__).parents[2] / "shared" / "audio"
SNR_DB = {"float32": 60.0, "float16": 50.0}

pytestmark = pytest.mark.skipif(
    not SHARED_AUDIO.is_dir(), reason=f"needs the real recordings in {SHARED_AUDIO}"
)


def snr_db(signal: np.ndarray, other: np.ndarray) -> float:
    noise = np.square(signal - other, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(signal, dtype=np.float64).sum() / noise))


def audio_files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.suffix in {".flac", ".ogg", ".m4a"})
    return {path.relative_to(folder).with_suffix("").as_posix() for path in files}


@pytest.mark.slow  # minutes of audio, four times
@pytest.mark.parametrize("store_format", ["parquet", "webdataset"])
@pytest.mark.parametrize("model", ["mdct", "lin-cae"])
def test_every_file_is_accounted_for_and_decodes(
    model: str,
    store_format: str,
    tmp_path: Path,
    inline: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cache(tmp_path / "hf_home")
    use_cache(monkeypatch, tmp_path / "hf_home")
    out = tmp_path / "out"
    summary = lm.encode(str(SHARED_AUDIO), str(out), model=model, format=store_format)
    assert summary.exit_code == 0
    store = lm.open(str(out))
    assert set(store.keys()) == audio_files(SHARED_AUDIO)
    report = verify(store, decode=5)
    assert report.faults == []
    assert len(report.decoded) == 5
    assert store["ogg/Kevin_MacLeod_-_Vibe_Ace"].metadata["text"].startswith("Vibe Ace")


@pytest.mark.parametrize(
    ("dtype", "store_format"),
    [
        ("float32", "parquet"),
        ("float16", "webdataset"),
        pytest.param("float32", "webdataset", marks=pytest.mark.slow),
        pytest.param("float16", "parquet", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("inline")
def test_mdct_gives_the_recordings_back(dtype: str, store_format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = SHARED_AUDIO / "ogg"
    lm.encode(str(source), str(out), dtype=dtype, format=store_format)
    store = lm.open(str(out))
    assert set(store.keys()) == audio_files(source)
    for record in store:
        assert snr_db(read_source(record, 1), store.decode(record.key)) > SNR_DB[dtype], record.key


@pytest.mark.parametrize(
    ("dtype", "store_format"),
    [("float32", "webdataset"), ("float16", "parquet")],
)
@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_stems_added_as_latents_are_the_stems_added(
    dtype: str, store_format: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stems = tmp_path / "stems"
    stems.mkdir()
    for path in sorted((SHARED_AUDIO / "stems" / "potassium").iterdir())[:3]:
        (stems / path.name).symlink_to(path)
    assert lm.encode(str(stems), str(out), dtype=dtype, format=store_format).info.encoded == 3
    store = lm.open(str(out))
    records = list(store)
    mixed = lm.mix([record.latent for record in records], origin=store.origin)
    decoded = store.decode_latent(mixed, records[0].num_samples)
    waveform = sum(read_source(record, 1) for record in records)
    assert snr_db(waveform, decoded) > SNR_DB[dtype]
