"""Simulates how the scheduler keeps a thousand GPUs busy: discrete events, no Ray, one seed.

    python benchmarks/simulate.py [--gpus 1000] [--hours 2] [--only node] [--results FOLDER]

Decisions come from `latentmill.engine.dispatch.Dispatch`, the class that the scheduler uses. All
other behaviour is assumed; `World` documents it. Variants show the effect of the rules: `suspects`
treats every lost unit as a suspect, as if the unit had caused the loss of its node (it is retried
alone, three attempts); `one in flight` gives an actor a unit only when it has none; `last singly`
does so when fewer units are waiting than there are GPUs.

Efficiency is the GPU time that models worked on committed units, divided by the GPU time of the
cluster from start to end. Waiting for actors, for units and for the last units reduces it, and so
does lost work.
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
PATIENCE = 5  # a run that takes this many times its length is stopped
UNIT_SECONDS = (30, 100, 300, 1000)  # estimated GPU seconds of a unit


@dataclass(frozen=True)
class World:
    """The assumptions, in seconds unless stated otherwise.

    Attributes:
        preempted: `none`; `cluster`: one node every `every` seconds; `node`: each node at random,
            once in `every` seconds on average.
        down: From a preemption until the actors of the replacement may start.
        load: Time to start an actor and load its model, plus up to `load_spread` at random.
        slow_share: Share of the nodes whose GPUs take `slow_factor` times as long.
        noise: Sigma of the log of a unit's time on different GPUs.
        error: Sigma of the log of a unit's size divided by its estimate. The scheduler knows only
            the estimates, which are equal for all units except giants.
        giants: Share of the units that are one long recording, which cannot be split: Pareto
            distributed from `giant` GPU seconds, with exponent 1.2, up to `longest`.
        lead: From receiving a unit to its first batch; hidden by the unit before it.
        trail: From the last batch to the commit; the model works on the next unit meanwhile.
        driver: The driver's own time for a unit, during which it serves no other.
    """

    gpus: int = 1000
    gpus_per_node: int = 8
    run: float = 2 * 3600.0  # length of the run if all GPUs always worked
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
    """Result of a run; shares are of the cluster's GPU seconds."""

    units: int
    efficiency: float
    hours: float
    tail_seconds: float  # from when no unit is waiting until the end
    lost_share: float  # model time of units that were lost
    failed_units: int  # failed in the last attempt
    open_units: int  # neither committed nor failed when the simulation stopped
    driver_busy: float  # share of the time


@dataclass(frozen=True)
class SimUnit:
    """A unit as `Dispatch` sees it, with its real duration."""

    number: int
    seconds: float  # as the plan estimates it
    work: float  # GPU seconds, on a GPU like the others

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(eq=False)
class WorkerSlot:
    """The slot of a worker on a GPU."""

    slowness: float
    ready: bool = False
    life: int = 0  # counts actors, so that events of dead actors can be ignored
    free: float = 0.0  # when its model will have finished its units
    # By unit: when the model starts and finishes it.
    holds: dict[SimUnit, tuple[float, float]] = field(default_factory=dict)


class Simulation:
    """One simulated run; `result` runs it."""

    def __init__(self, world: World, unit_seconds: float, variant: str = "") -> None:
        self._world = world
        self._random = random.Random(world.seed)
        self._units = self._make_units(unit_seconds)
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

    def _make_units(self, unit_seconds: float) -> list[SimUnit]:
        """Make enough units to fill the run."""
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
        """Simulate the run to its end."""
        self._start()
        now = 0.0
        while self._dispatch.open and now < PATIENCE * self._world.run:
            now, _, kind, place, life, unit = heapq.heappop(self._events)
            if kind == "preempt":
                self._preempt(now, place)
            elif life != self._slots[place].life:  # an event of an actor that is gone
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
        """Give a worker slot the units that it may have."""
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
        """Remove the GPUs of a node; others replace them."""
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
    parser.add_argument(
        "--hours", type=float, default=2, help="length of the run without losses, in hours"
    )
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
