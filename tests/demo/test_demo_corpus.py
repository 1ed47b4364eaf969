"""The demo's corpus: what lies in it, that it adds up, and that it stays the same."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from latentmill.audio.formats import AUDIO_EXTENSIONS
from latentmill.demo.corpus import (
    MARKER,
    MIX,
    SONGS,
    VERSION,
    CorpusSummary,
    Song,
    _is_intact,
    write_corpus,
)
from latentmill.sources.folder import FolderSource
from latentmill.sources.metadata import read_metadata

LOSSLESS = {"wav", "flac"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def read(corpus: CorpusSummary, song: Song, role: str, dtype: str = "float32") -> np.ndarray:
    audio, sample_rate = soundfile.read(
        corpus.folder / f"{song.name}/{role}.{song.files[role]}", dtype=dtype, always_2d=True
    )
    assert sample_rate == song.sample_rate
    return audio


def dbfs(audio: np.ndarray) -> float:
    return 20 * float(np.log10(np.sqrt(np.mean(audio.astype(np.float64) ** 2))))


def test_the_folder_source_finds_exactly_the_items_that_the_summary_names(corpus):
    source = FolderSource(str(corpus.folder), AUDIO_EXTENSIONS)
    items = list(source.items())
    named = [*corpus.broken, corpus.silent]
    for song in corpus.songs:
        named += [*song.stem_keys, *([song.mix_key] if song.mix_key else [])]
    assert sorted(item.key for item in items) == sorted(named)
    assert source.ignored == {".json": 1, ".md": 1}
    assert corpus.audio_files == len(named)
    assert corpus.size == sum(item.size for item in items) < 15e6


def test_formats_rates_and_channels_are_those_of_a_mixed_corpus():
    assert {e for song in SONGS for e in song.files.values()} == {"wav", "flac", "ogg", "mp3"}
    assert {song.sample_rate for song in SONGS} == {44_100, 48_000, 22_050}
    assert {song.channels for song in SONGS} == {1, 2}
    assert set(SONGS[0].files.values()) <= LOSSLESS
    assert SONGS[0].mix_key is not None


@pytest.mark.parametrize("song", SONGS, ids=lambda song: song.name)
def test_stems_share_one_time_line_and_have_the_levels_of_music(corpus, song):
    stems = [read(corpus, song, role) for role in song.files if role != MIX]
    length = round(song.score.seconds() * song.sample_rate)
    assert {stem.shape for stem in stems} == {(length, song.channels)}
    assert 10 <= song.score.seconds() <= 14
    for stem in stems:
        assert -20 < dbfs(stem) < -10
    assert 0.5 < np.abs(sum(stems)).max() < 1


def test_lossless_stems_add_up_to_the_mix_sample_by_sample(corpus):
    song = corpus.songs[0]
    stems = [read(corpus, song, role, "int16") for role in song.files if role != MIX]
    mix = read(corpus, song, MIX, "int16")
    np.testing.assert_array_equal(np.sum(stems, axis=0, dtype=np.int32), mix)


@pytest.mark.parametrize("song", SONGS, ids=lambda song: song.name)
def test_each_stem_holds_its_own_part_of_the_spectrum(corpus, song):
    def centroid(role: str) -> float:
        power = np.abs(np.fft.rfft(read(corpus, song, role).mean(axis=1))) ** 2
        frequencies = np.fft.rfftfreq(len(read(corpus, song, role)), 1 / song.sample_rate)
        return float((power * frequencies).sum() / power.sum())

    assert centroid("bass") < 250 < centroid("keys") < centroid("lead") < 2000


def test_stereo_files_are_stereo(corpus):
    keys = read(corpus, corpus.songs[0], "keys")
    assert np.abs(keys[:, 0] - keys[:, 1]).max() > 0.05


def test_every_stem_has_metadata_and_the_keys_have_a_caption(corpus):
    items = {i.key: i for i in FolderSource(str(corpus.folder), AUDIO_EXTENSIONS).items()}
    for song in corpus.songs:
        for key in song.stem_keys:
            metadata = read_metadata(items[key])
            group, role = key.split("/")
            assert (metadata["group"], metadata["role"]) == (group, role)
            assert {"title", "bpm", "key", "prompt"} <= set(metadata)
            assert ("text" in metadata) == (role == "keys")


def test_broken_files_cannot_be_read_and_the_silent_one_is_silent(corpus):
    cut = corpus.folder / "oddities/cut-short.flac"
    assert soundfile.info(cut).frames > 0  # a real header: only reading to the end fails
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(cut)
    assert (corpus.folder / "oddities/empty.wav").read_bytes() == b""
    silence, _ = soundfile.read(corpus.folder / f"{corpus.silent}.wav")
    assert len(silence) > 0
    assert not silence.any()


def test_the_playing_time_is_that_of_the_files_that_can_be_read(corpus):
    paths = [p for p in corpus.folder.rglob("*") if p.suffix[1:] in {"wav", "flac", "ogg", "mp3"}]
    good = [p for p in paths if p.stem not in {"cut-short", "empty"}]
    assert corpus.seconds == pytest.approx(sum(soundfile.info(p).duration for p in good), abs=0.01)


def test_a_second_corpus_holds_the_same_samples(corpus, tmp_path):
    again = write_corpus(tmp_path)
    for song in again.songs:
        for role in song.files:
            np.testing.assert_array_equal(read(corpus, song, role), read(again, song, role))


def test_an_intact_corpus_is_left_alone(corpus):
    drums = corpus.folder / "night-drive/drums.wav"
    before = drums.stat().st_mtime_ns
    assert corpus.written
    assert write_corpus(corpus.folder) == replace(corpus, written=False)
    assert drums.stat().st_mtime_ns == before


def test_a_damaged_corpus_is_written_anew_beside_other_files(corpus, tmp_path):
    shutil.copytree(corpus.folder, tmp_path, dirs_exist_ok=True)
    drums, mine = tmp_path / "night-drive/drums.wav", tmp_path / "night-drive/mine.txt"
    whole = drums.read_bytes()
    drums.write_bytes(whole[:1000])
    mine.write_text("not the corpus's")
    assert write_corpus(tmp_path).written
    assert drums.read_bytes() == whole
    assert mine.read_text() == "not the corpus's"


@pytest.mark.parametrize(
    ("marker", "intact"),
    [
        ("", False),
        ("[]", False),
        ("{}", False),
        ('{"version": 0, "files": {}}', False),
        (f'{{"version": {VERSION}, "files": ["a"]}}', False),
        (f'{{"version": {VERSION}, "files": {{}}}}', True),
    ],
)
def test_only_a_sound_marker_of_this_version_counts(tmp_path, marker, intact):
    assert not _is_intact(tmp_path)
    (tmp_path / MARKER).write_text(marker)
    assert _is_intact(tmp_path) == intact
