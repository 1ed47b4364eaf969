"""Training of one of two processes under Lightning: run by test_recipes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import latentmill as lm

URL, NOTES, KIND = sys.argv[1:]
EPOCHS = 3


class Model(lightning.LightningModule):
    def __init__(self, stream: lm.LatentStream | None) -> None:
        super().__init__()
        self.layer = torch.nn.Conv1d(4, 4, 1)
        self.stream = stream
        self.seen: list[list[list[Any]]] = [[] for _ in range(EPOCHS)]

    def on_train_epoch_start(self) -> None:
        if self.stream is not None:
            self.stream.set_epoch(self.current_epoch)

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        starts = [one["seconds_start"] for one in batch["metadata"]]
        self.seen[self.current_epoch] += map(list, zip(batch["key"], starts, strict=True))
        return self.layer(batch["latents"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def main() -> None:
    told = None
    if KIND == "batches":
        dataset = lm.LatentDataset(URL, crop=8)
        sampler = lm.BatchSampler(dataset, 4, even="drop")
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=lm.collate)
    else:
        stream = lm.LatentStream(URL, crop=8, batch_size=4, even="drop")
        told = None if KIND == "living" else stream
        loader = DataLoader(
            stream,
            batch_size=4,
            num_workers=1,
            collate_fn=lm.collate,
            persistent_workers=KIND == "living",
        )
    model = Model(told)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader)
    Path(NOTES, f"{trainer.global_rank}.json").write_text(json.dumps(model.seen))


if __name__ == "__main__":
    main()
