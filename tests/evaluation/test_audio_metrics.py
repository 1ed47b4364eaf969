"""The audio metrics against formulas in numpy and, if it is installed, against auraloss."""

from __future__ import annotations

from collections.abc import Callable

import formulas
import numpy as np
import pytest
import torch

from latentmill.evaluation.audio_metrics import measures_of, mr_stft, si_sdr

RATE = 22050


def sounds(samples: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A chord with noise, and a version of it that is quieter, filtered and noisier."""
    random = np.random.default_rng(samples + channels)
    time = np.arange(samples) / RATE
    chord = sum(np.sin(2 * np.pi * f * time + p) for f, p in ((220, 0), (277.2, 1), (1760, 2)))
    target = 0.2 * chord[None] + 0.02 * random.standard_normal((channels, samples))
    given = 0.7 * (target + np.roll(target, 1, axis=1)) / 2
    return given + 0.01 * random.standard_normal((channels, samples)), target


def both(samples: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    given, target = sounds(samples, channels)
    return torch.from_numpy(given), torch.from_numpy(target)


@pytest.mark.parametrize("name", ["snr", "si_sdr", "level", "mr_stft", "log_mel"])
@pytest.mark.parametrize(("samples", "channels"), [(RATE, 1), (9000, 2), (1500, 1), (300, 2)])
def test_a_metric_is_its_formula(name: str, samples: int, channels: int) -> None:
    wanted = formulas.METRICS[name](*sounds(samples, channels), RATE)
    found = measures_of(RATE)[name](*both(samples, channels))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert abs(found) > 1e-3


@pytest.mark.parametrize("name", ["snr", "si_sdr", "level", "mr_stft", "log_mel"])
def test_equal_and_silent_sounds_have_finite_values(name: str) -> None:
    measure = measures_of(RATE)[name]
    sound, silence = both(4000, 1)[1], torch.zeros(1, 4000)
    assert measure(sound, sound) == pytest.approx(200 if name in ("snr", "si_sdr") else 0)
    assert np.isfinite(measure(silence, sound))
    assert np.isfinite(measure(sound, silence))
    assert measure(silence, silence) == pytest.approx(-200 if name == "level" else 0)


def test_per_item_the_spectral_metrics_are_those_of_auraloss() -> None:
    auraloss = pytest.importorskip("auraloss")
    of_auraloss: Callable[..., torch.Tensor] = auraloss.freq.MultiResolutionSTFTLoss(
        fft_sizes=[1024, 2048, 512], hop_sizes=[120, 240, 50], win_lengths=[600, 1200, 240]
    )
    sdr = auraloss.time.SISDRLoss(zero_mean=False)
    for samples in (RATE, 7000):
        given, target = both(samples, 1)
        batch = given[None].float(), target[None].float()
        assert mr_stft(given, target) == pytest.approx(float(of_auraloss(*batch)), rel=1e-4)
        assert si_sdr(given, target) == pytest.approx(-float(sdr(*batch)), rel=1e-4)


def test_a_batch_does_not_change_an_item() -> None:
    """Of a loud and a quiet item, a ratio over the batch is almost that of the loud one."""
    given, target = both(RATE, 1)
    quiet = 0.01 * target + 0.02 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    alone = mr_stft(quiet, 0.01 * target)
    over_the_batch = mr_stft(torch.cat([given, quiet]), torch.cat([target, 0.01 * target]))
    assert over_the_batch < 0.75 * alone
