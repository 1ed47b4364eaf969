"""The recipes of docs/reader.md, run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.store.store import LatentStore
from support.field_stores import write_fields
from support.latent_store import write_latents

PAGE = Path(__file__).parents[2] / "docs" / "reader.md"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> LatentStore:
    monkeypatch.chdir(tmp_path)
    return write_latents(str(tmp_path / "latents"), lengths)


def recipe(word: str) -> str:
    """The code block of the page that has a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (found,) = [code for code in blocks if word in code]
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)  # our own page
    return names


def assert_same(rows: list[dict[str, Any]], store: LatentStore) -> None:
    assert sorted(row["key"] for row in rows) == list(store.keys())
    for row in rows:
        assert np.array_equal(row["latent"], store[row["key"]].latent)


def test_datasets_streams_it(store: LatentStore) -> None:
    pytest.importorskip("datasets")
    code = recipe("ray.data")
    latent = code[code.index("def latent") : code.index("store =")]
    names = run("import numpy as np\n" + latent + recipe("load_dataset"))
    rows = []
    for row in names["rows"]:
        row["latent"] = names["latent"](dict(row))["latent"]
        rows.append(row)
    assert_same(rows, store)
    assert next(iter(names["rows"].map(names["latent"])))["key"] == rows[0]["key"]


@pytest.mark.slow
def test_ray_data_reads_it(store: LatentStore, ray_session: Path) -> None:
    pytest.importorskip("ray.data")
    code = recipe("ray.data").replace("/data/latents", store.url)
    code = re.sub(r"^rows\.select.*$", r"made = \g<0>.take_all()", code, flags=re.MULTILINE)
    assert_same(run(code)["made"], store)


