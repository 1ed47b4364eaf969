"""The ways to store and read latents that `reader.py` compares, each in its best configuration.

Each stores the same latents `[frames, 64]`, float16, frame by frame, so that a crop in time is one
byte range for the formats that support it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

CHANNELS = 64
CROP = 256
BATCH = 32
Latent = np.ndarray[Any, np.dtype[np.float16]]  # [frames, CHANNELS]


class Contender(Protocol):
    """A format with its reader. `open` does everything needed before the first sample."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None: ...

    def open(self, folder: Path) -> None: ...

    def crops(self, items: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """Read crops as float32 `[items, CROP, CHANNELS]`."""
        ...

    def sequential(self) -> Iterator[torch.Tensor]:
        """Read all items in stored order, as float32 `[frames, CHANNELS]`."""
        ...

    def loader(self, workers: int) -> DataLoader[Any]:
        """Return a loader of shuffled batches of BATCH crops at random positions."""
        ...


def shard_items(latents: Sequence[Latent]) -> int:
    return max(1, min(200, len(latents) // 4))


def floats(crops: Sequence[Latent]) -> torch.Tensor:
    return torch.from_numpy(np.stack(crops)).float()


class Crops(Dataset[torch.Tensor]):
    """Random crops of a contender's items, read batch by batch."""

    def __init__(self, contender: Contender, frames: Sequence[int]) -> None:
        self.contender, self.frames = contender, frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitems__(self, items: list[int]) -> torch.Tensor:
        starts = [int(torch.randint(self.frames[item] - CROP + 1, ())) for item in items]
        return self.contender.crops(items, starts)


def same(batch: Any) -> Any:
    return batch


class Peer:
    """Base class of the peers with random access."""

    frames: Sequence[int]
    spawn = False

    def one(self, item: int, start: int) -> Latent:
        raise NotImplementedError

    def whole(self, item: int) -> Latent:
        raise NotImplementedError

    def crops(self, items: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        return floats([self.one(item, start) for item, start in zip(items, starts, strict=True)])

    def sequential(self) -> Iterator[torch.Tensor]:
        for item in range(len(self.frames)):
            yield torch.from_numpy(self.whole(item)).float()

    def loader(self, workers: int) -> DataLoader[Any]:
        return DataLoader(
            Crops(self, self.frames),
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            collate_fn=same,
            persistent_workers=True,
            multiprocessing_context="spawn" if self.spawn else "fork",
        )

    def save_frames(self, folder: Path, latents: Sequence[Latent]) -> None:
        folder.mkdir(parents=True)
        (folder / "frames.json").write_text(json.dumps([len(latent) for latent in latents]))

    def load_frames(self, folder: Path) -> None:
        self.folder = folder
        self.frames = json.loads((folder / "frames.json").read_text())


class Latentmill:
    """latentmill with Parquet shards, through the reader of `LatentDataset` and `LatentStream`."""

    format_name = "parquet"

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        from support.latent_store import write_latents

        lengths = [len(latent) for latent in latents]
        options = {
            "channels": CHANNELS,
            "per_unit": shard_items(latents),
            "format_name": self.format_name,
        }
        write_latents(str(folder), lengths, latents=[z.T for z in latents], **options)

    def open(self, folder: Path) -> None:
        from latentmill.reader.dataset import LatentDataset

        self.dataset = LatentDataset(folder, crop=CROP, metadata=False)
        self.source = self.dataset.corpus.stores[0]

    def crops(self, items: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        rows = self.source.rows[np.array(items)]
        block, _ = self.source.crops.read_block(rows, np.array(starts), CROP)
        return torch.from_numpy(block)

    @cached_property
    def whole(self) -> Iterable[Any]:
        from latentmill.reader.stream import LatentStream

        return LatentStream(self.source.store, shuffle=False, metadata=False)

    def sequential(self) -> Iterator[torch.Tensor]:
        for sample in self.whole:
            yield torch.from_numpy(sample.latents.T)

    def loader(self, workers: int) -> DataLoader[Any]:
        from latentmill.reader.collate import collate

        return DataLoader(
            self.dataset,
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=True,
        )


class LatentmillLoader(Latentmill):
    """latentmill, with batches from its own `Loader` instead of a DataLoader."""

    dtype = "float32"

    def loader(self, workers: int) -> Any:
        from latentmill.reader.loader import Loader

        return Loader(self.dataset, BATCH, workers=workers, dtype=self.dtype)


class LatentmillHalf(LatentmillLoader):
    """The same with batches in float16."""

    dtype = "float16"


class LatentmillTar(Latentmill):
    """latentmill with WebDataset shards."""

    format_name = "webdataset"


class Npy(Peer):
    """One .npy file per item, found by listing the folder and memory-mapped for crops."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        self.save_frames(folder, latents)
        for number, latent in enumerate(latents):
            np.save(folder / f"{number:06d}.npy", latent)

    def open(self, folder: Path) -> None:
        self.load_frames(folder)
        names = sorted(name for name in os.listdir(folder) if name.endswith(".npy"))  # noqa: PTH208
        self.paths = [folder / name for name in names]

    def one(self, item: int, start: int) -> Latent:
        return np.load(self.paths[item], mmap_mode="r")[start : start + CROP]

    def whole(self, item: int) -> Latent:
        return np.load(self.paths[item])


class LitData(Peer):
    """LitData with its layout for time windows, TemporalArrayLoader and read_window."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        import litdata
        from litdata.streaming.cache import Cache
        from litdata.streaming.temporal import TemporalArrayLoader

        assert litdata
        self.save_frames(folder, latents)
        cache = Cache(
            str(folder), chunk_bytes="64MB", item_loader=TemporalArrayLoader([["latent"]])
        )
        for number, latent in enumerate(latents):
            cache[number] = {"latent": latent}
        cache.done()
        cache.merge()

    def open(self, folder: Path) -> None:
        from litdata import StreamingDataset
        from litdata.streaming.temporal import TemporalArrayLoader

        self.load_frames(folder)
        self.data = StreamingDataset(str(folder), item_loader=TemporalArrayLoader())

    def one(self, item: int, start: int) -> Latent:
        return self.data.read_window(item, start, CROP)["latent"]

    def whole(self, item: int) -> Latent:
        return self.data.read_window(item, 0, self.frames[item])["latent"]


class LitDataLoader(LitData):
    """LitData with its own StreamingDataLoader; each item gives one random window."""

    def loader(self, workers: int) -> Any:
        from litdata import StreamingDataLoader
        from litdata.streaming.temporal import TemporalArrayLoader

        from litdata_windows import Windows

        data = Windows(str(self.folder), item_loader=TemporalArrayLoader(), shuffle=True)
        data.frames = list(self.frames)
        return StreamingDataLoader(
            data, batch_size=BATCH, num_workers=workers, persistent_workers=True
        )


class Mosaic(Peer):
    """MosaicML Streaming: MDS shards, items by number."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        from streaming import MDSWriter

        self.save_frames(folder, latents)
        with MDSWriter(out=str(folder / "mds"), columns={"latent": "bytes"}) as out:
            for latent in latents:
                out.write({"latent": latent.tobytes()})

    def open(self, folder: Path) -> None:
        from streaming import StreamingDataset

        self.load_frames(folder)
        self.data = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=BATCH)

    def whole(self, item: int) -> Latent:
        return np.frombuffer(self.data[item]["latent"], np.float16).reshape(-1, CHANNELS)

    def one(self, item: int, start: int) -> Latent:
        return self.whole(item)[start : start + CROP]


class HfDatasets(Peer):
    """Hugging Face datasets: an Arrow folder, items by number."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        import pyarrow as pa
        from datasets import Dataset as Table

        self.save_frames(folder, latents)
        values = pa.array([latent.tobytes() for latent in latents], pa.large_binary())
        table = Table(pa.table({"latent": values}))
        table.save_to_disk(str(folder / "arrow"))

    def open(self, folder: Path) -> None:
        from datasets import load_from_disk

        self.load_frames(folder)
        self.data = load_from_disk(str(folder / "arrow")).with_format("arrow")

    def whole(self, item: int) -> Latent:
        value = self.data[item]["latent"].chunk(0)[0].as_buffer()  # no copy
        return np.frombuffer(value, np.float16).reshape(-1, CHANNELS)

    def one(self, item: int, start: int) -> Latent:
        return self.whole(item)[start : start + CROP]


class Lance(Peer):
    """Lance: one binary column, rows by number, a batch at once."""

    spawn = True  # its threads do not survive a fork

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        import lance
        import pyarrow as pa

        self.save_frames(folder, latents)
        schema = pa.schema([pa.field("latent", pa.large_binary())])
        batches = (
            pa.record_batch([pa.array([z.tobytes()], pa.large_binary())], schema) for z in latents
        )
        lance.write_dataset(
            pa.RecordBatchReader.from_batches(schema, batches), str(folder / "lance")
        )

    def open(self, folder: Path) -> None:
        import lance

        self.load_frames(folder)
        self.data = lance.dataset(str(folder / "lance"))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.open(state["folder"])

    def crops(self, items: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        column = self.data.take(list(items), columns=["latent"])["latent"]
        crops = [
            np.frombuffer(value.as_buffer(), np.float16).reshape(-1, CHANNELS)[at : at + CROP]
            for value, at in zip(column, starts, strict=True)
        ]
        return floats(crops)

    def sequential(self) -> Iterator[torch.Tensor]:
        for batch in self.data.to_batches(columns=["latent"], batch_size=32):
            for value in batch["latent"]:
                latent = np.frombuffer(value.as_buffer(), np.float16).reshape(-1, CHANNELS)
                yield torch.from_numpy(latent).float()


class TarStream(IterableDataset[torch.Tensor]):
    """Random crops of the items of WebDataset tars, in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Latent]:
        import webdataset

        urls = sorted(str(path) for path in self.folder.glob("*.tar"))
        # It distributes the tars to the workers itself.
        for sample in webdataset.WebDataset(urls, shardshuffle=False).shuffle(100):
            latent = np.load(io.BytesIO(sample["npy"]))
            start = int(torch.randint(len(latent) - CROP + 1, ()))
            yield latent[start : start + CROP]


class WebDataset(Peer):
    """Plain WebDataset, without random access: a random crop needs reading a whole item."""

    def build(self, folder: Path, latents: Sequence[Latent]) -> None:
        from webdataset import ShardWriter

        self.save_frames(folder, latents)
        with ShardWriter(str(folder / "%06d.tar"), maxcount=shard_items(latents), verbose=0) as out:
            for number, latent in enumerate(latents):
                buffer = io.BytesIO()
                np.save(buffer, latent)
                out.write({"__key__": f"{number:06d}", "npy": buffer.getvalue()})

    def open(self, folder: Path) -> None:
        self.load_frames(folder)
        self.stream = iter(TarStream(folder))

    def crops(self, items: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        found = []
        while len(found) < len(items):
            crop = next(self.stream, None)
            if crop is None:
                self.stream = iter(TarStream(self.folder))
            else:
                found.append(crop)
        return floats(found)

    def sequential(self) -> Iterator[torch.Tensor]:
        import webdataset

        urls = sorted(str(path) for path in self.folder.glob("*.tar"))
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            yield torch.from_numpy(np.load(io.BytesIO(sample["npy"]))).float()

    def loader(self, workers: int) -> DataLoader[Any]:
        return DataLoader(
            TarStream(self.folder),
            batch_size=BATCH,
            num_workers=workers,
            collate_fn=floats,
            persistent_workers=True,
        )


CONTENDERS: dict[str, type[Any]] = {
    "latentmill": Latentmill,
    "latentmill Loader": LatentmillLoader,
    "latentmill Loader float16": LatentmillHalf,
    "latentmill tar": LatentmillTar,
    "npy files": Npy,
    "litdata": LitData,
    "litdata StreamingDataLoader": LitDataLoader,
    "mosaicml-streaming": Mosaic,
    "webdataset": WebDataset,
    "datasets": HfDatasets,
    "lance": Lance,
}
