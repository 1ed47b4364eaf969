"""A Ray cluster in memory, with a clock of its own: one worker on each node, no processes.

`FakeCluster.run` runs the scheduler on it. All times are in seconds of its clock.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError

from latentmill.engine import scheduler as module
from latentmill.engine.actor import ActorShape, Reply
from latentmill.engine.progress import Progress
from latentmill.engine.scheduler import Scheduler
from latentmill.engine.worker import UnitResult
from latentmill.engine.worker_slot import Report
from latentmill.plan import Unit


@dataclass
class Node:
    """What the worker of a node does.

    Attributes:
        load: Time to load the model.
        unit: Time for a unit.
        start_error: Raised instead of loading the model, after `start_seconds`.
        dies: Whether its process dies while it loads the model.
        origin_error: Raised by the call for the origin, after five seconds.
        unit_error: Raised by every unit, after a second, and by those that end now.
    """

    load: float = 30.0
    unit: float = 100.0
    start_error: Exception | None = None
    start_seconds: float = 1.0
    dies: bool = False
    origin_error: Exception | None = None
    unit_error: Exception | None = None


@dataclass(eq=False)
class _Reference:
    """The result of a call to an actor: after `seconds` on its node."""

    actor: _Actor
    seconds: float
    value: Any


class _Actor:
    """The handle of an actor, which is placed when a node is free."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self.node: str | None = None
        self.calls: dict[_Reference, float] = {}  # the calls, with the time when each ends
        self._waiting: list[tuple[_Reference, str]] = []
        self._unit_ends = 0.0
        for method in ("place", "ready", "origin", "encode", "report", "stop"):
            setattr(self, method, SimpleNamespace(remote=self._method(method)))

    def _method(self, method: str) -> Callable[..., _Reference]:
        def remote(*arguments: Any) -> _Reference:
            reference = _Reference(self, 1.0, arguments)
            self._waiting.append((reference, method))
            self.begin()
            return reference

        return remote

    def begin(self) -> None:
        """Begin the calls, if the actor has a node."""
        if self.node is None:
            return
        now, node = self._cluster.now, self._cluster.nodes[self.node]
        for reference, method in self._waiting:
            arguments, reference.value = reference.value, "origin"
            end = now + 1
            if method in ("place", "ready"):
                reference.value = f"process 1 on {self.node}"
            if method == "ready":
                end = now + (node.start_seconds if node.start_error else node.load)
                reference.value = node.start_error or reference.value
                if node.dies:
                    reference.value = ActorDiedError()
            if method == "origin" and node.origin_error:
                end, reference.value = now + 5, node.origin_error
            if method == "encode":
                if node.unit_error is None:
                    end = self._unit_ends = max(now, self._unit_ends) + node.unit
                result = UnitResult(arguments[0].number, 1, 0, 0, 1.0, (), {})
                reference.value = node.unit_error or result
            if method == "report":
                reference.value = Report(int(now), {}, None)
            self.calls[reference] = end
        self._waiting.clear()


@dataclass
class FakeCluster(Progress):
    """The nodes by name, and what happens at which time; remembers the events of the run.

    Attributes:
        done: Number of units that each node has committed.
        losses: The reasons of lost units.
        ready: Number of ready workers now.
        started: Number of actors that were started.
    """

    nodes: dict[str, Node]
    events: dict[float, Callable[[], None]] = field(default_factory=dict)
    now: float = 0.0
    ready: int = 0
    started: int = 0
    done: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    _actors: list[_Actor] = field(default_factory=list)

    def run(self, patch: pytest.MonkeyPatch, units: int, workers: int | None = None) -> None:
        """Run the scheduler on this number of units, with `workers` or one for each node."""
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda _: self._pass())
        patch.setattr(module, "time", clock)
        patch.setattr(
            module, "ray", SimpleNamespace(wait=self._wait, get=self._get, kill=self._kill)
        )
        patch.setattr(module, "start_actor", lambda job, shape: self._start())
        patch.setattr(module, "head_answers", lambda: True)
        job: Any = SimpleNamespace(log_level=logging.WARNING)
        scheduler = Scheduler(job, ActorShape(0, 1), lambda: workers or len(self.nodes), self)
        scheduler.run([Unit(number, 1, 1.0) for number in range(units)], lambda _: None)

    def replace(self, name: str, other: str, node: Node) -> None:
        """A node dies, and another one joins."""
        del self.nodes[name]
        self.nodes[other] = node

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self.losses.append(reason)

    def workers(self, ready: int, starting: int) -> None:
        self.ready = ready

    def tick(self, now: object) -> None:
        """Not remembered."""

    def _start(self) -> _Actor:
        self.started += 1
        actor = _Actor(self)
        self._actors.append(actor)
        self._place()
        return actor

    def _place(self) -> None:
        taken = {actor.node for actor in self._actors}
        free = [name for name in self.nodes if name not in taken]
        for actor in self._actors:
            if actor.node is None and free:
                actor.node = free.pop(0)
                actor.begin()

    def _pass(self) -> None:
        """A second passes."""
        self.now += 1
        assert self.now < 20_000, "the run does not end"
        for when in [when for when in self.events if when <= self.now]:
            self.events.pop(when)()
        self._place()

    def _wait(
        self, references: list[_Reference], num_returns: int, timeout: float
    ) -> tuple[list[_Reference], None]:
        self._pass()
        return [one for one in references if self._is_lost(one) or self._has_ended(one)], None

    def _is_lost(self, reference: _Reference) -> bool:
        node = reference.actor.node
        return node is not None and node not in self.nodes

    def _has_ended(self, reference: _Reference) -> bool:
        return reference.actor.calls.get(reference, float("inf")) <= self.now

    def _get(self, reference: _Reference) -> Reply:
        if self._is_lost(reference):
            raise NodeDiedError("The actor died because its node has died.")
        node, value = str(reference.actor.node), reference.value
        if isinstance(value, UnitResult):
            value = self.nodes[node].unit_error or value
        if isinstance(value, ActorDiedError):
            raise value
        if isinstance(value, Exception):
            raise RayTaskError("call", "traceback", cause=value)
        if isinstance(value, UnitResult):
            self.done[node] += 1
        return Reply(value, ())

    def _kill(self, actor: _Actor) -> None:
        self._actors.remove(actor)
