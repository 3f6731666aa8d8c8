"""The short forms of the programs that prove the service: nothing lost, stored once, in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.broker.plan import STOP, kinds, plan

REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = {"sqlite": 14, "rabbitmq": 34}
"""Each of a round that is short, and in which something is stopped for long."""


def prove(name: str, *arguments: str) -> dict[str, float]:
    """Run a program; the figures of its last line."""
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["sqlite", "rabbitmq"])
def test_order_per_key_holds_while_consumers_refuse_and_die(
    backend: str, rabbitmq_program: Path, toxiproxy_program: Path
) -> None:
    assert rabbitmq_program.is_file()
    assert toxiproxy_program.is_file()
    figures = prove("order", "--messages", "5000", "--kill-every-s", "2", "--backends", backend)
    assert (figures["out_of_order"], figures["missing"]) == (0, 0)
    assert figures["deliveries"] > figures["messages"]


@pytest.mark.timeout(600)
def test_what_waits_keeps_nobody_from_anything(rabbitmq_program: Path, toxiproxy_program: Path) -> None:
    assert rabbitmq_program.is_file()
    assert toxiproxy_program.is_file()
    sizes = ("--idle", "2000", "--idle-s", "1", "--delayed", "500", "--delay-s", "2")
    figures = prove("waiting", *sizes, "--paused", "400", "--waiting", "5000")
    assert figures["paused_missing"] == 0  # that every delayed message came, the program says itself


def test_the_plan_follows_from_the_seed() -> None:
    first = plan(1, 100, broker=True, consumers=3)
    assert first == plan(1, 100, broker=True, consumers=3)
    assert first != plan(2, 100, broker=True, consumers=3)


@pytest.mark.parametrize(("broker", "kinds"), [(True, 8), (False, 5)])
def test_each_round_of_the_plan_breaks_everything_once(*, broker: bool, kinds: int) -> None:
    faults = plan(1, 3 * kinds, broker=broker, consumers=3)
    for start in range(0, len(faults), kinds):
        assert len({str(fault) for fault in faults[start : start + kinds]}) == kinds
