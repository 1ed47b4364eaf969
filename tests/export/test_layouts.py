"""The files of LTX-2's and ACE-Step's trainers, with fields."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import latentmill as lm
from latentmill.errors import ConfigError, StoreError
from latentmill.export.export import LAYOUTS, ExportSummary, Target, export_store
from latentmill.export.layout import caption_of
from latentmill.plan import FieldEntry
from latentmill.store.store import LatentStore
from support import runs
from support.latent_store import write_again, write_latents
from support.rounds import shard_rounds

LENGTHS = [5, 9, 3, 7]
# Multiples of 128, for which a row of padding is stored, and the longest that LTX-2 takes.
TOKENS = [4, 128, 1, 1024]
MODELS: dict[str, dict[str, Any]] = {
    "ltx2": {"name": "ltx2", "sample_rate": 16000, "hop": 640},
    "ace-step": {"name": "oobleck", "sample_rate": 48000, "hop": 1920},
}
KEYS = {"ltx2": "latent_items", "ace-step": "album/silence"}


def random_arrays(channels: int, lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(channels)
    return [random.standard_normal((channels, n)).astype(np.float16) for n in lengths]


def write_field(
    store: LatentStore, name: str, kind: Any, arrays: list[np.ndarray], **options: Any
) -> None:
    write_latents(
        f"{store.url}/fields/{name}",
        [array.shape[1] for array in arrays],
        channels=len(arrays[0]),
        latents=arrays,
        field=FieldEntry(name, kind, "audio"),
        prefix=store.index.key(0).rpartition("/")[0],
        **options,
    )


@pytest.fixture(scope="module", params=MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with latents of the autoencoder of a trainer, and fields; leave it unchanged."""
    target = request.param
    folder = tmp_path_factory.mktemp(target) / target
    metadata = [{"caption": f"caption {n}", "bpm": 120, "lyrics": "la"} for n in range(4)]
    store = write_latents(
        str(folder),
        LENGTHS,
        channels=64,
        per_unit=2,
        prefix=KEYS[target],
        metadata=[*metadata[:3], {}],
        latents=random_arrays(64, LENGTHS),
        model=MODELS[target],
    )
    write_field(store, "text", "tokens", random_arrays(6, TOKENS))
    write_field(store, "other", "tokens", random_arrays(3, TOKENS), failed=(2,))
    write_field(store, "longer", "tokens", random_arrays(6, [5, 6, 7, 1025]))
    write_field(store, "mask", "frames", [np.ones((1, n), np.float16) for n in LENGTHS])
    write_field(store, "hints", "frames", random_arrays(64, LENGTHS))
    write_field(store, "short", "frames", random_arrays(64, [n - 1 for n in LENGTHS]))
    return folder


@pytest.fixture
def store(written: Path, tmp_path: Path) -> LatentStore:
    return LatentStore(str(shutil.copytree(written, tmp_path / written.name)))


def exported(store: LatentStore, *fields: str, to: Target | None = None) -> ExportSummary:
    target = to or Target(Path(store.url).name)
    return export_store(store, f"{Path(store.url).parent}/out", target, fields=fields)


