"""latentmill encodes audio corpora into latent datasets, and decodes latents back to audio.

import latentmill as lm

lm.encode("corpus", "latents", model="lin-cae")
store = lm.open("latents")
record = store["album/song"]
audio = store.decode("album/song", seed=0)
mixed = lm.mix([store["a"].latent, store["b"].latent], gains=[1.0, 0.5], origin=store.origin)
stream = lm.LatentStream("latents", crop=256, batch_size=32)
loader = torch.utils.data.DataLoader(stream, batch_size=32, collate_fn=lm.collate)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentmill.config import RunConfig, load_config
    from latentmill.curation.annotate import AnnotateSummary, annotate, revert_annotations
    from latentmill.curation.merge import merge
    from latentmill.curation.neighbours import Neighbour, neighbours
    from latentmill.curation.query import query
    from latentmill.curation.select import select
    from latentmill.curation.split import split
    from latentmill.curation.views import Curated
    from latentmill.errors import (
        FieldBehindWarning,
        IncompleteStoreWarning,
        LatentmillError,
        RepeatedEpochWarning,
    )
    from latentmill.evaluation.evaluate import Evaluation, evaluate
    from latentmill.evaluation.probe import Probe, probe
    from latentmill.ops import (
        Linearity,
        LinearityWarning,
        Origin,
        crossfade,
        fade,
        fit,
        gain,
        mix,
        mixup,
        subtract,
    )
    from latentmill.publishing.hub import PushSummary, pull, push
    from latentmill.publishing.sync import SyncSummary, sync
    from latentmill.reader.batches import BatchSampler
    from latentmill.reader.collate import collate, collate_tensors
    from latentmill.reader.conditioning import Align, Drop
    from latentmill.reader.dataset import LatentDataset
    from latentmill.reader.loader import Loader
    from latentmill.reader.normalize import Normalize
    from latentmill.reader.stem_dataset import StemDataset
    from latentmill.reader.stream import LatentStream
    from latentmill.record import Record
    from latentmill.reporting.report import ReportFile, report
    from latentmill.run.add import add
    from latentmill.run.drop import Dropped, drop
    from latentmill.run.options import AddOptions, EncodeOptions
    from latentmill.run.run import RunSummary, encode
    from latentmill.store.store import LatentStore
    from latentmill.store.store import open_store as open  # noqa: A004  lm.open(...) reads best

# The module that defines each name. It is imported when the name is first used, so that the command
# line starts quickly.
_LAZY = {
    "AddOptions": "latentmill.run.options",
    "Align": "latentmill.reader.conditioning",
    "AnnotateSummary": "latentmill.curation.annotate",
    "BatchSampler": "latentmill.reader.batches",
    "Curated": "latentmill.curation.views",
    "Dropped": "latentmill.run.drop",
    "Drop": "latentmill.reader.conditioning",
    "EncodeOptions": "latentmill.run.options",
    "Evaluation": "latentmill.evaluation.evaluate",
    "FieldBehindWarning": "latentmill.errors",
    "IncompleteStoreWarning": "latentmill.errors",
    "LatentDataset": "latentmill.reader.dataset",
    "LatentStore": "latentmill.store.store",
    "LatentStream": "latentmill.reader.stream",
    "LatentmillError": "latentmill.errors",
    "Linearity": "latentmill.ops",
    "LinearityWarning": "latentmill.ops",
    "Loader": "latentmill.reader.loader",
    "Neighbour": "latentmill.curation.neighbours",
    "Normalize": "latentmill.reader.normalize",
    "Origin": "latentmill.ops",
    "Probe": "latentmill.evaluation.probe",
    "PushSummary": "latentmill.publishing.hub",
    "Record": "latentmill.record",
    "RepeatedEpochWarning": "latentmill.errors",
    "ReportFile": "latentmill.reporting.report",
    "RunConfig": "latentmill.config",
    "RunSummary": "latentmill.run.run",
    "StemDataset": "latentmill.reader.stem_dataset",
    "SyncSummary": "latentmill.publishing.sync",
    "add": "latentmill.run.add",
    "annotate": "latentmill.curation.annotate",
    "collate": "latentmill.reader.collate",
    "collate_tensors": "latentmill.reader.collate",
    "crossfade": "latentmill.ops",
    "drop": "latentmill.run.drop",
    "encode": "latentmill.run.run",
    "evaluate": "latentmill.evaluation.evaluate",
    "fade": "latentmill.ops",
    "fit": "latentmill.ops",
    "gain": "latentmill.ops",
    "load_config": "latentmill.config",
    "merge": "latentmill.curation.merge",
    "mix": "latentmill.ops",
    "mixup": "latentmill.ops",
    "neighbours": "latentmill.curation.neighbours",
    "open": "latentmill.store.store",
    "probe": "latentmill.evaluation.probe",
    "pull": "latentmill.publishing.hub",
    "push": "latentmill.publishing.hub",
    "query": "latentmill.curation.query",
    "report": "latentmill.reporting.report",
    "revert_annotations": "latentmill.curation.annotate",
    "select": "latentmill.curation.select",
    "split": "latentmill.curation.split",
    "subtract": "latentmill.ops",
    "sync": "latentmill.publishing.sync",
}

__all__ = [
    "AddOptions",
    "Align",
    "AnnotateSummary",
    "BatchSampler",
    "Curated",
    "Drop",
    "Dropped",
    "EncodeOptions",
    "Evaluation",
    "FieldBehindWarning",
    "IncompleteStoreWarning",
    "LatentDataset",
    "LatentStore",
    "LatentStream",
    "LatentmillError",
    "Linearity",
    "LinearityWarning",
    "Loader",
    "Neighbour",
    "Normalize",
    "Origin",
    "Probe",
    "PushSummary",
    "Record",
    "RepeatedEpochWarning",
    "ReportFile",
    "RunConfig",
    "RunSummary",
    "StemDataset",
    "SyncSummary",
    "__version__",
    "add",
    "annotate",
    "collate",
    "collate_tensors",
    "crossfade",
    "drop",
    "encode",
    "evaluate",
    "fade",
    "fit",
    "gain",
    "load_config",
    "merge",
    "mix",
    "mixup",
    "neighbours",
    "open",
    "probe",
    "pull",
    "push",
    "query",
    "report",
    "revert_annotations",
    "select",
    "split",
    "subtract",
    "sync",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'latentmill' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), "open_store" if name == "open" else name)
    globals()[name] = value
    return value
