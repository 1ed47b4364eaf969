"""What a worker finds out on its device before the first unit: the batch size, and compilation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from latentmill.encoding.stored import parse_json
from latentmill.errors import StoreError
from latentmill.models.base import Autoencoder
from latentmill.models.inference.batch import find_batch_size
from latentmill.models.inference.compiled import Compiled
from latentmill.plan import BATCH_PATH
from latentmill.storage.storage import Storage

if TYPE_CHECKING:  # it imports this module
    from latentmill.engine.worker import Job


def compiled(model: Autoencoder, job: Job, device: str) -> Compiled:
    """Compile a model for a job's full batches of full chunks."""
    spec, settings = model.spec, job.settings
    shape = (settings.batch_size, spec.channels, job.chunking.model_samples(spec))  # [B, C, T]
    return Compiled(model, shape, device, settings.precision)


def settled_batch_size(storage: Storage, model: Autoencoder, job: Job, device: str) -> int:
    """The batch size of a store on GPUs, which the first worker finds and writes to the store.

    It changes the latents in their last digits, so every worker, and a run that resumes, uses the
    stored value. Raises ModelError if not even one chunk fits in the GPU's memory.
    """
    if not storage.exists(BATCH_PATH):
        samples = job.chunking.model_samples(model.spec)
        size = find_batch_size(model, samples, device, job.settings.precision)
        storage.create(BATCH_PATH, json.dumps({"batch_size": size}).encode())
    try:
        settled = parse_json(storage.read(BATCH_PATH))["batch_size"]
        if not isinstance(settled, int) or settled < 1:
            raise ValueError(settled)
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"Store {storage.root}: {BATCH_PATH} is damaged: write the run's batch size into it, "
            'such as {"batch_size": 16}, or delete it.'
        ) from error
    return settled