def loaded(folder: str | Path, key: str, target: Target = Target.LTX2) -> Any:
    return torch.load(Path(folder) / f"{LAYOUTS[target].name(key)}.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an export, by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


only_ltx2 = pytest.mark.parametrize("written", ["ltx2"], indirect=True)
only_ace = pytest.mark.parametrize("written", ["ace-step"], indirect=True)


@only_ltx2
def test_folders_of_ltx2(store: LatentStore) -> None:
    summary = exported(store, "text", "mask")
    assert (summary.records, summary.escaped, summary.failures) == (4, 0, ())
    out = Path(summary.dest)
    assert {path.name for path in out.iterdir()} == {
        "audio_latents",
        "conditions",
        "audio_masks",
        "details.json",
    }
    for record, count in zip(store, TOKENS, strict=True):
        latent = loaded(out / "audio_latents", record.key)
        assert latent["latents"].dtype == torch.float32
        assert latent["latents"].shape == (8, record.frames, 8)
        tokens = latent["latents"].permute(1, 0, 2).flatten(1)  # as its AudioPatchifier does
        assert np.array_equal(tokens.numpy(), record.latent.T.astype(np.float32))
        assert (latent["num_time_steps"], latent["frequency_bins"]) == (record.frames, 8)
        assert latent["duration"] == record.duration
        mask = loaded(out / "audio_masks", record.key)["mask"]
        assert torch.equal(mask, torch.ones(record.frames))
        condition = loaded(out / "conditions", record.key)
        embedded, mask = condition["prompt_embeds"], condition["prompt_attention_mask"]
        assert (embedded.dtype, mask.dtype) == (torch.bfloat16, torch.int64)
        assert mask.tolist() == [0] * (count == 128) + [1] * count
        wanted = torch.from_numpy(store.field("text")[record.key].latent.T.copy()).bfloat16()
        assert torch.equal(embedded[-count:], wanted)
        assert not embedded[:-count].any()


def test_damaged_records_do_not_stop_the_others(store: LatentStore) -> None:
    """An earlier export of them stays; they are exported when their shards are restored."""
    keys = list(store.keys())
    whole = exported(store, "text")
    assert whole.records == 4
    earlier = contents(Path(whole.dest))
    field = store.field("text")
    shard = Path(store.storage.full(store.entry(keys[2]).shard))
    saved, damaged = shard.read_bytes(), Path(field.storage.full(field.entry(keys[0]).shard))
    saved_field = damaged.read_bytes()
    shard.unlink()
    runs.damage(field, keys[0])
    for dest in (whole.dest, f"{whole.dest}-new"):
        summary = export_store(store, dest, Target(whole.to), fields=["text"])
        failures = dict(summary.failures)
        assert list(failures) == [keys[0], *keys[2:]]
        assert f"is damaged at record {keys[0]}" in failures[keys[0]]
        assert str(shard) in failures[keys[2]]
        assert summary.records == 1
        new = contents(Path(dest))
        assert new == {path: earlier[path] for path in new}
    assert set(contents(Path(whole.dest))) == set(earlier)
    assert len(new) < len(earlier)
    shard.write_bytes(saved)
    damaged.write_bytes(saved_field)
    assert export_store(store, dest, Target(whole.to), fields=["text"]).failures == ()
    assert contents(Path(dest)) == earlier


@only_ltx2
def test_captions_of_both_modalities(store: LatentStore) -> None:
    fields = ("video_prompt_embeds=text", "audio_prompt_embeds=other")
    summary = exported(store, *fields)
    missing = f"{KEYS['ltx2']}/00002"
    assert summary.failures == ((missing, "field 'other' has no value for it"),)
    assert summary.records == 3
    condition = loaded(Path(summary.dest) / "conditions", f"{KEYS['ltx2']}/00000")
    assert condition["video_prompt_embeds"].shape == (4, 6)
    assert condition["audio_prompt_embeds"].shape == (4, 3)
    assert not list(Path(summary.dest).rglob("00002.pt"))


@only_ltx2
def test_what_ltx2_cannot_read(store: LatentStore, caplog: pytest.LogCaptureFixture) -> None:
    summary = exported(store, "longer")
    last = f"{KEYS['ltx2']}/00003"
    assert summary.failures == ((last, "its caption has 1025 tokens: LTX-2 takes 1 to 1024"),)
    for fields, problem in {
        ("hints=text",): "invalid --fields 'hints=text': the field has tokens, and --to ltx2 takes",
        ("text", "mask", "hints"): "invalid --fields 'hints'",
        ("text", "prompt_embeds=other"): "prompt_embeds twice",
        ("audio_prompt_embeds=text",): "LTX-2 takes prompt_embeds for both modalities",
        ("text",): "is an export with prompt_embeds=longer: use",
    }.items():
        if fields == ("text",):
            fields = ("mask",)  # noqa: PLW2901
        assert problem in refusal(lambda fields=fields: exported(store, *fields))
    with pytest.raises(StoreError, match="has no field 'none'"):
        exported(store, "none")
    export_store(store, f"{store.url}-x", Target.LTX2)
    assert "the export does not include its fields" in caplog.text
    # The made-up values were computed from nothing that the store has.
    assert "field text is out of date for 4 items, whose old values are exported" in caplog.text


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_stores_of_other_autoencoders_are_refused(store: LatentStore, tmp_path: Path) -> None:
    other = Target.ACE_STEP if store.url.endswith("ltx2") else Target.LTX2
    text = "64 channels at 25 frames/s, but ACE-Step" if other == "ltx2" else "latents of oobleck"
    small = write_latents(str(tmp_path / "small"), [3], channels=12, model={"name": "ltx2"})
    if other == Target.LTX2:
        assert text.replace("64 channels at 25 frames/s, but ACE-Step", "latents of oobleck") in (
            refusal(lambda: exported(store, to=other))
        )
    assert "multiple of 8" in refusal(lambda: exported(small, to=Target.LTX2))
    write_field(small, "text", "tokens", random_arrays(6, [2]))
    assert "has 12 channels" in refusal(lambda: exported(small, "text", to=Target.ACE_STEP))
    assert "cannot contain fields" in refusal(lambda: exported(small, "text", to=Target.PARQUET))


@only_ace
@pytest.mark.parametrize("hints", [False, True])
def test_files_of_ace_step(store: LatentStore, hints: bool) -> None:
    summary = exported(store, "text", *["hints"] * hints)
    assert (summary.records, summary.escaped, summary.failures) == (4, 4, ())
    names = {path.name for path in Path(summary.dest).iterdir()}
    expected = {f"album%2Fsilence%2F{number:05d}.pt" for number in range(4)}
    assert names == {*expected, "details.json"}
    for record in store:
        sample = loaded(summary.dest, record.key, Target.ACE_STEP)
        field = store.field("text")[record.key].latent
        context = (
            store.field("hints")[record.key].latent.astype(np.float32)
            if hints
            else store.origin.of_length(record.frames)
        )
        ones = np.ones((64, record.frames), np.float32)
        arrays = {
            "target_latents": record.latent.T,
            "attention_mask": np.ones(record.frames),
            "encoder_hidden_states": field.T,
            "encoder_attention_mask": np.ones(field.shape[1]),
            "context_latents": np.concatenate((context, ones)).T,
        }
        assert set(sample) == {*arrays, "metadata"}
        for name, wanted in arrays.items():
            assert sample[name].dtype == torch.float32
            assert np.array_equal(sample[name].numpy(), wanted.astype(np.float32)), name
        assert sample["metadata"]["filename"] == record.key
        assert sample["metadata"]["caption"] == record.metadata.get("caption", "")
        assert sample["metadata"]["lyrics"] == record.metadata.get("lyrics", "[Instrumental]")


@pytest.mark.parametrize(
    ("metadata", "caption"),
    [
        ({"prompt": "rain", "caption": "a dog barks"}, "rain"),
        (
            {"caption": ["a dog barks", "barking dog"], "title": "track 7"},
            "a dog barks, barking dog",
        ),
        ({"prompt": ["jazz"], "text": "a song"}, "jazz"),
        ({"prompt": [], "text": "a song"}, "a song"),
        ({"prompt": ["jazz", 5], "caption": {"en": "rain"}, "text": True, "title": "song"}, "song"),
        ({"prompt": None, "title": 1999}, "1999"),
        ({"genre": "jazz"}, ""),
    ],
)
def test_the_caption_is_the_first_text(metadata: dict[str, Any], caption: str) -> None:
    assert caption_of(metadata) == caption


def test_a_list_of_captions_is_one_prompt(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "store"), [5], metadata=[{"prompt": ["rain", "wind"]}])
    out = Path(exported(store, to=Target.STABLE_AUDIO_TOOLS).dest)
    (name,) = (path for path in out.rglob("*.npy") if path.name != "silence.npy")
    assert json.loads(name.with_suffix(".json").read_text())["prompt"] == "rain, wind"


