"""`hf:REPO`: any audio tokenizer of transformers, by tiny random weights of the real classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentmill as lm
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.single import encode_chunked, encode_whole
from latentmill.errors import ModelError
from latentmill.models.families.hf import model as hf_model
from latentmill.models.families.hf.measured import MeasuredTokenizer, from_cache
from latentmill.models.hub import Repo
from latentmill.models.probing.behaviour import distance
from latentmill.models.probing.music import music
from latentmill.models.registry import resolve
from latentmill.models.weights import ModelFiles
from support.runs import call, write_songs
from support.tiny_tokenizers import TOKENIZERS, WITH_TORCHAUDIO, write_tokenizer
from support.tokenizer_references import REFERENCES, loaded

# By model type: rate, hop, context.
FACTS: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "dac": (24000, 320, (8, 8)),
    "encodec": (24000, 320, None),
    "mimi": (24000, 1920, None),
    "pocket_tts_audio_tokenizer": (24000, 1920, None),
    "vibevoice_acoustic_tokenizer": (24000, 40, None),
    "wavtokenizer": (24000, 600, None),
    "xcodec": (16000, 320, None),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the repositories; what is measured goes to a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("tokenizers")


def written(folder: Path, model_type: str) -> Path:
    repo = folder / model_type
    return repo if repo.exists() else write_tokenizer(repo, model_type)


@pytest.mark.parametrize("model_type", REFERENCES)
def test_latents_and_audio_are_the_package_s(tokenizers: Path, model_type: str) -> None:
    repo = written(tokenizers, model_type)
    handle = resolve(f"hf:{repo}", {"scale_factor": 0.5})
    spec, model, package = handle.spec, handle.load("cpu"), loaded(repo, model_type)
    rate, hop, context = FACTS[model_type]
    assert (spec.sample_rate, spec.hop, spec.overhang) == (rate, hop, 0)
    assert spec.context == context or context is None
    encode, decode = REFERENCES[model_type]
    sound = music(rate, 1, 40 * hop)[None]
    for frames in (3, 7, 40):
        with torch.inference_mode():
            wanted = encode(package, sound[..., : frames * hop])
        latents = model.encode(sound[..., : frames * hop])
        assert latents.shape == wanted.shape
        assert distance(latents, 0.5 * wanted) < 1e-6
    with torch.inference_mode():
        audio = decode(package, wanted)
    given = model.decode(latents, 40 * hop)
    assert given.abs().max() > 0
    assert distance(given[..., : audio.shape[-1]], audio[..., : 40 * hop]) < 1e-5


@pytest.mark.parametrize("model_type", REFERENCES)
def test_chunks_of_a_tokenizer_are_the_whole_if_it_can_be_trimmed(
    tokenizers: Path, model_type: str
) -> None:
    handle = resolve(f"hf:{written(tokenizers, model_type)}")
    spec, model = handle.spec, handle.load("cpu")
    assert (spec.stitch == "trim") == (model_type != "xcodec")  # its attention has no limit
    frames = 2 * spec.overlap_frames + 3
    chunking = Chunking.for_model(spec, seconds=spec.samples(frames) / spec.sample_rate)
    sound = music(spec.sample_rate, 1, 3 * chunking.samples)
    error = distance(encode_chunked(model, sound, chunking), encode_whole(model, sound))
    assert error < (1e-5 if spec.stitch == "trim" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFERENCES)
def test_probe_finds_no_failed_check(tokenizers: Path, model_type: str) -> None:
    assert lm.probe(f"hf:{written(tokenizers, model_type)}").failed == ()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WITH_TORCHAUDIO)
def test_tokenizers_that_need_torchaudio(tokenizers: Path, model_type: str) -> None:
    pytest.importorskip("torchaudio", reason="transformers needs torchaudio for these types")
    assert lm.probe(f"hf:{written(tokenizers, model_type)}").failed == ()


@pytest.mark.skipif(find_spec("torchaudio") is not None, reason="torchaudio is installed")
@pytest.mark.parametrize("model_type", WITH_TORCHAUDIO)
def test_a_type_whose_package_is_missing(
    tmp_path: Path, model_type: str, one_sentence: Callable[[BaseException], str]
) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **TOKENIZERS[model_type])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError) as caught:
        resolve(f"hf:{tmp_path}")
    assert one_sentence(caught.value) == (
        f"Model hf:{tmp_path}: transformers needs another package for a model of type "
        f"{model_type}: run `pip install torchaudio`."
    )


def test_seven_types_have_no_code_of_their_own() -> None:
    assert len(REFERENCES) >= 7
    for path in Path(hf_model.__file__).parent.glob("*.py"):
        code = path.read_text(encoding="utf-8").lower()
        assert not [one for one in TOKENIZERS if f'"{one}"' in code]


def test_a_tokenizer_is_measured_once(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = write_tokenizer(tmp_path / "repo", "vibevoice_acoustic_tokenizer")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = resolve(f"hf:{repo}")
    (kept,) = (tmp_path / "cache").rglob("*.json")
    assert first.spec.identity["measured"] == kept.read_text()
    assert MeasuredTokenizer.parse(kept.read_text()).text() == kept.read_text()
    times: list[str] = []
    measure = hf_model.measure
    monkeypatch.setattr(hf_model, "measure", lambda *a: times.append("again") or measure(*a))
    assert resolve(f"hf:{repo}") == first
    assert times == []
    whole = kept.read_text()
    assert '"hop": 40' in whole
    for count, damaged in enumerate(
        ("{", "null", "5", "[]", whole.replace('"hop": 40', '"hop": "40"')), 1
    ):
        kept.write_text(damaged)
        assert resolve(f"hf:{repo}") == first
        assert times == ["again"] * count
    times[:] = ["again"]
    write_tokenizer(repo, "vibevoice_acoustic_tokenizer", seed=1)
    assert resolve(f"hf:{repo}").spec.identity != first.spec.identity
    assert times == ["again", "again"]


def test_a_measurement_is_not_kept_without_a_home_folder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for a user of a container who is not in its list of users."""
    wanted = MeasuredTokenizer(40, 0, 1, 4, False, None, False, None, 40, {})
    files = ModelFiles(Repo("/w"), {}, {"weights": "00"}, {})
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    assert from_cache(files, ("1",), lambda: wanted) is wanted
    assert "the model will be measured again" in caplog.text


