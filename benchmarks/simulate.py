"""How the scheduler keeps a thousand GPUs busy: discrete events, no Ray, one seed.

    python benchmarks/simulate.py [--gpus 1000] [--hours 2] [--only node] [--results FOLDER]

What decides is `latentmill.engine.dispatch.Dispatch`, the class that the scheduler itself asks;
everything around it is assumed, and `World` states what. Variants show what its rules are worth:
`suspects` takes every lost unit for a suspect, as if a node's end were the unit's fault (tried
again alone, three attempts), `one in flight` gives an actor a unit when it has none, and `last
singly` does so when fewer units wait than there are GPUs.

Efficiency is the GPU seconds that the models of committed units worked, over the GPU seconds that
the cluster had from start to end: waiting for actors, for units and for the last ones, and work
that was lost, all count against it.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from latentmill.engine.dispatch import UNITS_IN_FLIGHT, Dispatch, Loss

VARIANTS = {
    "none": ("dispatch", "one in flight", "last singly"),
    "cluster": ("dispatch", "suspects"),
    "node": ("dispatch", "suspects"),
}
PATIENCE = 5  # a run that takes so many times its length is given up
UNIT_SECONDS = (30, 100, 300, 1000)  # estimated GPU seconds of a unit


@dataclass(frozen=True)
class World:
    """What is assumed. Seconds, if not said otherwise.

    Attributes:
        preempted: `none`; `cluster`: every `every` seconds one node; `node`: each node once in
            `every` seconds on average, at random.
        down: From a preemption until the replacement's actors may start.
        load: Until an actor has its process and its model; `load_spread` more at random.
        slow_share: Share of the nodes whose GPUs take `slow_factor` times as long.
        noise: Sigma of the log of a unit's time on one GPU or another.
        error: Sigma of the log of a unit's size over its estimate, which is all that is known of it
            beforehand: units are cut to equal estimates, but for
        giants: the share of them that are one long recording, which cannot be cut: Pareto, from
            `giant` GPU seconds on, with the exponent 1.2, `longest` at most.
        lead: From being handed a unit to its first batch; hidden by the unit in front.
        trail: From the last batch to the commit; the next unit's model runs meanwhile.
        driver: The driver's own time for a unit, during which it serves no other.
    """

    gpus: int = 1000
    gpus_per_node: int = 8
    run: float = 2 * 3600.0  # of all GPUs, if they did nothing but work
    preempted: str = "none"
    every: float = 600.0
    down: float = 180.0
    load: float = 30.0
    load_spread: float = 30.0
    slow_share: float = 0.05
    slow_factor: float = 3.0
    noise: float = 0.1
    error: float = 0.3
    giants: float = 0.005
    giant: float = 30.0
    longest: float = 600.0
    lead: float = 3.0
    trail: float = 5.0
    driver: float = 0.001
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """How a run went; shares are of the cluster's GPU seconds."""

    units: int
    efficiency: float
    hours: float
    tail_seconds: float  # from the last unit that waited until the end
    lost_share: float  # model time of units that were lost
    failed_units: int  # given up after the last attempt
    open_units: int  # neither committed nor failed when the simulation gave the run up
    driver_busy: float  # share of the time


@dataclass(frozen=True)
class SimUnit:
    """A unit as `Dispatch` sees it, and what it really takes."""

    number: int
    seconds: float  # as the plan estimates it
    work: float  # GPU seconds, on a GPU like the others

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(eq=False)
class WorkerSlot:
    """An actor's place on a GPU."""

    slowness: float
    ready: bool = False
    life: int = 0  # counts actors, so that what a dead one would have done is ignored
    free: float = 0.0  # when its model has done what it holds
    # By unit: when the model begins and ends with it.
    holds: dict[SimUnit, tuple[float, float]] = field(default_factory=dict)


