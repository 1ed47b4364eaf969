"""Transforms of one sample: against the same on the waveform, and the same every time."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.errors import ConfigError
from latentmill.ops import Origin, fade
from latentmill.reader.collate import collate
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.loader import Loader
from latentmill.reader.normalize import Normalize
from latentmill.reader.sample import Sample, sample_random
from latentmill.reader.stem_dataset import StemDataset
from latentmill.reader.stems import AllStems, ContextAndTarget, Stems
from latentmill.reader.stream import LatentStream
from latentmill.reader.transforms import DrawFromPosterior, RandomFade, RandomGain
from latentmill.store.store import LatentStore
from support.latent_store import write_latents
from support.stem_files import HOP, RATE, waveform, write_stem_store, write_stems

CROP = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stems(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return write_stem_store(tmp_path_factory.mktemp("store"), source)


def test_a_random_gain_is_that_of_the_waveform(store: LatentStore, source: Path) -> None:
    plain = LatentDataset(store, crop=CROP, seed=1)
    louder = LatentDataset(store, crop=CROP, seed=1, transforms=[RandomGain((-12, 6))])
    plain.set_epoch(0)
    louder.set_epoch(0)
    gains = []
    for number in range(len(plain)):
        before, after = plain[number], louder[number]
        start = round(before.metadata["seconds_start"] * RATE / HOP)
        factor = float(10 ** (sample_random(1, 0, number).uniform(-12, 6) / 20))
        audio = factor * waveform(source, after.key, 3 * RATE)
        model = store.model()
        encoded = model.encode(torch.from_numpy(audio.astype(np.float32))[None])[0].numpy()
        have = int(after.mask.sum())
        assert np.allclose(after.latents[:, :have], encoded[:, start : start + have], atol=2e-5)
        gains.append(factor)
    assert len(set(gains)) == len(plain)
    assert 10 ** (-12 / 20) <= min(gains) < max(gains) <= 10 ** (6 / 20)


ORIGIN = Origin(np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6))

TRANSFORMS = (RandomGain((-6, 6)), RandomFade(5))


def sample(frames: int = 20, origin: Origin | None = ORIGIN) -> Sample:
    latent = np.random.default_rng(frames).standard_normal((2, frames)).astype(np.float32)
    return Sample("a", latent, np.ones(frames, np.bool_), {"title": "A"}, origin=origin)


def test_a_gain_leaves_silence_as_it_is() -> None:
    silent = Sample("s", ORIGIN.crop(90, 30, 20), np.ones(20, np.bool_), origin=ORIGIN.at(90, 30))
    changed = RandomGain((6, 6))(silent, np.random.default_rng(0))
    assert np.allclose(changed.latents, silent.latents, atol=1e-6)


def test_a_crop_knows_its_place_in_its_item(tmp_path: Path) -> None:
    lengths = [50, 9, 33]
    made = write_latents(str(tmp_path / "origin"), [20])
    silence = [made.origin.of_length(n).astype(np.float16) for n in lengths]
    silent = write_latents(str(tmp_path / "silent"), lengths, latents=silence)
    for crop, mode in ((12, "windows"), (12, "random"), (None, "start")):
        plain = LatentDataset(silent, crop=crop, mode=mode)
        louder = LatentDataset(silent, crop=crop, mode=mode, transforms=[RandomGain((6, 6))])
        for number in range(len(plain)):
            assert np.allclose(louder[number].latents, plain[number].latents, atol=1e-6)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 99), position=st.integers(0, 10**9))
@settings(max_examples=30)
def test_a_transform_is_a_function_of_its_random_numbers(
    seed: int, epoch: int, position: int
) -> None:
    for transform in TRANSFORMS:
        random = sample_random(seed, epoch, position)
        again = sample_random(seed, epoch, position)
        before = sample()
        kept = before.latents.copy()
        changed = transform(before, random)
        copy = pickle.loads(pickle.dumps(transform))(sample(), again)
        assert np.array_equal(changed.latents, copy.latents)
        assert np.array_equal(before.latents, kept)
        assert (changed.key, changed.metadata) == ("a", {"title": "A"})


def test_fades_are_of_every_length_up_to_the_longest() -> None:
    random, seen = np.random.default_rng(3), set()
    for _ in range(400):
        faded = RandomFade(3)(sample(), random).latents
        fits = [
            (i, o)
            for i in range(4)
            for o in range(4)
            if np.array_equal(faded, fade(sample().latents, i, o, origin=ORIGIN))
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 16
    short = RandomFade(100)(sample(4), random)  # at most half of it at each end
    assert short.latents.shape == (2, 4)


def test_latents_are_drawn_around_the_mean() -> None:
    means, deviations = np.full((3, 5000), 2.0), np.full((3, 5000), [[0.0], [0.5], [3.0]])
    latent = np.concatenate([means, deviations]).astype(np.float32)
    origin = Origin(np.zeros((6, 4), np.float32), deviations=3)
    posterior = Sample("p", latent, np.ones(5000, np.bool_), origin=origin)
    drawn = DrawFromPosterior()(posterior, np.random.default_rng(1)).latents
    assert drawn.shape == (3, 5000)
    assert drawn.dtype == np.float32
    assert np.allclose(drawn.mean(axis=1), 2, atol=0.15)
    assert np.allclose(drawn.std(axis=1), [0, 0.5, 3], rtol=0.05)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("crop", [16, None])
def test_padding_has_no_noise(tmp_path: Path, crop: int | None, workers: int) -> None:
    """It is the mean of silence; frames of the item have the noise of their random numbers."""
    lengths, random = [9, 40, 16, 3], np.random.default_rng(5)
    latents = [random.uniform(0.1, 2, (4, length)).astype(np.float16) for length in lengths]
    model = {"posterior": "mean+std"}
    store = write_latents(str(tmp_path), lengths, latents=latents, model=model)
    plain = LatentStream(store, crop=crop, seed=3, batch_size=4)
    drawing = LatentStream(store, crop=crop, seed=3, batch_size=4, transforms=[DrawFromPosterior()])
    (before,) = Loader(plain, workers=0)
    with Loader(drawing, workers=workers) as loader:
        (after,) = loader
    assert torch.equal(before["mask"], after["mask"])
    padded = 0
    for row, position in enumerate(after["position"]):
        have, latent = int(after["mask"][row].sum()), before["latents"][row].numpy()
        drawn_for = latent.shape[1] if crop else have
        noise = sample_random(3, 0, position).standard_normal((2, drawn_for), np.float32)
        expected = latent[:2].copy()
        expected[:, :have] += latent[2:, :have] * noise[:, :have]
        assert np.array_equal(after["latents"][row].numpy(), expected)
        padded += latent.shape[1] - have
    assert padded == (7 + 13 if crop else 31 + 24 + 37)
    assert (before["latents"] > 0).all()  # also the deviations of silence


def test_drawing_depends_on_seed_epoch_and_position_alone(tmp_path: Path) -> None:
    """The noise of all samples of two epochs, which is standard normal, and that of two workers."""
    frames, count = 400, 12
    latents = [
        np.concatenate([np.full((2, frames), n), np.full((2, frames), 1 + n)]).astype(np.float16)
        for n in range(count)
    ]
    store = write_latents(
        str(tmp_path), [frames] * count, latents=latents, model={"posterior": "mean+std"}
    )

    keys = list(store.keys())

    def noise(epoch: int, seed: int = 0, workers: int = 0) -> np.ndarray:
        dataset = LatentDataset(store, crop=100, seed=seed, transforms=[DrawFromPosterior()])
        loader = Loader(dataset, batch_size=4, workers=workers)
        loader.set_epoch(epoch)
        drawn = {}
        for batch in loader:
            assert batch["latents"].shape == (4, 2, 100)
            for key, position, latent in zip(
                batch["key"], batch["position"], batch["latents"].numpy(), strict=True
            ):
                number = keys.index(key)
                drawn[int(position)] = (latent - number) / (1 + number)
        return np.stack([drawn[position] for position in sorted(drawn)])

    first = noise(0)
    assert np.array_equal(noise(0), first)
    assert np.array_equal(noise(0, workers=2), first)
    both = np.stack([first, noise(1), noise(0, seed=1)])
    assert abs(both.mean()) < 4 / both.size**0.5
    assert both.std() == pytest.approx(1, abs=0.05)
    assert (both**3).mean() == pytest.approx(0, abs=0.2)
    assert (both**4).mean() == pytest.approx(3, abs=0.4)
    rows = both.reshape(-1, 100)
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.6  # no two samples, epochs or seeds share noise


@pytest.mark.parametrize("by", ["channel", "overall"])
def test_a_posterior_is_drawn_from_before_or_after_normalising(by: str, tmp_path: Path) -> None:
    random, lengths = np.random.default_rng(2), [30, 50, 40]
    latents = [
        np.concatenate([random.normal(3, 2, (2, n)), random.uniform(0.1, 0.5, (2, n))])
        for n in lengths
    ]
    store = write_latents(
        str(tmp_path),
        lengths,
        latents=[latent.astype(np.float16) for latent in latents],
        model={"posterior": "mean+std"},
    )
    normal = Normalize.from_store(store, by)  # type: ignore[arg-type]
    draw = DrawFromPosterior()
    before, after, drawn, means = (
        LatentDataset(store, transforms=transforms).__getitems__([0, 1, 2])
        for transforms in ([draw, normal], [normal, draw], [draw], [normal])
    )
    for one, other, plain in zip(before, after, drawn, strict=True):
        assert one.latents.shape == (2, len(one.mask))
        assert np.allclose(one.latents, other.latents, atol=1e-5)
        assert np.allclose(normal.undo(one.latents), plain.latents, atol=1e-4)
    joined = np.concatenate([sample.latents[:2] for sample in means], axis=1)
    axis = 1 if by == "channel" else None
    assert np.allclose(joined.mean(axis=axis), 0, atol=1e-3)
    assert np.allclose(joined.std(axis=axis), 1, atol=1e-3)
    silence = normal.apply(store.origin.of_length(50)[:2])
    for samples in (before, after):
        assert np.allclose(collate(samples)["latents"][0, :, 30:], silence[:, 30:], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: RandomGain((3, -3)), "from low to high"),
        (lambda: RandomGain((-np.inf, 0)), "from low to high"),
        (lambda: RandomFade(-1), "needs a number of frames"),
        (lambda: DrawFromPosterior()(sample(), np.random.default_rng()), "posterior=mean+std"),
        (lambda: RandomFade(2)(sample(origin=None), np.random.default_rng()), "keep `origin`"),
    ],
)
def test_what_makes_no_sense(
    wrong: Callable[[], object], says: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert says in one_sentence(caught.value)


def as_dict(stems: Stems, random: np.random.Generator) -> dict[str, Any]:
    return {"latents": stems.latents}


def unchanged(stems: Stems, random: np.random.Generator) -> Stems:
    return stems


@pytest.mark.parametrize(
    ("transform", "instead"),
    [
        (Normalize((0.0,) * 4, (1.0,) * 4), r'normal.apply\(batch\["context"\]\)'),
        (RandomGain(), r"gains=\(-6, 6\)"),
        (RandomFade(2), "lm.fade in a task of your own"),
        (DrawFromPosterior(), "in a task of your own"),
    ],
)
def test_transforms_of_latents_refuse_results_of_tasks(
    store: LatentStore, transform: Any, instead: str, one_sentence: Any
) -> None:
    for task in (ContextAndTarget(), AllStems(("drums",)), as_dict):
        dataset = StemDataset(store, task, crop=CROP, transforms=[transform])
        with pytest.raises(ConfigError, match=instead) as error:
            dataset[0]
        one_sentence(error.value)


def test_transforms_of_latents_change_results_with_an_origin(store: LatentStore) -> None:
    options: Any = {"task": unchanged, "crop": CROP}
    normal = Normalize.from_store(store)
    changed = StemDataset(store, **options, transforms=[normal])[(0, 0, 0)]
    plain = StemDataset(store, **options)[(0, 0, 0)]
    mean, std = (column[:, None] for column in (store.mean, store.std))
    assert np.allclose(changed.latents, (plain.latents - mean) / std, atol=1e-5)