@pytest.mark.usefixtures("inline")
def test_a_store_is_continued_and_decoded_with_the_measurement_that_it_was_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, whose arithmetic measures another context."""
    repo = write_tokenizer(tmp_path / "repo", "vibevoice_acoustic_tokenizer")
    songs, more = write_songs(tmp_path / "songs", 2), write_songs(tmp_path / "more", 4)
    settings: dict[str, Any] = {"model": f"hf:{repo}", "dtype": "float32", "chunk_seconds": 0.3}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    lm.encode(str(more), str(tmp_path / "whole"), **settings)
    lm.encode(str(songs), str(tmp_path / "store"), **settings)
    (kept,) = (tmp_path / "here").rglob("*.json")
    there = tmp_path / "there" / kept.relative_to(tmp_path / "here")
    there.parent.mkdir(parents=True)
    found = MeasuredTokenizer.parse(kept.read_text())
    assert found.context is not None
    there.write_text(replace(found, context=(2, 3)).text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert resolve(f"hf:{repo}").spec.context == (2, 3)
    write_songs(songs, 4)
    lm.encode(str(songs), str(tmp_path / "store"), extend=True, **settings)
    store, whole = lm.open(str(tmp_path / "store")), lm.open(str(tmp_path / "whole"))
    assert len(store) == len(whole) == 4
    for record in whole:
        assert np.array_equal(store[record.key].latent, record.latent)
    assert np.array_equal(store.decode(record.key), whole.decode(record.key))
    lm.encode(str(songs), str(tmp_path / "other"), **settings)
    other = lm.open(str(tmp_path / "other"))
    assert not np.array_equal(other[record.key].latent, record.latent)


def test_a_measurement_is_an_option_of_the_command_line(
    tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = written(tokenizers, "vibevoice_acoustic_tokenizer")
    printed = call(capsys, "models", f"hf:{repo}", "--json")
    measured = json.loads(printed.out)["identity"]["measured"]
    other = measured.replace('"context": [22, 0]', '"context": [21, 0]')
    assert other != measured
    printed = call(capsys, "models", f"hf:{repo}", "--model-option", f"measured={other}")
    assert printed.code == 0, printed.err
    assert "the first 21 and last 0 frames" in printed.out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"hop": 40}', "'context'"),
        (("40", '"40"'), "other values than whole numbers"),
        (("40", "1099511627776"), "numbers out of range"),
        (("null", "[[1, 4, 16], 0, 9]"), "its codes have an impossible shape"),
        (("null", "[[-4, 1, 9], 1, 2]"), "its codes have an impossible shape"),
        pytest.param("[" * 200_000, "nested too deeply", id="deep"),
    ],
)
def test_a_measurement_that_is_not_valid(
    tokenizers: Path,
    change: str | tuple[str, str],
    reason: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    repo = written(tokenizers, "vibevoice_acoustic_tokenizer")
    whole = str(resolve(f"hf:{repo}").spec.identity["measured"])
    given = change if isinstance(change, str) else whole.replace(*change)
    assert given != whole
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        resolve(f"hf:{repo}", {"measured": given})
    assert "cannot read the measurements in option measured or in the store" in one_sentence(
        caught.value
    )


@pytest.fixture(scope="module")
def of_tomorrow() -> None:
    import transformers

    from support.other_tokenizer import OtherConfig, OtherModel

    transformers.AutoConfig.register(OtherConfig.model_type, OtherConfig)
    transformers.AutoModel.register(OtherConfig, OtherModel)


def write_other(folder: Path, kind: str) -> Path:
    from support.other_tokenizer import OtherConfig, OtherModel

    torch.manual_seed(0)
    OtherModel(OtherConfig(kind=kind)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("of_tomorrow")
def test_a_type_that_is_not_known_and_whose_neighbours_change_latents(
    tokenizers: Path, tmp_path: Path
) -> None:
    """It is encoded element by element."""
    from support.other_tokenizer import OtherModel

    repo = write_other(tmp_path / "repo", "loudest")
    handle = resolve(f"hf:{repo}")
    assert (handle.spec.hop, handle.spec.latent_channels) == (128, 6)
    assert handle.spec.stitch == "crossfade"
    assert '"one_by_one": true' in str(handle.spec.identity["measured"])
    assert lm.probe(handle).failed == ()
    model, sound = handle.load("cpu"), music(8000, 1, 2560)[None]
    both = model.encode(torch.cat((0.1 * sound, sound)))
    package = OtherModel.from_pretrained(repo).requires_grad_(False)
    wanted = package.encode(0.1 * sound)["latents"].transpose(1, 2)
    assert distance(both[:1], wanted) < 1e-6


@pytest.mark.usefixtures("of_tomorrow")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("noise", "its latents differ from call to call"),
        ("hidden", "it has neither a quantiser nor latents"),
    ],
)
def test_a_tokenizer_without_usable_latents(
    tokenizers: Path,
    tmp_path: Path,
    kind: str,
    reason: str,
    one_sentence: Callable[[BaseException], str],
) -> None:
    repo = write_other(tmp_path / "repo", kind)
    with pytest.raises(ModelError) as caught:
        resolve(f"hf:{repo}")
    assert one_sentence(caught.value) == (
        f"Model hf:{repo}: a model of type tokenizer_of_tomorrow gives no continuous latents that "
        f"can be stored ({reason}): use a model that `latentmill models` lists, or write "
        "python:package.module:factory."
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{}", "no model_type, so it is not a model of transformers"),
        (
            '{"model_type": "of_tomorrow"}',
            "the type 'of_tomorrow', which the installed transformers does not have",
        ),
    ],
)
def test_repositories_that_are_not_of_transformers(
    tmp_path: Path, config: str, reason: str, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError) as caught:
        resolve(f"hf:{tmp_path}")
    assert one_sentence(caught.value) == (
        f"Model hf:{tmp_path}: config.json has {reason}: use a model that `latentmill models` "
        "lists, or write python:package.module:factory."
    )


def test_other_kinds_of_models_and_chunks_of_the_model_s_own(
    tokenizers: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    import transformers

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(**small, intermediate_size=8, vocab_size=10)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="of type bert is not an audio tokenizer") as caught:
        resolve(f"hf:{tmp_path / 'bert'}")
    one_sentence(caught.value)
    native = {**TOKENIZERS["encodec"], "chunk_length_s": 1.0, "overlap": 0.01, "normalize": True}
    torch.manual_seed(0)
    transformers.EncodecModel(transformers.EncodecConfig(**native)).save_pretrained(
        tmp_path / "encodec"
    )
    with pytest.raises(
        ModelError, match=r"of its own\): use encodec:REPO, or a model that"
    ) as caught:
        resolve(f"hf:{tmp_path / 'encodec'}")
    one_sentence(caught.value)
