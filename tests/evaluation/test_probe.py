"""`probe`: each lie of a model is found by exactly one sentence, and honest models have none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ModelError, SourceError
from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.audio_encoder import AudioHandle
from latentmill.models.families.hf.model import TokenizerLoader
from latentmill.models.hub import Repo
from latentmill.models.probing.lengths import Formula, fit
from latentmill.models.weights import ModelFiles
from support import runs
from support.lying_models import LIES, SPEC, Handle, Model, features

LAMBDA = "handle"


class WithoutDecoder(AudioHandle):
    def load(self, device: str) -> Any:
        return Model(self.spec, features, no_decoder)


def no_decoder(latents: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    raise ModelError("it cannot decode")


def test_an_honest_model_passes_every_check() -> None:
    result = lm.probe(Handle())
    assert result.failed == ()
    assert {one.name: one.status for one in result.checks} == dict.fromkeys(
        [one.name for one in result.checks], "passed"
    )
    assert result.spec == SPEC
    assert result.latents is not None
    assert result.latents.minimum < result.latents.mean < result.latents.maximum


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_one_sentence(lie: str) -> None:
    make, sentence = LIES[lie]
    # Functions made here cannot be pickled, which is a lie of its own.
    broken = [one for one in lm.probe(make()).failed if lie == LAMBDA or "pickled" not in one]
    assert len(broken) == 1, broken
    assert re.fullmatch(sentence, broken[0]), broken[0]
    assert broken[0].endswith(".")
    assert ". " not in broken[0]


@pytest.mark.parametrize(
    "lie", ["hop", "overhang", "latent channels", "context", "shortest", "a decoder without noise"]
)
def test_the_printed_spec_is_true(lie: str) -> None:
    made = LIES[lie][0]()
    corrected = lm.probe(made).spec
    assert corrected != made.spec
    again = lm.probe(Handle(corrected, made.encode_with, made.decode_with))
    assert [one for one in again.failed if "pickled" not in one] == []


def test_a_range_that_is_exceeded_does_not_hide_other_checks() -> None:
    status = {one.name: one.status for one in lm.probe(LIES["range"][0]()).checks}
    assert {name for name, one in status.items() if one != "passed"} == {"range", "handle"}
    reasons = {one.measured for one in lm.probe(LIES["music is NaN"][0]()).checks}
    assert "the latents are not finite" in reasons


def test_lengths_without_a_formula_leave_the_context_unmeasured() -> None:
    result = lm.probe(Handle(SPEC, lambda audio: features(audio)[..., : audio.shape[-1] % 320 + 1]))
    status = {one.name: one.status for one in result.checks}
    assert (status["lengths"], status["context"]) == ("failed", "not measured")


def test_a_model_that_cannot_decode() -> None:
    files = ModelFiles(Repo("owner/name"), {}, {}, {})
    result = lm.probe(WithoutDecoder(SPEC, files, TokenizerLoader(), {}))
    assert result.failed == ()
    assert {one.status for one in result.checks if "decod" in one.name} == {"not measured"}


def test_a_hop_s_lie_still_measures_the_context() -> None:
    assert lm.probe(LIES["hop"][0]()).spec.context == Context(1, 1)


@pytest.mark.parametrize(("hop", "overhang"), [(512, 0), (4096, 1536), (400, -400), (320, 319)])
@pytest.mark.parametrize("multiple", [1, 160, 512])
def test_lengths_are_fitted(hop: int, overhang: int, multiple: int) -> None:
    """For lengths that are multiples of something else, the formula may be another equal one."""
    real = ModelSpec(**{**vars(SPEC), "hop": hop, "overhang": overhang})
    lengths = range(2 * max(hop, multiple), 200 * hop, multiple * max(1, hop // (7 * multiple)))
    frames = {length - length % multiple: 0 for length in lengths}
    frames = {length: real.frames(length) for length in frames}
    found = fit(frames)
    assert found is not None
    fitted = ModelSpec(**{**vars(SPEC), "hop": found.hop, "overhang": found.overhang})
    assert {length: fitted.frames(length) for length in frames} == frames
    assert found.hop == hop
    assert fit(frames, Formula(hop, overhang)) == Formula(hop, overhang)


def test_lengths_without_a_formula() -> None:
    assert fit({length: length**2 for length in range(1, 50)}) is None
    assert fit({64: 1, 128: 1}) is None


def test_the_audio_of_a_folder(tmp_path: Path) -> None:
    """Of any rate and number of channels; silent and broken recordings are not used."""
    music = 0.3 * torch.sin(torch.arange(44100) * 0.05)
    for name, rate, channels in (("a", 8000, 1), ("b", 44100, 2), ("c", 22050, 1)):
        soundfile.write(tmp_path / f"{name}.wav", music[:, None].expand(-1, channels), rate)
    soundfile.write(tmp_path / "silent.wav", torch.zeros(8000).numpy(), 8000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    result = lm.probe(Handle(), audio=tmp_path)
    assert result.failed == ()
    assert re.fullmatch(rf"\d\.\d s of 3 recordings in {re.escape(str(tmp_path))}", result.audio)
    for name in "abc":
        (tmp_path / f"{name}.wav").unlink()
    with pytest.raises(SourceError, match="has no recording that can be loaded and is not silent"):
        lm.probe(Handle(), audio=tmp_path)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    honest = runs.call(capsys, "probe", "mdct", "--model-option", "hop=256")
    assert (honest.code, honest.err) == (0, "")
    assert "measured with synthesised music" in honest.out
    assert "18 checks passed" in honest.out
    spec = honest.out.partition("the spec with measured values:\n")[2]
    names = {"ModelSpec": ModelSpec, "Context": Context}
    assert eval(spec, names) == lm.probe("mdct", model_options={"hop": 256}).spec
    lying = runs.call(capsys, "probe", "python:support.lying_models:lying", "--json")
    assert lying.code == 8
    parsed = runs.outcome(lying)
    assert len(parsed["failed"]) == 1
    assert lying.err == (
        "latentmill: python:support.lying_models:lying fails 1 check; first: "
        f"{parsed['failed'][0]}\n"
    )
    text = runs.call(capsys, "probe", "python:support.lying_models:lying").out
    assert parsed["failed"][0] in text.splitlines()
    assert "latent_channels=4" in text
