"""`t5:`, `clap:` and `text:`: equal to the package's own calls, from files alone."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmill.errors import ModelError
from latentmill.models.registry import resolve_embedder
from support.hub import serve
from support.linear_cae_weights import use_cache
from support.tiny_encoders import LETTERS, write_t5

PIPELINE = Path(__file__).parents[3] / "pipeline"
COMMIT = "ab" * 20
TEXTS = ["solo piano, slowly", "", "drums"]


def embed(name: str, texts: list[str], **options: Any) -> list[Any]:
    return resolve_embedder(name, options).load("cpu").embed(texts)


def own(name: str, folder: Path, text: str, **tokenizing: Any) -> Any:
    """`[D, n]` by transformers alone, as its documentation calls the model for one text."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        text, return_tensors="pt", **tokenizing
    )
    with torch.inference_mode():
        if name == "clap":
            model = transformers.ClapModel.from_pretrained(folder).eval()
            return model.get_text_features(**tokens).pooler_output.T.numpy()
        classes = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
        kind = getattr(transformers, classes.get(folder.name, "AutoModel"))
        model = kind.from_pretrained(folder).eval()
        return model(**tokens).last_hidden_state[0].T.numpy()


@pytest.mark.parametrize(
    ("family", "repo", "texts"),
    [
        ("t5", "t5", TEXTS),
        ("t5", "umt5", TEXTS),
        ("text", "t5", TEXTS),
        ("text", "bert", TEXTS),
        ("text", "gpt", [*TEXTS[:1], *TEXTS[2:]]),
        ("clap", "clap", TEXTS),
    ],
)
def test_equal_to_the_package(encoders: Path, family: str, repo: str, texts: list[str]) -> None:
    arrays = embed(f"{family}:{encoders / repo}", texts)
    for text, array in zip(texts, arrays, strict=True):
        expected = own(family, encoders / repo, text)
        assert array.shape == expected.shape
        np.testing.assert_allclose(array, expected, atol=2e-6)
    if family == "clap":
        assert np.linalg.norm(arrays[0]) == pytest.approx(1, abs=1e-5)


def test_the_mean_is_that_of_the_tokens(encoders: Path) -> None:
    (mean,) = embed(f"text:{encoders / 'bert'}", ["piano"], pool="mean")
    expected = own("text", encoders / "bert", "piano").mean(1, keepdims=True)
    np.testing.assert_allclose(mean, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("repo", "options", "longest"),
    [("t5", {"max_tokens": 5}, 5), ("bert", {}, 20), ("bert", {"max_tokens": 7}, 7)],
)
def test_long_texts_are_truncated_with_a_warning(
    encoders: Path, caplog: pytest.LogCaptureFixture, repo: str, options: Any, longest: int
) -> None:
    text = "a long text " * 9
    with caplog.at_level(logging.WARNING, logger="latentmill"):
        long, short = embed(f"text:{encoders / repo}", [text, "a"], **options)
    assert long.shape[1] == longest
    assert short.shape[1] < longest
    expected = own("text", encoders / repo, text, truncation=True, max_length=longest)
    np.testing.assert_allclose(long, expected, atol=2e-6)
    assert f"the end is left out of 1 text with more than {longest} tokens" in caplog.text


