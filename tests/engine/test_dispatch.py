"""Which unit goes where: order, suspects, caps, and that nothing is lost or done twice."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from latentmill.engine.dispatch import (
    MAX_ATTEMPTS,
    MAX_NODE_LOSSES,
    UNITS_IN_FLIGHT,
    Assignment,
    Dispatch,
    Loss,
)
from latentmill.plan import Unit

DIED, NODE = Loss("worker", "died"), Loss("node", "node died")
DENIED = Loss("storage", "no permission")


def units(*seconds: float) -> list[Unit]:
    return [Unit(number, 1, length) for number, length in enumerate(seconds)]


def take(dispatch: Dispatch, slot: str, *holding: Unit) -> Unit:
    assignment = dispatch.next(slot, holding)
    assert assignment is not None
    return assignment.unit


def test_longest_first_and_no_more_than_a_seat_may_have() -> None:
    dispatch = Dispatch(units(1, 3, 2, 3))
    first = take(dispatch, "a")
    second = take(dispatch, "a", first)
    assert dispatch.next("a", [first, second]) is None
    assert [first.number, second.number] == [1, 3]
    dispatch.done(first)
    assert take(dispatch, "a", second).number == 2
    assert (dispatch.open, dispatch.queued) == (3, 1)


def test_a_unit_that_cannot_be_written_waits_for_the_others_and_fails_alone() -> None:
    dispatch = Dispatch(units(4, 3, 2, 1))
    taken = []
    while (assignment := dispatch.next("a", [])) is not None:
        assert not assignment.trial_load  # nothing is wrong with its items
        taken.append(assignment.unit.number)
        if assignment.unit.number == 0:
            assert dispatch.lost(assignment.unit, DENIED) == taken.count(0)
        else:
            dispatch.done(assignment.unit)
        if dispatch.storage_fails:
            break
    assert taken == [0, 1, 2, 3, 0]  # and then there is no other left to try
    assert dispatch.open == 1
    busy = Dispatch(units(4, 3, 2, 1))
    denied, other = take(busy, "a"), take(busy, "a")
    for _ in range(MAX_ATTEMPTS - 1):
        busy.lost(denied, DENIED)
        busy._waiting.rotate(1)  # its turn again, while others are open
        assert take(busy, "a", other) == denied
    busy.lost(denied, DENIED)
    assert not busy.storage_fails
    assert busy.failed == {"000000": DENIED}
    assert busy.open == 3


def test_when_nothing_can_be_written_it_is_the_storage() -> None:
    dispatch = Dispatch(units(*[1] * 5))
    for number in range(3):
        assert not dispatch.storage_fails
        unit = take(dispatch, "a")
        assert unit.number == number
        dispatch.lost(unit, DENIED)
    assert dispatch.storage_fails
    few = Dispatch(units(1, 1))
    few.done(take(few, "a"))
    assert not few.storage_fails
    few.lost(take(few, "a"), DENIED)  # all that is left
    assert few.storage_fails


def test_a_suspect_runs_alone_and_carefully_at_last() -> None:
    dispatch = Dispatch(units(3, 2, 1))
    poison, healthy = take(dispatch, "a"), take(dispatch, "a")
    dispatch.lost(poison, DIED)
    assert dispatch.next("a", [healthy]) is None  # it is drained for the suspect
    assert take(dispatch, "b", healthy).number == 2  # another slot goes on
    dispatch.done(healthy)
    assert dispatch.next("a", []) == Assignment(poison, trial_load=False)
    assert dispatch.next("a", [poison]) is None
    dispatch.lost(poison, DIED)
    assert dispatch.next("a", []) == Assignment(poison, trial_load=True)
    assert dispatch.lost(poison, DIED) == MAX_ATTEMPTS
    assert dispatch.failed == {"000000": DIED}
    assert dispatch.open == 1


def test_a_unit_that_went_with_its_node_is_no_suspect() -> None:
    dispatch = Dispatch(units(3, 2, 1))
    long = take(dispatch, "a")
    dispatch.lost(long, NODE)
    again = take(dispatch, "b")
    assert again == long  # at once, not at the end
    assert take(dispatch, "b", again).number == 1  # and not alone
    for loss in range(2, MAX_NODE_LOSSES):
        assert dispatch.lost(again, NODE) == loss
        assignment = dispatch.next("b", [])
        assert assignment == Assignment(long, trial_load=loss == MAX_NODE_LOSSES - 1)
    dispatch.lost(again, NODE)
    assert dispatch.failed == {"000000": NODE}


def test_a_seat_that_leaves_while_it_is_drained_keeps_no_place() -> None:
    dispatch = Dispatch(units(4, 3, 2, 1))
    poison, on_a, on_b = (take(dispatch, name) for name in "xab")
    dispatch.lost(poison, DIED)
    assert dispatch.next("a", [on_a]) is None
    assert dispatch.next("b", [on_b]) is not None
    dispatch.leave("a")
    assert dispatch.next("b", [on_b]) is None  # now this one is drained


@given(
    lengths=st.lists(st.floats(0, 100), max_size=30),
    slots=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    deaths=st.sampled_from([0.0, 0.2, 0.6]),
    poison=st.sets(st.integers(0, 29), max_size=3),
)
def test_every_unit_ends_once_whatever_dies(
    lengths: list[float], slots: int, seed: int, deaths: float, poison: set[int]
) -> None:
    chance = random.Random(seed)
    dispatch = Dispatch(units(*lengths))
    held: dict[int, list[Assignment]] = {slot: [] for slot in range(slots)}
    done: Counter[int] = Counter()
    lost: Counter[tuple[int, str]] = Counter()
    idle = 0
    while dispatch.open:
        slot = chance.choice(list(held))
        mine = held[slot]
        while (given_ := dispatch.next(slot, [one.unit for one in mine])) is not None:
            mine.append(given_)
        everywhere = [one.unit.number for some in held.values() for one in some]
        assert len(everywhere) == len(set(everywhere))
        assert len(mine) <= UNITS_IN_FLIGHT
        suspects = [one for one in mine if lost[one.unit.number, "worker"]]
        assert not suspects or len(mine) == 1 or lost[mine[0].unit.number, "worker"] == 0
        idle = 0 if mine else idle + 1
        assert idle < 1000, "somebody always has something to do"
        if not mine:
            continue
        bad = any(one.unit.number in poison for one in mine)
        if bad or chance.random() < deaths:
            loss = DIED if bad else chance.choice([DIED, NODE])
            for one in mine:
                lost[one.unit.number, loss.kind] += 1
                dispatch.lost(one.unit, loss)
            dispatch.leave(slot)
            held[slot] = []
            continue
        finished = mine.pop(0)
        done[finished.unit.number] += 1
        dispatch.done(finished.unit)
    failed = {int(name) for name in dispatch.failed}
    assert set(done.values()) <= {1}
    assert failed | set(done) == set(range(len(lengths)))
    assert not failed & set(done)
    assert poison & set(range(len(lengths))) <= failed
    assert all(
        lost[number, "worker"] == MAX_ATTEMPTS or lost[number, "node"] == MAX_NODE_LOSSES
        for number in failed
    )
    assert dispatch.queued == 0
