"""The augmentation, against arithmetic written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentmill.errors import ConfigError
from latentmill.evaluation.metrics import combination
from latentmill.training import LinearityAugmentation, LinearityBatch, LinearitySettings
from latentmill.training.linearity import capped, gain_range, random_numbers

# Three sounds of one channel and two samples.
AUDIO = torch.tensor([[[0.1, 0.2]], [[0.4, -0.8]], [[-0.5, 0.5]]])
LATENTS = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])


def plain(**settings: object) -> LinearitySettings:
    """No random gains unless they are asked for."""
    return LinearitySettings.model_validate(
        {"gain_probability": 0, "annealing": "none", "mixing": "sum", **settings}
    )


def made(step: int = 0, audio: Tensor = AUDIO, **settings: object) -> LinearityBatch:
    return LinearityAugmentation(plain(**settings), steps=100, seed=3)(audio, step)


def test_plain_sums_are_those_of_each_sound_and_the_one_before_it() -> None:
    batch = made(audio=AUDIO / 2)
    assert torch.equal(batch.inputs, AUDIO / 2)
    sums = torch.tensor([[[-0.2, 0.35]], [[0.25, -0.3]], [[-0.05, -0.15]]])
    torch.testing.assert_close(batch.targets, torch.cat((AUDIO / 2, sums)))
    added = torch.tensor([[[6.0, 8.0]], [[4.0, 6.0]], [[8.0, 10.0]]])
    torch.testing.assert_close(batch.latents(LATENTS), torch.cat((LATENTS, added)))
    rolled = torch.roll(LATENTS, 1, dims=0)  # as in the README of linear-cae
    torch.testing.assert_close(batch.latents(LATENTS)[3:], LATENTS + rolled)


def test_weights_are_from_a_half_to_one_and_sum_to_one() -> None:
    batch = made(mixing="weighted")
    first = 0.5 + 0.5 * random_numbers(3, 0, 0, 15)[:3]
    for row in range(3):
        expected = np.zeros(3)
        expected[row], expected[row - 1] = first[row], 1 - first[row]
        np.testing.assert_allclose(batch.weights[3 + row].numpy(), expected, rtol=1e-6)
        wanted = first[row] * LATENTS[row] + (1 - first[row]) * LATENTS[row - 1]
        torch.testing.assert_close(batch.latents(LATENTS)[3 + row], wanted.float())
        target = first[row] * AUDIO[row] + (1 - first[row]) * AUDIO[row - 1]
        torch.testing.assert_close(batch.targets[3 + row], target.float())
    weights = torch.cat([made(step, mixing="weighted").weights[3:] for step in range(500)])
    largest = weights.max(dim=1).values
    assert 0.5 <= float(largest.min()) < 0.51
    assert 0.99 < float(largest.max()) <= 1
    assert float(largest.mean()) == pytest.approx(0.75, abs=0.02)


def test_no_mixtures() -> None:
    batch = made(mixing="none", audio=AUDIO[:1])
    assert torch.equal(batch.targets, AUDIO[:1])
    assert torch.equal(batch.latents(LATENTS[:1]), LATENTS[:1])


def test_one_sound_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="mixtures need at least 2 sounds"):
        made(audio=AUDIO[:1])


def test_gains_are_on_targets_and_latents_alike() -> None:
    batch = made(gain_probability=1, mixing="none")
    for row, gain in enumerate(batch.gains):
        torch.testing.assert_close(batch.targets[row], gain * AUDIO[row])
        torch.testing.assert_close(batch.latents(LATENTS)[row], gain * LATENTS[row])
    assert torch.equal(batch.inputs, AUDIO)


def test_the_distribution_of_gains() -> None:
    """Quiet sounds, so that the cap has no effect: gains are those drawn."""
    audio = 0.01 * AUDIO
    steps = [made(s, audio, gain_probability=0.8, mixing="sum").gains for s in range(3000)]
    gains = torch.cat(steps)  # 18,000
    assert float((gains == 1).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float((gains == 0).float().mean()) == pytest.approx(0.8 * 0.05 / 3, abs=0.004)
    scaled = gains[gains != 1]
    assert not ((scaled > 0) & (scaled < 0.05)).any()
    assert float(scaled.mean()) == pytest.approx(1.5, abs=0.03)
    assert 2.9 < float(scaled.max()) < 3


def test_gains_are_capped_so_that_nothing_clips() -> None:
    gains = torch.tensor([3.0, 3.0, 0.5, 0.0])
    sounds = torch.tensor([[[0.5, -0.2]], [[0.1, 0.2]], [[0.9, 0.1]], [[4.0, 0.0]]])
    assert torch.equal(capped(gains, sounds), torch.tensor([2.0, 3.0, 0.5, 0.0]))
    assert capped(torch.ones(1), torch.zeros(1, 1, 4)).tolist() == [1.0]  # silence has no peak
    loud = made(audio=torch.ones(2, 1, 3))  # the mixtures are 2, and become 1
    assert loud.gains.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert torch.equal(loud.targets, torch.ones(4, 1, 3))
    assert torch.equal(loud.latents(torch.ones(2, 1, 1)), torch.ones(4, 1, 1))


@pytest.mark.parametrize(
    ("annealing", "progress", "low", "high"),
    [
        ("none", 0, 0, 3),
        ("none", 100, 0, 3),
        ("linear", 0, 0, 3),
        ("linear", 25, 0.25, 2.5),
        ("linear", 100, 1, 1),
        ("cosine", 20, 0, 3),
        ("cosine", 55, 0.5, 2),  # half way from 20 to 90 %
        ("cosine", 37.5, 0.5 - math.sqrt(2) / 4, 2 + math.sqrt(2) / 2),  # a quarter: cos(pi / 4)
        ("cosine", 90, 1, 1),
        ("cosine", 100, 1, 1),
    ],
)
def test_annealing(annealing: str, progress: float, low: float, high: float) -> None:
    found = gain_range(3.0, annealing, round(10 * progress), 1000)  # type: ignore[arg-type]
    assert found == pytest.approx((low, high))


def test_with_the_origin_latents_are_combined_as_in_the_linearity_card() -> None:
    batch = made(origin=True, gain_probability=1, mixing="weighted")
    assert torch.equal(batch.inputs, torch.cat((AUDIO, torch.zeros(1, 1, 2))))
    silence = torch.tensor([[[0.5, -1.0]]])
    found = batch.latents(torch.cat((LATENTS, silence)))
    for row in range(6):
        factors = (batch.gains[row] * batch.weights[row]).tolist()
        by_hand = (1 - sum(factors)) * silence[0]
        for factor, latent in zip(factors, LATENTS, strict=True):
            by_hand = by_hand + factor * latent
        torch.testing.assert_close(found[row], by_hand)
        of_the_card = combination(list(LATENTS), factors, silence[0])
        torch.testing.assert_close(found[row], of_the_card.float())


def test_the_latents_of_all_inputs_are_needed() -> None:
    with pytest.raises(ConfigError, match="all 4 inputs of the batch, got 3"):
        made(origin=True).latents(LATENTS)


def test_noise_has_the_gain_of_its_target() -> None:
    noise = torch.ones(6, 2, 3, 4)
    batch = made(gain_probability=1)
    assert torch.equal(batch.noise(noise), batch.gains[:, None, None, None] * noise)
    assert torch.equal(made(gain_probability=1, noise_at_gain=False).noise(noise), noise)


def test_steps_seeds_and_ranks_have_their_own_numbers_and_no_state() -> None:
    settings = LinearitySettings(annealing="none")
    first = LinearityAugmentation(settings, steps=10, seed=1)
    torch.manual_seed(0)
    for step in range(3):
        first(AUDIO, step)
    torch.manual_seed(9)
    again = LinearityAugmentation(settings, steps=10, seed=1)(AUDIO, 5)
    assert torch.equal(first(AUDIO, 5).targets, again.targets)
    others = [
        first(AUDIO, 6),
        LinearityAugmentation(settings, steps=10, seed=2)(AUDIO, 5),
        LinearityAugmentation(settings, steps=10, seed=1, rank=1)(AUDIO, 5),
    ]
    for other in others:
        assert not torch.equal(again.gains, other.gains)
        assert not torch.equal(again.weights, other.weights)


@pytest.mark.parametrize("origin", [False, True])
def test_it_makes_a_network_linear(origin: bool) -> None:
    """Three lines in a loop: a network whose bias breaks linearity learns to do without it."""
    torch.manual_seed(0)
    encoder = nn.Conv1d(1, 4, 4, stride=4)
    decoder = nn.ConvTranspose1d(4, 1, 4, stride=4)
    nn.init.constant_(decoder.bias, 0.5)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    linearity = LinearityAugmentation(LinearitySettings(annealing="none", origin=origin), steps=200)
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        batch = linearity(0.3 * torch.randn(8, 1, 32, generator=generator).clamp(-3, 3), step)
        latents = batch.latents(encoder(batch.inputs))
        loss = (decoder(latents) - batch.targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        x, y = 0.3 * torch.randn(2, 1, 1, 32, generator=generator)
        silence = encoder(torch.zeros_like(x)) if origin else 0
        added = decoder(encoder(x) + encoder(y) - silence)
        error = (added - x - y).norm() / (x + y).norm()
    assert error < 0.05
