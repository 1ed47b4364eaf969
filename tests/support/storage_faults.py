"""An S3 that fails now and then, for whoever opens `s3://` meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from latentmill.storage import remote
from support.faulty_s3 import Faults, faulty_proxy


@contextmanager
def faulty_s3(faults: Faults) -> Iterator[Faults]:
    """Put a faulty proxy in front of the S3 that `AWS_ENDPOINT_URL` names; pauses are short."""
    import s3fs

    with (
        faulty_proxy(os.environ["AWS_ENDPOINT_URL"], faults) as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries are slow, and not ours
        patch.setattr(remote, "FIRST_PAUSE", 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield faults
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
