"""The simulation of the scheduler, where its outcome is known without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from support.scripts import run_here

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def sim():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import simulate

        yield simulate


@pytest.fixture
def ideal(sim):
    """A world without delays, errors, losses and slow GPUs."""
    return sim.World(
        gpus=16,
        run=1000.0,
        load=0.0,
        load_spread=0.0,
        slow_share=0.0,
        noise=0.0,
        error=0.0,
        giants=0.0,
        lead=0.0,
        trail=0.0,
        driver=0.0,
    )


def test_nothing_is_lost_where_nothing_goes_wrong(sim, ideal) -> None:
    result = sim.Simulation(ideal, 10.0).result()
    assert result.efficiency > 0.98  # all but the last unit of each GPU
    assert (result.open_units, result.failed_units, result.lost_share) == (0, 0, 0)
    assert result.hours == pytest.approx(1000 / 3600, rel=0.02)


def test_prefetch_hides_the_lead_and_the_trail(sim, ideal) -> None:
    slow_to_begin = replace(ideal, lead=4.0, trail=4.0)
    two = sim.Simulation(slow_to_begin, 10.0).result()
    one = sim.Simulation(slow_to_begin, 10.0, "one in flight").result()
    assert one.efficiency == pytest.approx(10 / 18, abs=0.02)
    assert two.efficiency > 0.95


def test_the_drivers_time_bounds_small_units(sim, ideal) -> None:
    result = sim.Simulation(replace(ideal, driver=1.0), 10.0).result()
    assert result.driver_busy > 0.99
    assert result.hours == pytest.approx(result.units / 3600, rel=0.02)


def test_loading_and_slow_gpus_cost_what_they_must(sim, ideal) -> None:
    loading = sim.Simulation(replace(ideal, load=250.0), 10.0).result()
    assert loading.efficiency == pytest.approx(0.8, abs=0.02)
    # Half of the nodes at a third of the speed: busy to the end, they all count as useful.
    slow = sim.Simulation(replace(ideal, slow_share=0.5), 10.0).result()
    assert slow.hours == pytest.approx(1000 / 3600 / (2 / 3), rel=0.05)
    assert slow.efficiency > 0.96


@pytest.mark.parametrize("preempted", ["cluster", "node"])
def test_every_unit_ends_though_nodes_are_taken_away(sim, ideal, preempted) -> None:
    world = replace(ideal, preempted=preempted, every=100.0, down=20.0, error=0.3)
    result = sim.Simulation(world, 10.0).result()
    assert (result.open_units, result.failed_units) == (0, 0)
    assert 0 < result.lost_share < 0.3
    assert result == sim.Simulation(world, 10.0).result()
    # Taken for suspects, units are given up for losses that are not their fault.
    suspects = sim.Simulation(replace(world, every=30.0), 10.0, "suspects").result()
    assert suspects.failed_units > 0
    assert sim.Simulation(replace(world, every=30.0), 10.0).result().failed_units == 0


def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "8", "--hours", "0.2", "--only", "none", "--results", tmp_path]
    assert run_here(capsys, BENCHMARKS / "simulate.py", *options).code == 0
    result = json.loads((tmp_path / "simulate.json").read_text())
    assert result["world"]["gpus"] == 8
    names = {f"none, {one}" for one in ("dispatch", "one in flight", "last singly")}
    assert set(result["by_unit_gpu_seconds"]) == names
