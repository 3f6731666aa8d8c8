"""The short form of the program that proves that nothing is lost, and nothing stored twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.broker.plan import STOP, kinds, plan
from tests.queueing.prove import prove

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
SEEDS = {"sqlite": 14, "rabbitmq": 34}
"""Each of a round that is short, and in which something is stopped for long."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", SEEDS)
def test_nothing_confirmed_is_lost_and_nothing_deduplicated_is_stored_twice(
    backend: str, rabbitmq_program: Path, toxiproxy_program: Path
) -> None:
    assert rabbitmq_program.is_file()
    assert toxiproxy_program.is_file()
    figures = prove("ledger", "--rounds", "1", "--seed", str(SEEDS[backend]), "--backends", backend)
    assert (figures["lost"], figures["dedup_duplicates"]) == (0, 0)
    assert figures["confirmed"] > 0
    assert figures["faults"] == len(kinds(broker=backend == "rabbitmq"))


@pytest.mark.parametrize(("backend", "target"), [("sqlite", "consumer"), ("rabbitmq", "broker")])
def test_the_short_proof_stops_something_for_longer_than_leases_and_publishes_last(
    backend: str, target: str
) -> None:
    broker = backend == "rabbitmq"
    faults = plan(SEEDS[backend], len(kinds(broker=broker)), broker=broker, consumers=3)
    (stop,) = [fault for fault in faults if (fault.kind, fault.target) == (STOP, target)]
    assert stop.lasts_s > 10


def test_the_plan_follows_from_the_seed() -> None:
    first = plan(1, 100, broker=True, consumers=3)
    assert first == plan(1, 100, broker=True, consumers=3)
    assert first != plan(2, 100, broker=True, consumers=3)


@pytest.mark.parametrize(("broker", "kinds"), [(True, 8), (False, 5)])
def test_each_round_of_the_plan_breaks_everything_once(*, broker: bool, kinds: int) -> None:
    faults = plan(1, 3 * kinds, broker=broker, consumers=3)
    for start in range(0, len(faults), kinds):
        assert len({str(fault) for fault in faults[start : start + kinds]}) == kinds