class Simulation:
    """One run; `result` plays it."""

    def __init__(self, world: World, unit_seconds: float, variant: str = "") -> None:
        self._world = world
        self._random = random.Random(world.seed)
        self._units = self._cut(unit_seconds)
        in_flight = 1 if variant == "one in flight" else UNITS_IN_FLIGHT
        self._dispatch = Dispatch(self._units, in_flight)  # type: ignore[arg-type]
        self._in_flight = in_flight
        self._singly = variant == "last singly"
        self._loss = Loss("worker" if variant == "suspects" else "node", "preempted")
        self._nodes = -(-world.gpus // world.gpus_per_node)
        slow = self._random.sample(range(self._nodes), round(world.slow_share * self._nodes))
        self._slots = [
            WorkerSlot(world.slow_factor if gpu // world.gpus_per_node in slow else 1.0)
            for gpu in range(world.gpus)
        ]
        self._events: list[tuple[float, int, str, int, int, SimUnit | None]] = []
        self._count = 0
        self._hungry: set[int] = set()
        self._driver_free = self._driver_busy = 0.0
        self._useful = self._lost = self._down = self._dry = 0.0

    def _cut(self, unit_seconds: float) -> list[SimUnit]:
        """Units, as many as fill the run."""
        world, chance = self._world, self._random
        units: list[SimUnit] = []
        left = world.run * world.gpus
        while left > 0:
            one = unit_seconds * chance.uniform(0.9, 1)
            if chance.random() < world.giants:
                one = max(one, min(world.giant * chance.paretovariate(1.2), world.longest))
            units.append(SimUnit(len(units), one, one * chance.lognormvariate(0, world.error)))
            left -= one
        return units

    def result(self) -> Result:
        """Play the run to its end."""
        self._start()
        now = 0.0
        while self._dispatch.open and now < PATIENCE * self._world.run:
            now, _, kind, place, life, unit = heapq.heappop(self._events)
            if kind == "preempt":
                self._preempt(now, place)
            elif life != self._slots[place].life:  # what an actor would have done that is gone
                continue
            elif kind == "ready":
                self._slots[place].ready, self._slots[place].free = True, now
                self._fill(now, place)
            elif unit is not None:
                self._finish(now, place, unit)
        had = now * self._world.gpus - self._down
        return Result(
            units=len(self._units),
            efficiency=round(self._useful / had, 4),
            hours=round(now / 3600, 3),
            tail_seconds=round(now - self._dry),
            lost_share=round(self._lost / had, 4),
            failed_units=len(self._dispatch.failed),
            open_units=self._dispatch.open,
            driver_busy=round(self._driver_busy / now, 4),
        )

    def _start(self) -> None:
        for place in range(len(self._slots)):
            self._load(0.0, place)
        if self._world.preempted == "cluster":
            self._at(self._world.every, "preempt", self._random.randrange(self._nodes))
        elif self._world.preempted == "node":
            for node in range(self._nodes):
                self._at(self._random.expovariate(1 / self._world.every), "preempt", node)

    def _at(
        self, when: float, kind: str, place: int, life: int = 0, unit: SimUnit | None = None
    ) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, kind, place, life, unit))

    def _load(self, now: float, place: int) -> None:
        spread = self._random.random() * self._world.load_spread
        self._at(now + self._world.load + spread, "ready", place, self._slots[place].life)

    def _fill(self, now: float, place: int) -> None:
        """Hand a seat the units that it may have."""
        slot, world = self._slots[place], self._world
        while slot.ready:
            if self._singly and slot.holds and self._dispatch.queued < world.gpus:
                break  # another GPU may be free for it sooner
            given = self._dispatch.next(place, slot.holds.keys())
            if given is None:
                break
            handed = max(now, self._driver_free)
            self._driver_free = handed + world.driver
            self._driver_busy += world.driver
            unit: SimUnit = given.unit  # type: ignore[assignment]
            began = max(handed + world.lead, slot.free)
            took = unit.work * slot.slowness * self._random.lognormvariate(0, world.noise)
            slot.free = began + took
            slot.holds[unit] = (began, slot.free)
            self._at(slot.free + world.trail, "done", place, slot.life, unit)
            if not self._dispatch.queued:
                self._dry = now
        if slot.ready and len(slot.holds) < self._in_flight:
            self._hungry.add(place)
        else:
            self._hungry.discard(place)

    def _finish(self, now: float, place: int, unit: SimUnit) -> None:
        began, ended = self._slots[place].holds.pop(unit)
        self._useful += ended - began
        self._dispatch.done(unit)  # type: ignore[arg-type]
        self._fill(now, place)

    def _preempt(self, now: float, node: int) -> None:
        """Take a node's GPUs away; others come in their place."""
        world = self._world
        first = node * world.gpus_per_node
        for place in range(first, min(first + world.gpus_per_node, world.gpus)):
            slot = self._slots[place]
            lost, slot.holds = slot.holds, {}
            slot.life, slot.ready = slot.life + 1, False
            self._dispatch.leave(place)
            self._down += world.down
            self._load(now + world.down, place)
            self._hungry.discard(place)
            for unit, (began, ended) in lost.items():
                self._lost += max(0.0, min(now, ended) - began)
                self._dispatch.lost(unit, self._loss)  # type: ignore[arg-type]
        for place in sorted(self._hungry):
            self._fill(now, place)
        if world.preempted == "cluster":
            self._at(now + world.every, "preempt", self._random.randrange(self._nodes))
        else:
            wait = self._random.expovariate(1 / world.every)
            self._at(now + world.down + wait, "preempt", node)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=2, help="the run's length without any loss")
    parser.add_argument(
        "--only", choices=("none", "cluster", "node"), help="one kind of preemption"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    base = World(gpus=arguments.gpus, run=arguments.hours * 3600)
    table: dict[str, Any] = {}
    for preempted in (arguments.only,) if arguments.only else ("none", "cluster", "node"):
        world = replace(base, preempted=preempted)
        for variant in VARIANTS[preempted]:
            rows = table[f"{preempted}, {variant}"] = {}
            print(f"\npreempted: {preempted}, {variant}")
            print("GPU s/unit     units  efficiency  hours  tail s    lost  failed    open  driver")
            for size in UNIT_SECONDS:
                one = Simulation(world, size, variant).result()
                rows[str(size)] = asdict(one)
                print(
                    f"{size:10} {one.units:8} {one.efficiency:11.3f} {one.hours:6.2f} "
                    f"{one.tail_seconds:7.0f} {one.lost_share:7.3f} {one.failed_units:7} "
                    f"{one.open_units:7} {one.driver_busy:7.3f}",
                    flush=True,
                )
    write_result(
        "simulate",
        {"script": "benchmarks/simulate.py", "world": asdict(base), "by_unit_gpu_seconds": table},
        arguments.results,
    )


if __name__ == "__main__":
    main()
