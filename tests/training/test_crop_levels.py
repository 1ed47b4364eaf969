"""Levels of the crops that training draws."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentmill.training.loop import Trainer
from latentmill.training.settings import TrainSettings


def test_crops_are_made_quieter(tiny: Callable[..., TrainSettings]) -> None:
    """The same crops at levels from -20 to 0 dB, the same again for the same step."""
    plain = Trainer(tiny("batch_size=64"))._crops.batch(3)
    trainer = Trainer(tiny("batch_size=64", "quieter_db=20"))
    quieter = trainer._crops.batch(3)
    assert quieter.names == plain.names
    gains = quieter.audio.norm(dim=(1, 2)) / plain.audio.norm(dim=(1, 2))
    torch.testing.assert_close(quieter.audio, gains[:, None, None] * plain.audio)
    levels = 20 * gains.log10()
    assert -20 <= levels.min() < -18 < -2 < levels.max() <= 1e-5
    assert abs(levels.mean() + 10) < 2.5  # even: a standard error of 0.7
    assert torch.equal(trainer._crops.batch(3).audio, quieter.audio)