def edited(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy of a repository with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    document = json.loads((target / name).read_text())
    for key, value in values.items():
        if isinstance(value, dict) and key in document:
            document[key] |= value
        else:
            document[key] = value
    (target / name).write_text(json.dumps(document))
    return target


@pytest.mark.parametrize(
    ("family", "repo", "longest"),
    [
        ("text", "bert", 20),
        ("text", "gpt", 64),
        ("clap", "clap", 40),  # 42 positions, of which RoBERTa does not use two
    ],
)
def test_no_text_is_longer_than_the_positions_of_the_model(
    encoders: Path, tmp_path: Path, family: str, repo: str, longest: int
) -> None:
    name = "tokenizer_config.json"
    folder = edited(encoders / repo, tmp_path / repo, name, model_max_length=10**30)
    text = "piano " * 60
    (array,) = embed(f"{family}:{folder}", [text])
    expected = own(family, encoders / repo, text, truncation=True, max_length=longest)
    np.testing.assert_allclose(array, expected, atol=2e-6)
    with pytest.raises(ModelError, match=f"positions for {longest} tokens.*use at most {longest}"):
        embed(f"{family}:{folder}", [text], max_tokens=longest + 1)


def test_t5_takes_more_tokens_than_its_tokenizer_says(encoders: Path, tmp_path: Path) -> None:
    folder = edited(encoders / "t5", tmp_path / "t5", "tokenizer_config.json", model_max_length=8)
    text = "piano " * 60
    assert embed(f"t5:{folder}", [text])[0].shape[1] == 8
    (array,) = embed(f"t5:{folder}", [text], max_tokens=30)
    expected = own("t5", encoders / "t5", text, truncation=True, max_length=30)
    assert array.shape[1] == 30
    np.testing.assert_allclose(array, expected, atol=2e-6)


def test_a_maximum_below_the_special_tokens_is_an_error(encoders: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be truncated to 1 token.*larger max_tokens"):
        embed(f"text:{encoders / 'bert'}", ["piano"], max_tokens=1)


@pytest.mark.parametrize(
    ("repo", "values"),
    [
        ("bert", {"attn_implementation": "flash_attention_2"}),
        ("bert", {"attn_implementation": "owner/kernel"}),
        ("bert", {"_attn_implementation": "owner/kernel"}),
        ("bert", {"_attn_implementation_internal": "owner/kernel"}),
        ("clap", {"text_config": {"_attn_implementation": "owner/kernel"}}),
    ],
)
def test_a_repository_does_not_choose_the_implementation(
    encoders: Path, tmp_path: Path, repo: str, values: Any
) -> None:
    folder = edited(encoders / repo, tmp_path / repo, "config.json", **values)
    family = "clap" if repo == "clap" else "text"
    (array,) = embed(f"{family}:{folder}", ["piano"])
    np.testing.assert_array_equal(array, embed(f"{family}:{encoders / repo}", ["piano"])[0])


@pytest.mark.parametrize("method", ["bitsandbytes", "unheard"])
def test_quantised_weights_are_refused(encoders: Path, tmp_path: Path, method: str) -> None:
    quantised = {"quant_method": method, "load_in_4bit": True}
    folder = encoders / "bert"
    folder = edited(folder, tmp_path / "bert", "config.json", quantization_config=quantised)
    with pytest.raises(ModelError, match="has quantised weights: use a repository"):
        embed(f"text:{folder}", ["piano"])


def test_weights_in_several_files(encoders: Path, tmp_path: Path) -> None:
    write_t5(tmp_path / "t5", max_shard_size="8KB")
    parts = sorted(path.name for path in (tmp_path / "t5").glob("model-*.safetensors"))
    assert len(parts) > 2
    handle = resolve_embedder(f"t5:{tmp_path / 't5'}")
    assert {f"sha256_weights_{n}" for n in range(1, len(parts) + 1)} <= set(handle.spec.identity)
    (array,) = handle.load("cpu").embed(["drums"])
    np.testing.assert_array_equal(array, embed(f"t5:{encoders / 't5'}", ["drums"])[0])
    (tmp_path / "t5" / parts[1]).unlink()
    with pytest.raises(ModelError, match=parts[1]):
        resolve_embedder(f"t5:{tmp_path / 't5'}")


def test_the_folders_of_a_diffusion_pipeline(encoders: Path, tmp_path: Path) -> None:
    for folder, names in {
        "text_encoder": ("config.json", "model.safetensors"),
        "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(encoders / "umt5" / name, tmp_path / folder / name)
    (array,) = embed(f"t5:{tmp_path}", ["drums"])
    np.testing.assert_array_equal(array, embed(f"t5:{encoders / 'umt5'}", ["drums"])[0])


def test_a_tokenizer_of_sentencepiece(encoders: Path, tmp_path: Path) -> None:
    """google/t5-v1_1-xxl has spiece.model and no tokenizer.json."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    model = proto.ModelProto()
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.pad_id, model.trainer_spec.eos_id = 2, 0, 1
    model.normalizer_spec.name = "identity"
    bar = "\N{LOWER ONE EIGHTH BLOCK}"
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    scored = [*((name, 0.0) for name in kinds)]
    scored += [(p, -2.0 - n / 8) for n, p in enumerate([bar, f"{bar}piano", "drum", "ing", "s"])]
    scored += [(letter, -2.0 - n / 8) for n, letter in enumerate(LETTERS, 5)]
    for piece, score in scored:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    folder = shutil.copytree(encoders / "t5", tmp_path / "t5")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(ModelError, match="run `pip install sentencepiece protobuf`"):
            resolve_embedder(f"t5:{folder}")
        pytest.skip("the package sentencepiece is not installed")
    for text in ("solo piano, drumming", ""):
        (array,) = embed(f"t5:{folder}", [text])
        np.testing.assert_array_equal(array, embed(f"t5:{encoders / 't5'}", [text])[0])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_repository_runs(encoders: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(encoders / "bert", tmp_path / "bert")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    document = json.loads((folder / name).read_text())
    document["auto_map"] = dict.fromkeys(("transformers.AutoModel", "AutoConfig"), "evil.Evil")
    document["auto_map"]["transformers.AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    if name == "tokenizer_config.json":
        document["tokenizer_class"] = "Evil"
    (folder / name).write_text(json.dumps(document))
    try:
        (array,) = embed(f"text:{folder}", ["piano"])
        expected = own("text", encoders / "bert", "piano")
        np.testing.assert_allclose(array, expected, atol=2e-6)
    except ModelError as error:
        assert name in str(error) or "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_wrong_repositories(encoders: Path, tiny_repos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it belongs to bert"):
        resolve_embedder(f"t5:{encoders / 'bert'}")
    with pytest.raises(ModelError, match=r"it belongs to t5"):
        resolve_embedder(f"clap:{encoders / 't5'}")
    with pytest.raises(ModelError, match=r"tokenizer\.json or spiece\.model"):
        resolve_embedder(f"text:{tiny_repos / 'encodec-24k'}")
    with pytest.raises(ModelError, match="max_tokens must be positive, not 0"):
        resolve_embedder(f"t5:{encoders / 't5'}", {"max_tokens": 0})
    folder = shutil.copytree(encoders / "t5", tmp_path / "t5")
    state = load_file(folder / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors are missing .*final_layer_norm"):
        resolve_embedder(f"t5:{folder}").load("cpu")


@pytest.mark.slow  # tests/models/test_weights.py has the same for an autoencoder
def test_downloads_from_the_hub_then_works_offline(
    encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that a repository does not have are asked for once.

    The download is in a process of its own: huggingface_hub reads its variables at import.
    """
    script = (
        "import sys\n"
        "from latentmill.models.registry import resolve_embedder\n"
        "handle = resolve_embedder('t5:owner/model')\n"
        "handle.load('cpu')\n"
        "print(sorted(handle.files.names))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(PIPELINE)}
    with serve(encoders / "t5", "owner/model", COMMIT) as hub:
        env |= {"HF_ENDPOINT": hub.endpoint}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
    assert run.stdout == "['config', 'tokenizer', 'tokenizer_config', 'weights']\n"
    use_cache(monkeypatch, tmp_path)
    handle = resolve_embedder("t5:owner/model")
    handle.load("cpu")
    assert str(sorted(handle.files.names)) == run.stdout.strip()  # type: ignore[attr-defined]
    asked = [request for request in hub.requests if "added_tokens" in request]
    assert len(asked) == 2  # whether the hub answers, and what the file is