@only_ace
def test_what_ace_step_cannot_read(store: LatentStore) -> None:
    assert "needs a field with tokens" in refusal(lambda: exported(store))
    summary = exported(store, "text", "short")
    assert summary.records == 0
    assert summary.failures[0] == (
        f"{KEYS['ace-step']}/00000",
        "its context has 4 frames, the latent 5",
    )


def test_a_second_export_is_brought_up_to_date(store: LatentStore) -> None:
    target = Target(Path(store.url).name)
    out = Path(exported(store, "text").dest)
    first = {path: path.read_bytes() for path in out.rglob("*.pt")}
    latents = random_arrays(64, LENGTHS)
    latents[1] = latents[1] + np.float16(1)
    write_again(store.url, [0, 1], latents, failed=(2,))
    texts = random_arrays(6, TOKENS)
    write_again(f"{store.url}/fields/text", [0], [texts[0], texts[1] + np.float16(1), *texts[2:]])
    store.reload()
    damaged = max(first)
    damaged.write_bytes(b"PK")
    times = {path: path.stat().st_mtime_ns for path in first}
    assert exported(store, "text").records == 3
    fresh = Path(export_store(store, f"{store.url}-fresh", target, fields=["text"]).dest)
    found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.pt")}
    assert found == {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*.pt")}
    kept = [path for path in first if path.exists() and path.read_bytes() == first[path]]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept if path != damaged)


@only_ltx2
def test_an_export_keeps_its_fields(store: LatentStore, tmp_path: Path) -> None:
    out = Path(exported(store, "text").dest)
    before = contents(out)
    text = refusal(lambda: exported(store, "longer"))
    assert "is an export with prompt_embeds=text: use the same --fields" in text
    assert contents(out) == before
    moved = shutil.move(store.url, tmp_path / "moved")
    assert export_store(LatentStore(str(moved)), str(out), Target.LTX2, fields=["text"]).records


