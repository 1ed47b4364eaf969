"""Stems: what belongs together, and mixes in latent space against mixes of the waveforms."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from latentmill.errors import ConfigError
from latentmill.reader.stem_dataset import StemDataset
from latentmill.reader.stems import (
    AllStems,
    By,
    ContextAndTarget,
    MixtureTriplet,
    Stems,
    StemTask,
    stem_groups,
)
from latentmill.record import decibels
from latentmill.store.store import LatentStore
from support.latent_store import write_latents
from support.stem_files import (
    HOP,
    RATE,
    SONGS,
    waveform,
    write_segments,
    write_stem_store,
    write_stems,
)

CROP = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stems(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def store(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> LatentStore:
    return write_stem_store(tmp_path_factory.mktemp("store"), source, format=request.param)


class Kept:
    """A task that gives the stems themselves."""

    def __call__(self, stems: Stems, random: np.random.Generator) -> Stems:
        return stems


def encoded(store: LatentStore, audio: np.ndarray) -> np.ndarray:
    """The latent of a whole waveform `[1, T]`, by the model itself."""
    padded = np.pad(audio, ((0, 0), (0, -audio.shape[1] % HOP)))
    return store.model().encode(torch.from_numpy(padded)[None])[0].numpy()


def crop_of(store: LatentStore, audio: np.ndarray, seconds: float) -> np.ndarray:
    start = round(seconds * RATE / HOP)
    return encoded(store, audio)[:, start : start + CROP]


def test_groups_by_fields_and_by_folder(store: LatentStore, source: Path) -> None:
    groups = stem_groups(store)
    assert [group.name for group in groups] == ["north", "solo", "south"]
    north = groups[0]
    assert set(north.roles) == {"drums", "bass", "keys"}  # the mix is no stem
    keys = list(store.keys())
    assert [keys[row] for row in north.rows] == [f"north/{role}" for role in north.roles]
    assert stem_groups(store, "folder") == groups
    assert set(stem_groups(store, without=())[0].roles) == set(SONGS["north"])


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
@pytest.mark.parametrize("by", ["fields", "folder"])
def test_segments_that_begin_together_are_a_group(tmp_path: Path, format_name: str, by: By) -> None:
    source = write_stems(tmp_path / "songs")
    manifest = write_segments(source / "segments.jsonl", source, 0.5)
    store = write_stem_store(tmp_path / "store", manifest, format=format_name)
    seconds = {"north": [0, 0.5, 1, 1.5], "solo": [0, 0.5], "south": [0, 0.5, 1]}
    groups = stem_groups(store, by)
    assert [g.name for g in groups] == [
        f"{s}#{start}" for s, all_of in seconds.items() for start in all_of
    ]
    dataset = StemDataset(store, Kept(), crop=25, by=by)
    sums = StemDataset(store, AllStems(("bass", "drums", "keys")), crop=25, by=by)
    for number, group in enumerate(groups):
        song, _, start = group.name.partition("#")
        stems = dataset[(0, number, number)]
        wanted = {role for role, end in SONGS[song].items() if end > float(start)} - {"mix"}
        assert sorted(stems.roles) == sorted(wanted)
        end = round((float(start) + 0.5) * RATE)
        whole = {role: waveform(source, f"{song}/{role}", end) for role in wanted}
        parts = {role: audio[:, round(float(start) * RATE) :] for role, audio in whole.items()}
        first = round(stems.metadata["seconds_start"] * RATE / HOP)
        for role, latent in zip(stems.roles, stems.latents, strict=True):
            assert np.allclose(
                latent, encoded(store, parts[role])[:, first : first + 25], atol=5e-5
            )
        mixture = encoded(store, sum(parts.values()))[:, first : first + 25]
        assert np.allclose(sums[(0, number, number)].mixture, mixture, atol=5e-5)


def test_segments_that_begin_at_one_time_have_the_name_of_the_song(tmp_path: Path) -> None:
    source = write_stems(tmp_path / "songs")
    manifest = write_segments(source / "segments.jsonl", source, 5.0)
    groups = stem_groups(write_stem_store(tmp_path / "store", manifest))
    assert [group.name for group in groups] == ["north", "solo", "south"]


def test_the_levels_are_those_of_the_audio(store: LatentStore, source: Path) -> None:
    for key in ("north/bass", "north/keys", "solo/drums"):
        record = store[key]
        assert record.levels is not None
        assert store.levels(key) == record.levels
        stored = decibels(record.levels)
        assert len(stored) == record.frames
        audio = np.pad(waveform(source, key, record.num_samples)[0], (HOP, 2 * HOP))
        for frame, level in enumerate(stored):  # an mdct frame sees two hops
            seen = audio[frame * HOP : (frame + 2) * HOP]
            power = float(np.mean(np.square(seen, dtype=np.float64)))
            if frame < len(stored) - 1:
                expected = 10 * np.log10(power) if power > 0 else -np.inf
                assert level == pytest.approx(expected, abs=0.26)


def test_crops_of_a_song_are_synchronised(store: LatentStore, source: Path) -> None:
    dataset = StemDataset(store, Kept(), crop=CROP, seed=3, per_song=8)
    assert len(dataset) == 24
    for stems in dataset.__getitems__(range(24)):
        for key, latent, mask in zip(stems.keys, stems.latents, stems.mask, strict=True):
            longest = max(SONGS[stems.key].values())
            audio = waveform(source, key, round(longest * RATE))
            audio = np.pad(audio, ((0, 0), (0, CROP * HOP)))  # silence after the song
            assert np.allclose(
                latent, crop_of(store, audio, stems.metadata["seconds_start"]), atol=2e-5
            )
            start = round(stems.metadata["seconds_start"] * RATE / HOP)
            assert mask.sum() == np.clip(store.entry(key).frames - start, 0, CROP)


def test_activity_is_where_a_stem_is_heard(store: LatentStore) -> None:
    dataset = StemDataset(store, Kept(), crop=CROP, seed=1, per_song=16)
    seen = set()
    for number in range(0, len(dataset), 3):  # north
        stems = dataset[number]
        start = round(stems.metadata["seconds_start"] * RATE / HOP)
        bass = stems.active[stems.roles.index("bass")]
        frames = np.arange(start, start + CROP)
        assert np.array_equal(bass, (frames >= RATE // HOP) & (frames < 2 * RATE // HOP + 1))
        seen.update(bass.tolist())
    assert seen == {True, False}
    masks = StemDataset(store, Kept(), crop=CROP, active_db=None)[0]
    assert np.array_equal(masks.active, masks.mask)


@pytest.mark.parametrize("gains", [None, (-12.0, 6.0)])
def test_context_and_target_are_mixes_of_the_waveforms(
    store: LatentStore, source: Path, gains: tuple[float, float] | None
) -> None:
    dataset = StemDataset(store, ContextAndTarget(), crop=CROP, seed=7, gains=gains, per_song=20)
    dataset.set_epoch(0)
    contexts = set()
    for number in range(0, len(dataset), 3):
        sample, stems = dataset[number], dataset.stems(number)
        target = stems.roles.index(sample.role)
        assert np.array_equal(sample.target, stems.latents[target])
        parts = _parts(sample.context, stems.latents, target)
        assert 1 <= len(parts) <= 2
        contexts.add((target, parts))
        if gains is None:
            audio = sum(waveform(source, stems.keys[part], 2 * RATE) for part in parts)
            assert np.allclose(
                sample.context, crop_of(store, audio, sample.metadata["seconds_start"]), atol=5e-5
            )
    assert len(contexts) > 4  # of 9
    alone = StemDataset(store, ContextAndTarget(), crop=CROP, per_song=2)[1]
    assert alone.key == "solo"
    assert not alone.context.any()  # the mdct of silence


def _parts(latent: np.ndarray, stems: np.ndarray, without: int) -> tuple[int, ...]:
    """The most stems that add up to a latent (a silent one changes nothing)."""
    rest = [n for n in range(len(stems)) if n != without]
    sums = [chosen for size in (2, 1) for chosen in itertools.combinations(rest, size)]
    return next(c for c in sums if np.allclose(stems[list(c)].sum(axis=0), latent, atol=1e-5))


@pytest.mark.parametrize("whole", [True, False])
def test_a_triplet_adds_up(store: LatentStore, source: Path, whole: bool) -> None:
    dataset = StemDataset(store, MixtureTriplet(whole=whole), crop=CROP, seed=2, per_song=10)
    for number in range(len(dataset)):
        sample = dataset[number]
        assert np.allclose(sample.mixture, sample.submix + sample.source, atol=1e-5)
        if whole and sample.key != "solo":
            longest = round(max(SONGS[sample.key].values()) * RATE)
            audio = np.zeros((1, longest + CROP * HOP), np.float32)
            for role in SONGS[sample.key].keys() - {"mix"}:
                part = waveform(source, f"{sample.key}/{role}", longest)
                audio[:, :longest] += part
            assert np.allclose(
                sample.mixture, crop_of(store, audio, sample.metadata["seconds_start"]), atol=5e-5
            )


def test_all_stems_side_by_side_make_batches(store: LatentStore) -> None:
    roles = ("bass", "drums", "keys")
    dataset = StemDataset(store, AllStems(roles), crop=CROP, seed=4, per_song=4)
    dataset.set_epoch(0)
    batches = list(DataLoader(dataset, batch_size=6, num_workers=2))
    assert len(batches) == 2
    for batch in batches:
        assert batch["stems"].shape == (6, 3, HOP, CROP)
        assert batch["active"].shape == batch["mask"].shape == (6, 3, CROP)
        assert torch.allclose(batch["mixture"], batch["stems"].sum(dim=1), atol=1e-5)
        solo = [n for n, group in enumerate(batch["key"]) if group == "solo"]
        assert solo
        assert not batch["stems"][solo][:, 0].any()  # it has no bass
    here = dataset.__getitems__(range(12))
    stacked = torch.from_numpy(np.stack([sample.stems for sample in here]))
    assert torch.equal(torch.cat([batch["stems"] for batch in batches]), stacked)


def test_a_remix_takes_each_role_from_any_song(store: LatentStore) -> None:
    dataset = StemDataset(store, Kept(), crop=CROP, seed=9, remix=1.0, per_song=30)
    songs = set()
    for number in range(0, len(dataset), 3):
        stems = dataset[number]
        assert stems.key == "north"
        for key, role, latent, mask in zip(
            stems.keys, stems.roles, stems.latents, stems.mask, strict=True
        ):
            song, _, own = key.partition("/")
            assert own == role
            have = int(mask.sum())
            assert have == min(CROP, store.entry(key).frames)
            whole = store[key].latent
            assert any(
                np.array_equal(whole[:, at : at + have], latent[:, :have])
                for at in range(whole.shape[1] - have + 1)
            )
            songs.add(song)
    assert songs == {"north", "south", "solo"}
    assert {s.partition("/")[0] for s in StemDataset(store, Kept(), crop=CROP)[0].keys} == {"north"}


@pytest.mark.parametrize("remix", [0.0, 1.0])
def test_silence_is_that_of_its_place_in_the_song(tmp_path: Path, remix: float) -> None:
    """Also of stems that end before the song does; the origin of mdct, zeros, would not tell."""
    origin = write_latents(str(tmp_path / "origin"), [20]).origin
    lengths = [50, 20, 33, 50]
    silence = [origin.of_length(n).astype(np.float16) for n in lengths]
    store = write_latents(str(tmp_path / "silent"), lengths, latents=silence)
    dataset = StemDataset(store, Kept(), crop=12, active_db=None, per_song=30, remix=remix)
    for stems in dataset.__getitems__(range(30)):
        expected = stems.origin.like(stems.latents[0])
        assert all(np.array_equal(latent, expected) for latent in stems.latents)
        assert np.array_equal(stems.mix([0, 1, 2]), expected)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), number=st.integers(0, 11))
def test_a_sample_is_a_function_of_seed_epoch_and_number(
    store: LatentStore, seed: int, epoch: int, number: int
) -> None:
    def made() -> StemDataset:
        return StemDataset(
            store, ContextAndTarget(), crop=CROP, seed=seed, gains=(-6, 6), remix=0.5, per_song=4
        )

    first = made()
    first.set_epoch(epoch)
    sample = first[number]
    again = pickle.loads(pickle.dumps(made()))
    batch = again.__getitems__([(epoch, n, n) for n in (3, number, 5)])
    for ours, theirs in zip(sample, batch[1], strict=True):
        assert np.array_equal(ours, theirs)
    other = made()
    other.set_epoch(epoch + 1)
    assert not np.array_equal(other[number].target, sample.target)


def test_the_digest_is_computed_once(store: LatentStore) -> None:
    """A state is saved after every batch."""
    dataset = StemDataset(store, Kept(), crop=CROP)
    assert dataset.digest is dataset.digest
    assert pickle.loads(pickle.dumps(dataset)).digest == dataset.digest
    assert StemDataset(store, Kept(), crop=CROP, per_song=2).digest != dataset.digest


def test_gains_stay_in_their_range(store: LatentStore) -> None:
    plain = StemDataset(store, Kept(), crop=CROP, seed=6, per_song=10)
    louder = StemDataset(store, Kept(), crop=CROP, seed=6, per_song=10, gains=(-3.0, 9.0))
    ratios = []
    for number in range(len(plain)):
        before, after = plain[number].latents, louder[number].latents
        for one, other in zip(before, after, strict=True):
            if np.any(one):
                ratio = np.linalg.norm(other) / np.linalg.norm(one)
                assert np.allclose(other, ratio * one, atol=1e-5)
                ratios.append(20 * np.log10(ratio))
    assert -3.01 < min(ratios) < 0 < 6 < max(ratios) < 9.01


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"crop": 0}, "at least 1"),
        ({"remix": 2.0}, "probability from 0 to 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"gains": (3.0, -3.0)}, "from low to high"),
        ({"by": "name"}, "use 'fields' or 'folder'"),
    ],
)
def test_options_that_make_no_sense(
    store: LatentStore,
    wrong: dict[str, object],
    says: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    with pytest.raises(ConfigError) as caught:
        StemDataset(store, Kept(), **{"crop": CROP, **wrong})
    assert says in one_sentence(caught.value)


def test_what_is_not_there_is_said(store: LatentStore) -> None:
    with pytest.raises(IndexError):
        StemDataset(store, Kept(), crop=CROP)[3]


@pytest.mark.parametrize("task", [ContextAndTarget("vocal"), AllStems(("vocal", "voice"))])
def test_roles_that_no_song_has_are_an_error(
    store: LatentStore, task: StemTask[object], one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        StemDataset(store, task, crop=CROP)
    names = "vocal" if isinstance(task, ContextAndTarget) else "vocal or voice"
    assert one_sentence(caught.value) == (
        f"no song that is used has a stem {names}, only bass, drums, keys: check the roles of the "
        "task, and `without` and `having`."
    )


def test_only_roles_of_songs_that_are_used_count(
    store: LatentStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(StemDataset(store, AllStems(("bass", "drums")), crop=CROP)) == 3  # solo has no bass
    assert not caplog.messages
    with pytest.raises(ConfigError, match="has a stem mix, only bass, drums, keys"):
        StemDataset(store, AllStems(("mix",)), crop=CROP)
    assert len(StemDataset(store, AllStems(("mix",)), crop=CROP, without=())) == 3
    alone = {"without": ("bass", "keys", "mix")}
    with pytest.raises(ConfigError, match="has a stem bass, only drums"):
        StemDataset(store, ContextAndTarget("bass"), crop=CROP, **alone)
    dataset = StemDataset(store, AllStems(("bass", "drums")), crop=CROP, **alone)
    assert caplog.messages == [
        "no song that is used has a stem bass, only drums: such stems are silence"
    ]
    assert not dataset[0].mask[0].any()


def test_a_path_is_a_store(store: LatentStore) -> None:
    dataset = StemDataset(Path(store.url), Kept(), crop=CROP)
    assert dataset.groups == StemDataset(store.url, Kept(), crop=CROP).groups
    with pytest.raises(ConfigError, match="5 is not a store"):
        StemDataset(5, Kept(), crop=CROP)  # type: ignore[arg-type]


def test_songs_without_a_role_can_be_left_out(store: LatentStore) -> None:
    everything = StemDataset(store, ContextAndTarget("bass"), crop=CROP)
    lacking = [n for n, group in enumerate(everything.groups) if "bass" not in group.roles]
    assert 0 < len(lacking) < len(everything)
    with pytest.raises(ConfigError, match=r"leave such songs out by having=\['bass'\]"):
        everything[lacking[0]]
    data = StemDataset(store, ContextAndTarget("bass"), crop=CROP, having=["bass"])
    assert len(data) == len(everything) - len(lacking)
    assert {data[n].role for n in range(len(data))} == {"bass"}
    with pytest.raises(ConfigError, match=r"No song of .* has bass and kazoo"):
        StemDataset(store, ContextAndTarget(), crop=CROP, having=["bass", "kazoo"])
