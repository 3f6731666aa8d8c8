"""What is broken when: a function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

KILL, STOP, RESET = "kill -9", "SIGSTOP", "reset"
_SERVICE = ((KILL, "service"), (STOP, "service"), (KILL, "consumer"), (STOP, "consumer"), (RESET, "service"))
_BROKER = ((KILL, "broker"), (STOP, "broker"), (RESET, "broker"))


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is broken for a while.

    Attributes:
        kind: KILL, STOP or RESET.
        target: `broker`, `service` or `consumer`; RESET is of the connections to it.
        pause_s: How long all is well before.
        lasts_s: Before it is started again, goes on, or lets connections through.
        which: Of the consumers.
    """

    kind: str
    target: str
    pause_s: float
    lasts_s: float
    which: int

    def __str__(self) -> str:
        """As the table shows it."""
        return f"{self.kind} {self.target}"


def kinds(*, broker: bool) -> list[tuple[str, str]]:
    """What is broken in a round, as pairs of kind and target; `broker` as in `plan`."""
    return [*_SERVICE, *(_BROKER if broker else ())]


def _faults(seed: int, *, broker: bool, consumers: int) -> Iterator[Fault]:
    """In rounds: each round has every kind once, in an order of its own."""
    dice = random.Random(f"{seed} {broker}")  # noqa: S311 - repeatable is what it has to be
    order = kinds(broker=broker)
    while True:
        dice.shuffle(order)
        for kind, target in order:
            # Long enough for leases of stopped consumers to end, and for deadlines of publishes to pass.
            longest = 12.0 if kind == STOP else 3.0
            yield Fault(
                kind, target, dice.uniform(0.5, 2.0), dice.uniform(0.2, longest), dice.randrange(consumers)
            )


def plan(seed: int, count: int, *, broker: bool, consumers: int) -> list[Fault]:
    """The first so many faults.

    Args:
        seed: The same gives the same.
        count: How many.
        broker: Whether there is a broker behind the service, to be broken too.
        consumers: How many there are.
    """
    return list(islice(_faults(seed, broker=broker, consumers=consumers), count))
