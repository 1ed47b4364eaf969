"""Ranks that are known only when training begins, as with Lightning."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from latentmill.reader.batches import BatchSampler
from latentmill.reader.collate import collate
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.sharding import accelerate_processes
from latentmill.reader.stream import LatentStream


@pytest.fixture(params=[0, 1, 2])
def join(request: pytest.FixtureRequest) -> Iterator[object]:
    """Joins the process group as one of three, when it is called."""

    def joined() -> int:
        torch.distributed.init_process_group(
            "fake", rank=request.param, world_size=3, store=FakeStore()
        )
        return int(request.param)

    yield joined
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_loader_made_before_reads_its_ranks_share(mixed: list[str], join) -> None:
    dataset = LatentDataset(mixed, crop=8)
    stream = LatentStream(mixed, crop=8, batch_size=5)
    sampler = BatchSampler(dataset, 5)
    assert (len(stream), len(sampler)) == (73, 15)
    rank = join()
    expected = LatentStream(mixed, crop=8, batch_size=5, rank=rank, world_size=3)
    keys = [sample.key for sample in expected]
    assert len(stream) == len(keys) == (25 if rank == 0 else 24)
    loader = DataLoader(stream, batch_size=5, num_workers=1, collate_fn=collate)
    batches = list(loader)  # forked
    assert [key for batch in batches for key in batch["key"]] == keys
    assert stream.state_after(batches[1])["position"] == 30
    assert [key for batch in sampler for _, _, key in batch] == [
        key for batch in BatchSampler(dataset, 5, rank=rank, world_size=3) for _, _, key in batch
    ]
    sent = pickle.dumps(stream)
    torch.distributed.destroy_process_group()
    copy = pickle.loads(sent)  # as in a spawned worker, which is in no group
    assert [sample.key for sample in copy] == keys


def test_a_stream_sent_before_finds_its_rank_there(mixed: list[str], join) -> None:
    sent = pickle.dumps(LatentStream(mixed, crop=8))
    join()
    copy = pickle.loads(sent)
    assert len(copy) < 73
    assert max(Counter(sample.key for sample in copy).values()) == 1


def test_processes_of_accelerate_count_for_the_reader_that_its_loader_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `accelerate.state` says; test_accelerate.py runs the real one, in processes."""
    reader = object()
    loaders = [
        (SimpleNamespace(dataset=reader), 4),
        (SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=reader)), 4),
        (SimpleNamespace(dataset=object(), batch_sampler=None), 1),
        (None, 1),
    ]
    for loader, processes in loaders:
        state = SimpleNamespace(
            GradientState=lambda loader=loader: SimpleNamespace(active_dataloader=loader),
            PartialState=lambda: SimpleNamespace(num_processes=4),
        )
        monkeypatch.setitem(sys.modules, "accelerate.state", state)
        assert accelerate_processes(reader) == processes
    monkeypatch.delitem(sys.modules, "accelerate.state")
    assert accelerate_processes(reader) == 1
