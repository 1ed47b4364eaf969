"""The formulas of linearity, on models whose linearity is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentmill.errors import ModelError
from latentmill.evaluation.metrics import (
    GAINS,
    additivity,
    combination,
    homogeneity,
    relative_l2,
)
from latentmill.models.base import ModelSpec
from latentmill.models.families import mdct

LINEAR = mdct.build(hop=16, sample_rate=800).load("cpu")


class Changed:
    """The mdct with something done to its latents."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._change = change
        self.spec: ModelSpec = LINEAR.spec
        self.decode = LINEAR.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        return self._change(LINEAR.encode(audio))


def sound(seed: int, samples: int = 150) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


def test_a_linear_encoder_deviates_by_rounding_alone() -> None:
    found = homogeneity(LINEAR, sound(0))
    assert tuple(found) == GAINS
    assert all(max(one.with_origin, one.raw) < 1e-6 for one in found.values())
    found_sum = additivity(LINEAR, [sound(0), sound(1), sound(2)])
    assert max(found_sum.with_origin, found_sum.raw) < 1e-6


def test_an_affine_encoder_needs_the_origin() -> None:
    model = Changed(lambda z: z + 0.5)
    for gain, one in homogeneity(model, sound(0), [0.25, 1.0, 1.1]).items():
        assert one.with_origin < 1e-6
        assert (one.raw > 0.01) == (gain != 1.0)
    both = additivity(model, [sound(0), sound(1)])
    assert both.with_origin < 1e-6 < 0.1 < both.raw


def test_a_known_non_linearity_gives_its_number() -> None:
    """E(x) = (T x)^2: E(a x) = a^2 E(x), against a E(x): relL2 |a - 1|. Of x + x: |2 / 4 - 1|."""
    model = Changed(torch.square)
    for gain, one in homogeneity(model, sound(3), [0.25, 0.5, 2.0]).items():
        assert one.raw == pytest.approx(abs(gain - 1), rel=1e-5)
        assert one.with_origin == pytest.approx(one.raw)  # E(0) = 0
    assert additivity(model, [sound(3), sound(3)]).raw == pytest.approx(0.5, rel=1e-5)


def test_a_constant_in_every_latent_changes_no_error() -> None:
    """E(x) = (T x)^2 + 10 has the error of (T x)^2, which the norm of the latents would hide."""
    bent, shifted = Changed(torch.square), Changed(lambda z: z.square() + 10)
    x, y = sound(3, 160), sound(4, 160)  # of a length that the model takes
    for gain, one in homogeneity(shifted, x, [0.25, 0.5, 2.0]).items():
        assert one.with_origin == pytest.approx(abs(gain - 1), rel=1e-4)
        # Independently: relL2 of the formula, with numpy.
        z, c = shifted.encode(x[None]).double().numpy(), 10.0
        louder = shifted.encode(gain * x[None]).double().numpy()
        z_op = gain * z + (1 - gain) * c
        wanted = np.linalg.norm(louder - z_op) / np.linalg.norm(z_op)
        assert one.raw_norm == pytest.approx(wanted, rel=1e-3)
        assert one.raw_norm < one.with_origin / 3
    added = additivity(shifted, [x, y])
    assert added.with_origin == pytest.approx(additivity(bent, [x, y]).with_origin, rel=1e-4)
    assert added.raw_norm < added.with_origin / 3


def test_combination_is_z_op() -> None:
    a, b, c = torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([100.0])
    assert combination([a, b], [2.0, -0.5], None).item() == -3.0
    assert combination([a, b], [2.0, -0.5], c).item() == -3.0 - 0.5 * 100
    with pytest.raises(ValueError, match="zip"):
        combination([a, b], [1.0], None)


def test_relative_l2_of_nothing() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_l2(zero, zero) == 0
    assert relative_l2(one, zero) == math.inf
    assert relative_l2(3 * one, one) == pytest.approx(2)


def test_codes_have_no_arithmetic(one_sentence: Callable[[BaseException], str]) -> None:
    model = Changed(lambda z: z)
    model.spec = replace(LINEAR.spec, codebook_size=16)
    for call in (lambda: homogeneity(model, sound(0)), lambda: additivity(model, [sound(0)])):
        with pytest.raises(ModelError) as caught:
            call()
        assert "output=codes" in one_sentence(caught.value)
