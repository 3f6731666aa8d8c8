"""Which frames acknowledge which deliveries."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, cast

from services.queueing.backends.rabbit.acks import Acks

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel


def acks() -> Acks:
    return Acks(cast("AbstractChannel", None))


def test_what_is_done_from_the_beginning_on_is_acknowledged_together() -> None:
    first = acks()
    assert first.plan([3, 1, 2]) == (3, [])
    assert first.plan([4, 6]) == (4, [6])
    assert first.plan([7]) == (0, [7])


def test_the_number_of_an_acknowledgement_is_one_that_is_out_still() -> None:
    first = acks()
    assert first.plan([2, 3]) == (0, [2, 3])
    assert first.plan([1]) == (1, [])
    assert first.plan([5, 4]) == (5, [])


def test_in_any_order_each_delivery_is_acknowledged_once() -> None:
    for seed in range(20):
        dice, first = random.Random(seed), acks()
        tags = list(range(1, 201))
        dice.shuffle(tags)
        out = set(tags)
        while tags:
            size = dice.randint(1, 20)
            some, tags = tags[:size], tags[size:]
            together, apart = first.plan(some)
            if together:
                assert together in out
                out -= {tag for tag in out if tag <= together}
            for tag in apart:
                out.remove(tag)
            assert out == set(tags)
