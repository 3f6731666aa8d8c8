"""What Seek has passed over: which messages those are, and how a holding is rid of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.queueing.backends.rabbit.held import Held
from services.queueing.backends.rabbit.holding import Holding
from services.queueing.backends.rabbit.wire import Carried
from services.queueing.domain import Stored
from services.queueing.resources import MAX_SOUGHT, Subscription

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW = 1000.0


def test_what_is_older_and_was_held_then_is_over() -> None:
    subscription = Subscription("s", "t").passing_over(100.0, 200.0)
    assert subscription.is_past(99.0, 0.0)
    assert not subscription.is_past(100.0, 0.0)
    assert not subscription.is_past(99.0, 201.0)  # delivered again since
    assert subscription.settings() == Subscription("s", "t")


def test_an_earlier_time_brings_nothing_back_and_a_later_one_replaces_it() -> None:
    subscription = Subscription("s", "t").passing_over(100.0, 200.0).passing_over(50.0, 300.0)
    assert subscription.is_past(99.0, 0.0)
    assert subscription.is_past(49.0, 250.0)
    assert not subscription.is_past(99.0, 250.0)
    assert subscription.passing_over(150.0, 400.0).sought == ((150.0, 400.0),)


def test_of_ever_earlier_times_the_last_are_remembered() -> None:
    subscription = Subscription("s", "t")
    for n in range(MAX_SOUGHT * 2):
        subscription = subscription.passing_over(100.0 - n, 200.0 + n)
    assert len(subscription.sought) == MAX_SOUGHT


def held(number: int, key: str = "", not_before: float = 0.0) -> Held:
    stored = Stored(f"m{number}", "t", b"", {}, published=float(number), ordering_key=key)
    return Held(Carried(stored, expires=9000.0), number, 0, not_before=not_before)


def numbers(entries: Sequence[Held]) -> list[int]:
    return sorted(each.number for each in entries)


def test_ready_waiting_and_leased_messages_are_removed() -> None:
    subscription, holding = Subscription("s", "t"), Holding(ordered=False)
    for number in range(6):
        holding.admit(held(number, not_before=NOW + 60 if number >= 4 else 0.0), NOW)
    leases = holding.lease(subscription, 2, 1000, NOW)
    assert holding.counts() == (2, 2, 2)
    assert numbers(holding.remove(lambda each: each.number % 2 == 0, NOW)) == [0, 2, 4]
    assert holding.counts() == (1, 1, 1)
    assert numbers(holding.entries()) == [1, 3, 5]
    assert len(holding.present) == 3
    assert holding.take(leases[0].ack_id, NOW) is None
    assert holding.take(leases[1].ack_id, NOW) is not None
    assert numbers(holding.outlived(10_000.0)) == [3]


def test_what_is_behind_a_removed_message_of_its_key_may_go_out() -> None:
    subscription, holding = Subscription("s", "t", ordered=True), Holding(ordered=True)
    for number, key in enumerate("aaabbc"):
        holding.admit(held(number, key), NOW)
    (first,) = holding.lease(subscription, 1, 1000, NOW)
    assert (first.message.message_id, holding.counts()) == ("m0", (5, 1, 0))
    assert numbers(holding.remove(lambda each: each.number in {0, 4, 5}, NOW)) == [0, 4, 5]
    assert holding.counts() == (3, 0, 0)
    assert [d.message.message_id for d in holding.lease(subscription, 10, 1000, NOW)] == ["m1", "m3"]
    last = next(each for each in holding.entries() if each.number == 1)
    assert holding.release(last, NOW)
    assert [d.message.message_id for d in holding.lease(subscription, 10, 1000, NOW)] == ["m2"]