@pytest.mark.slow
def test_ray_train_deals_every_sample_once(
    store: LatentStore, tmp_path: Path, ray_session: Path
) -> None:
    pytest.importorskip("ray.train.torch")
    notes = tmp_path / "notes"
    notes.mkdir()
    code = recipe("TorchTrainer")
    for old, new in [
        ("/shared/latents", store.url),
        ('"epochs": 10', '"epochs": 2'),
        (
            "num_workers=8, use_gpu=True)",
            f"num_workers=2), run_config=ray.train.RunConfig({TRAINED})",
        ),
        ("num_workers=4", "num_workers=1"),
        ("step(batch)", "note(epoch, ray.train.get_context().get_world_rank(), batch['key'])"),
    ]:
        assert old in code
        code = code.replace(old, new.replace("FOLDER", str(tmp_path / "trained")))
    run(f"NOTES = {str(notes)!r}\n{NOTE}\n{code}")
    for epoch in (0, 1):
        ranks = [(notes / f"{epoch}-{rank}").read_text().split() for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1]) == len(store) // 2
        assert set(ranks[0] + ranks[1]) <= set(store.keys())
        assert len(set(ranks[0] + ranks[1])) == 2 * (len(store) // 2)


TRAINED = "storage_path='FOLDER', name='run'"
NOTE = """
import pathlib
def note(epoch, rank, keys):
    with (pathlib.Path(NOTES) / f"{epoch}-{rank}").open("a") as file:
        file.writelines(f"{key}\\n" for key in keys)
"""


def test_a_loader_as_on_the_page(store: LatentStore) -> None:
    code = recipe("s3://bucket/latents")
    code = code.replace("s3://bucket/latents", store.url).replace("num_workers=4", "num_workers=1")
    names = run(code.replace('cache="/nvme/latents"', 'cache="cache"'))
    assert names["batch"]["latents"].shape == (8, 4, 256)


def test_lightning_trains_on_it(store: LatentStore) -> None:
    lightning = pytest.importorskip("lightning")
    import torch

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv1d(4, 4, 1)
            self.seen: dict[int, list[str]] = {}

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            self.seen.setdefault(int(batch["epoch"][0]), []).extend(batch["key"])
            return self.layer(batch["latents"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    dataset = lm.LatentDataset(store, crop=16)
    stream = lm.LatentStream(store, crop=16, batch_size=8)
    for loader in (
        DataLoader(dataset, batch_sampler=lm.BatchSampler(dataset, 8), collate_fn=lm.collate),
        DataLoader(
            stream, batch_size=8, collate_fn=lm.collate, num_workers=1, persistent_workers=True
        ),
    ):
        model = Model()
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(model, loader)
        assert sorted(model.seen) == [0, 1, 2]
        assert all(sorted(keys) == list(store.keys()) for keys in model.seen.values())


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("kind", ["loader", "batches"])
def test_lightning_resumes(tmp_path: Path, kind: str, steps: int) -> None:
    """After a crash, from a checkpoint within the first epoch or at its end."""
    lightning = pytest.importorskip("lightning")
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    store = write_latents(str(tmp_path / "store"), [40] * 20)
    written = ModelCheckpoint(tmp_path, "after", every_n_train_steps=steps, save_top_k=-1)

    class Model(lightning.LightningModule):
        def __init__(self, crash_after: int = 1000) -> None:
            super().__init__()
            self.layer = torch.nn.Conv1d(4, 4, 1)
            self.crash_after = crash_after
            dataset = lm.LatentDataset(store, crop=8)
            self.batches = lm.BatchSampler(dataset, 2)
            self.loader: Any = lm.Loader(self.batches, workers=0)
            if kind == "batches":
                self.loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=lm.collate)
            self.seen: list[tuple[int, int, str]] = []

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            if self.trainer.global_step == self.crash_after:
                raise RuntimeError("crash")
            epochs = [self.current_epoch] * len(batch["key"])
            self.seen += zip(epochs, batch["epoch"], batch["key"], strict=True)
            self.last = {name: batch[name] for name in ("epoch", "position")}
            return self.layer(batch["latents"]).square().mean()

        def validation_step(self, batch: dict[str, Any], index: int) -> None:
            self.validated = batch["key"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["data"] = self.batches.state_after(self.last)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if kind == "batches":  # a Loader's state is saved by Lightning
                self.batches.load_state_dict(checkpoint["data"])

        def fit(self, **options: Any) -> None:
            trainer = lightning.Trainer(
                max_epochs=3,
                accelerator="cpu",
                logger=False,
                callbacks=[written],
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            with lm.Loader(lm.LatentDataset(store, crop=8), 2, workers=0) as validation:
                trainer.fit(self, self.loader, validation, **options)

    first = Model(crash_after=steps + 2)
    with pytest.raises(RuntimeError, match="crash"):
        first.fit()
    (path,) = tmp_path.glob("*.ckpt")
    resumed = Model()
    resumed.fit(ckpt_path=str(path))
    seen, keys = first.seen[: 2 * steps] + resumed.seen, list(store.keys())
    assert sorted(seen) == [(epoch, epoch, key) for epoch in range(3) for key in keys]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batches", "living", "told"])
def test_lightning_trains_with_two_processes(tmp_path: Path, kind: str) -> None:
    """With streams whose workers live on, and whose workers are new in every epoch and are told."""
    pytest.importorskip("lightning")
    store = write_latents(str(tmp_path / "store"), [500] * 40)
    script = Path(__file__).with_name("lightning_script.py")
    command = [sys.executable, str(script), store.url, str(tmp_path), kind]
    run_ = subprocess.run(command, timeout=280, capture_output=True, text=True, check=False)
    assert run_.returncode == 0, run_.stderr
    assert "RepeatedEpochWarning" not in run_.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    epochs: list[dict[str, float]] = []
    for epoch in range(3):
        read = [key for rank in ranks for key, _ in rank[epoch]]
        assert sorted(read) == list(store.keys())
        epochs.append({key: start for rank in ranks for key, start in rank[epoch]})
    for epoch in (1, 2):
        assert sum(epochs[0][key] == epochs[epoch][key] for key in epochs[0]) < 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "batches"])
def test_ray_prepares_a_loader(
    store: LatentStore, tmp_path: Path, ray_session: Path, kind: str
) -> None:
    train = pytest.importorskip("ray.train.torch")
    import ray.train

    notes = tmp_path / "notes"
    notes.mkdir()
    url = store.url

    def loop() -> None:
        import ray.train.torch
        from torch.utils.data import DataLoader

        import latentmill as lm

        if kind == "stream":
            reader: Any = lm.LatentStream(url, crop=16, batch_size=4)
            loader = DataLoader(reader, batch_size=4, collate_fn=lm.collate)
            loader = ray.train.torch.prepare_data_loader(loader)
        else:
            dataset = lm.LatentDataset(url, crop=16)
            reader = lm.BatchSampler(dataset, 4)
            loader = DataLoader(dataset, batch_sampler=reader, collate_fn=lm.collate)
            loader = ray.train.torch.prepare_data_loader(loader, add_dist_sampler=False)
        rank = ray.train.get_context().get_world_rank()
        for epoch in (0, 1):
            reader.set_epoch(epoch)
            keys = [key for batch in loader for key in batch["key"]]
            (notes / f"{epoch}-{rank}").write_text(" ".join(keys))

    train.TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "trained"), name="run"),
    ).fit()
    for epoch in (0, 1):
        keys = [key for rank in (0, 1) for key in (notes / f"{epoch}-{rank}").read_text().split()]
        assert sorted(keys) == list(store.keys())


def test_fields_as_on_the_page(store: LatentStore, lengths: list[int]) -> None:
    write_fields(store, lengths)
    code = recipe("lm.Drop").replace('"dac"', '"fine"').replace("album/song", "item/00000")
    names = run("import latentmill as lm\n" + code)
    (values, mask), batch = (names["text"], names["mask"]), names["batch"]
    assert values.shape[:2] == mask.shape
    assert batch["fields"]["fine"].values.shape[::2] == (*batch["latents"].shape[:1], 1189)
