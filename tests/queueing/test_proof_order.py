"""Short forms of the programs that prove that order per key holds and what waits disturbs nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.queueing.prove import prove

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


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