@only_ltx2
def test_records_of_a_view(store: LatentStore, tmp_path: Path) -> None:
    """Without a copy; what the view leaves out later is removed."""
    view, whole = str(tmp_path / "view"), Path(exported(store, "text").dest)
    for kept in ([0, 1, 3], [1, 2, 3]):
        keys = [f"{KEYS['ltx2']}/{number:05d}" for number in kept]
        lm.select(store.url, view, keys=keys, overwrite=True)
        out = tmp_path / "selected"
        summary = export_store(LatentStore(view), str(out), Target.LTX2, fields=["text"])
        assert (summary.records, summary.failures) == (3, ())
        found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.pt")}
        assert found == {
            path.relative_to(whole): path.read_bytes()
            for path in whole.rglob("*.pt")
            if int(path.stem) in kept
        }
    with pytest.raises(StoreError, match="is a view, which has no latents of its own"):
        export_store(LatentStore(view), str(tmp_path / "x"), Target.PARQUET)


@given(st.text(st.sampled_from("a./%é \t\n"), min_size=1, max_size=12))
@example("latent_1")
@example("album/latent_1")
@example("..")
@example("a//b/.hidden/")
def test_names_can_be_turned_back(key: str) -> None:
    for layout in LAYOUTS.values():
        name = layout.name(key)
        assert unquote(name) == key
        assert all(part and not part.startswith(".") for part in name.split("/"))
    assert not LAYOUTS[Target.LTX2].name(key).rpartition("/")[2].startswith("latent_")
    assert "/" not in LAYOUTS[Target.ACE_STEP].name(key)


@only_ace
def test_the_command(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{store.url}-out"
    result = runs.call(
        capsys,
        "export",
        store.url,
        out,
        "--to",
        "ace-step",
        "--fields",
        "text, context_latents=hints",
    )
    assert result.code == 0, result.err
    assert result.out == (
        f"{out}: 4 records for ace-step\n"
        "4 file names with escaped characters (%XX), because the reader would skip or misread "
        "them\n"
    )
    details = json.loads(Path(out, "details.json").read_text())
    assert details["fields"] == {
        "encoder_hidden_states": f"{store.url}/fields/text",
        "context_latents": f"{store.url}/fields/hints",
    }


@pytest.fixture
def ace_step_reader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of ACE-Step that reads tensor files.

    `pip install --no-deps --target FOLDER ace-step15-fork` and `PYTHONPATH=FOLDER` let this run.
    The module needs loguru and torchaudio for messages and audio files only.
    """
    if importlib.util.find_spec("acestep") is None:
        pytest.skip("needs acestep (pip install --no-deps ace-step15-fork)")
    for name in ("loguru", "torchaudio"):
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.logger = logging.getLogger("acestep")  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
    folder = importlib.util.find_spec("acestep").submodule_search_locations[0]
    for name in ("acestep", "acestep.training"):  # their own __init__ imports all models
        package = types.ModuleType(name)
        package.__path__ = [folder if name == "acestep" else f"{folder}/training"]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("acestep.training.data_module")
    for name in [name for name in sys.modules if name.startswith("acestep")]:
        monkeypatch.delitem(sys.modules, name)


@only_ace
def test_ace_step_reads_them(store: LatentStore, ace_step_reader: Any) -> None:
    summary = exported(store, "text")
    dataset = ace_step_reader.PreprocessedTensorDataset(summary.dest)
    assert len(dataset) == len(store)
    samples = [dataset[number] for number in range(len(dataset))]
    for sample in samples:
        record = store[sample["metadata"]["filename"]]
        assert np.array_equal(sample["target_latents"].numpy(), record.latent.T.astype(np.float32))
    batch = ace_step_reader.collate_preprocessed_batch(samples)
    assert batch["target_latents"].shape == (4, max(LENGTHS), 64)
    assert batch["context_latents"].shape == (4, max(LENGTHS), 128)
    assert batch["encoder_hidden_states"].shape == (4, max(TOKENS), 6)


def test_fields_in_a_bucket_are_read_in_a_few_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, count = f"memory://{uuid.uuid4().hex}", 60
    store = write_latents(
        url, [4] * count, channels=64, per_unit=30, prefix=KEYS["ltx2"], model=MODELS["ltx2"]
    )
    texts = random_arrays(6, [5] * count)
    write_field(store, "text", "tokens", texts, failed=(7,), per_unit=30)
    rounds = shard_rounds(monkeypatch, f"{url}/fields/text")
    summary = export_store(store, str(tmp_path / "out"), Target.LTX2, fields=["text"])
    missing = f"{KEYS['ltx2']}/00007"
    assert summary.failures == ((missing, "field 'text' has no value for it"),)
    for number, text in enumerate(texts):
        if number != 7:
            found = loaded(tmp_path / "out/conditions", f"{KEYS['ltx2']}/{number:05d}")
            assert torch.equal(found["prompt_embeds"], torch.from_numpy(text.T.copy()).bfloat16())
    assert 0 < len(rounds) <= count / 4
