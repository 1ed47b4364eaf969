"""What the end of a worker is called; the ends of real workers are in test_scheduler.py."""

from __future__ import annotations

import pytest
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from latentmill.engine.loss import classify, memory_used

END_OF_FILE = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker "
    "exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some "
    "common causes include: (1) the process was killed by the OOM killer due to high memory usage"
)


def died(message: str, reason: int | None = None) -> ActorDiedError:
    context = ActorDiedErrorContext(error_message=message, actor_id=b"\1" * 16)
    if reason is not None:
        context.node_death_info.CopyFrom(NodeDeathInfo(reason=reason))
    return ActorDiedError(context)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (died(END_OF_FILE), "worker", "its process died without an error message"),
        (died("The actor died because its node has died. Node Id: 1"), "node", "its node died"),
        (NodeDiedError("gone"), "node", "its node died"),
        (ObjectLostError("00" * 28, None, ""), "node", "the node that held its audio died"),
        (
            died("its node has died", NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED),
            "node",
            "its node was preempted",
        ),
        (ActorUnavailableError("Socket closed", b"\1" * 16), "node", "cannot be reached"),
        (OutOfMemoryError("Task was killed"), "worker", "the host ran out of memory"),
        (
            died("Task was killed due to the node running low on memory."),
            "worker",
            "the host ran out of memory",
        ),
        (RayError("Something else."), "worker", "Something else."),
    ],
)
def test_the_end_of_a_worker_is_named(error: RayError, kind: str, reason: str) -> None:
    loss = classify(error)
    assert loss.kind == kind
    assert reason in loss.reason
    assert "\n" not in loss.reason


def test_a_silent_death_is_laid_to_memory_where_that_was_short() -> None:
    assert "out of memory is likely" in classify(died(END_OF_FILE), memory_used=0.97).reason
    assert "97% full" in classify(died(END_OF_FILE), memory_used=0.97).reason
    assert "memory was" not in classify(died(END_OF_FILE), memory_used=0.5).reason


def test_an_error_of_the_model_keeps_its_name() -> None:
    cause = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
    error = RayTaskError("encode", "Traceback ...", cause)
    loss = classify(error)
    assert loss.kind == "worker"
    assert loss.reason.startswith("AcceleratorError: CUDA error: an illegal memory access")


def test_memory_is_a_share() -> None:
    used = memory_used()
    assert used is None or 0 < used < 1.5
