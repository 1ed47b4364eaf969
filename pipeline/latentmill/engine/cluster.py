"""Finding the Ray to run on: a cluster that is named, or one embedded in this process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from latentmill.errors import ConfigError

# Units carry no payloads, so the object store may be as small as Ray allows.
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Cluster:
    """The Ray that this run uses."""

    embedded: bool
    cpus: int
    gpus: int


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Connect to Ray for a run.

    A Ray that is already connected or that is named (by `address` or RAY_ADDRESS, which Ray sets
    under `ray job submit`) is used as it is and left running. Else one is started in this process
    and stopped at the end.

    Raises:
        ConfigError: The named cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield _describe(embedded=False)
        return
    embedded = address is None
    try:
        if embedded:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"Ray at {address or 'this machine'} cannot be used ({reason}): check the address and "
            "that the cluster runs."
        ) from error
    try:
        yield _describe(embedded=embedded)
    finally:
        ray.shutdown()


def _describe(*, embedded: bool) -> Cluster:
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Cluster(embedded, int(resources.get("CPU", 1)), int(resources.get("GPU", 0)))
