"""Consuming: this replica's windows, and through the others theirs.

Of an unordered subscription each replica that is asked has a window of its own; of an ordered one, only the
replica that has leased it, since order within a key is kept in the window. A lease of a message is settled
where it was given out, wherever the consumer says so.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from services.queueing.backends.rabbit.claims import Claims
from services.queueing.backends.rabbit.intake import ARRIVAL_S
from services.queueing.backends.rabbit.link import BROKEN, end, interrupted
from services.queueing.backends.rabbit.others import FORWARD_S, Others, Say, ordered, said_of
from services.queueing.backends.rabbit.peers import Peers
from services.queueing.backends.rabbit.streams import Streams
from services.queueing.backends.rabbit.window import Window
from services.queueing.domain import Refusal
from services.queueing.resources import Priority
from services.runtime.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PlexusError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.publisher import Publisher
    from services.queueing.backends.rabbit.session import Settling
    from services.queueing.backends.rabbit.state import Guard, State
    from services.queueing.backends.rabbit.wire import Carried
    from services.queueing.domain import Delivery, Stats
    from services.queueing.resources import Subscription
    from services.queueing.state.leases import Leases

log = structlog.get_logger(__name__)

_FOLLOW_S = 1.0
_IDLE_S = 60.0
_UNASKED_S = 5.0
"""After this, what nobody asks for is given back to other replicas."""
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Counts:
    """What windows hold of a subscription.

    Attributes:
        ready: May be handed out.
        leased: With consumers.
        waiting: For their time.
        past_seek: Queues in which nothing waits any more that Seek has passed over.
    """

    ready: int
    leased: int
    waiting: int
    past_seek: frozenset[Priority]


class Consuming:
    """Hands out messages and takes them back; open it with `open`, end it with `close`."""

    def __init__(
        self,
        state: State,
        link: Link,
        publisher: Publisher,
        settling: Settling,
        leases: Leases,
        *,
        ordered_window: int,
        max_set_aside: int,
    ) -> None:
        """Set it up.

        Args:
            state: What RabbitMQ cannot hold.
            link: To RabbitMQ, for messages that come.
            publisher: To RabbitMQ.
            settling: Where messages go that are not acknowledged.
            leases: Of replicas that share the state.
            ordered_window: Messages of an ordered subscription that RabbitMQ delivers ahead.
            max_set_aside: Messages of it that may wait in the state, since their keys stand still.
        """
        self._ordered_window = ordered_window
        self._max_set_aside = max_set_aside
        self._state = state
        self._link = link
        self._settling = settling
        self._windows: dict[str, Window] = {}
        self._peers = Peers(link, publisher, self._answer)
        self._claims = Claims(leases, self._peers)
        self.replicas = Others(self._peers, self._claims, shared=state.shared)
        self.streams = Streams(self._claims, self._peers, shared=state.shared)
        self._others: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begin."""
        self._spawn(self._tend())
        if self._state.shared:
            self._spawn(self._peers.run())
            self._spawn(self._claims.run())

    async def close(self) -> None:
        """Give everything back."""
        await asyncio.gather(*(window.close() for window in self._windows.values()))
        if self._state.shared:
            await self._claims.close()
        await end(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Windows.

    async def _window(self, name: str) -> Window:
        while True:
            window = self._windows.get(name)
            if window is None:
                subscription = await self._state.attached(name)
                window = self._windows.get(name)
                if window is None:
                    window = self._windows[name] = Window(
                        subscription,
                        self._link,
                        self._settling,
                        shared=self._state.shared,
                        room=self._ordered_window,
                        most=self._max_set_aside,
                        address=lambda: self._peers.address,
                    )
                    window.open()
            await window.ready()
            if not window.closed:
                return window
            if self._windows.get(name) is window:
                del self._windows[name]

    @property
    def own(self) -> str:
        """The lease that says that this replica lives; empty while it has none, or is alone."""
        return self._claims.own if self._state.shared else ""

    def guard(self, name: str) -> Guard | None:
        """For transactions that only the replica may make that has an ordered subscription."""
        return self._claims.guard(ordered(name)) if self._state.shared else None

    def messages(self, name: str) -> list[Carried]:
        """What this replica holds of a subscription, in the order in which it came."""
        window = self._windows.get(name)
        return window.messages() if window is not None else []

    def expect(self, subscription: str, message_ids: Sequence[str]) -> None:
        """Messages were published here that this subscription will get."""
        window = self._windows.get(subscription)
        if window is not None:
            window.expect(message_ids)

    async def drop(self, name: str) -> None:
        """Close a subscription's window."""
        window = self._windows.pop(name, None)
        try:
            await self._claims.drop(ordered(name))  # first, lest another replica has us open it again
        finally:
            if window is not None:
                await window.close()

    async def change(self, subscription: Subscription) -> None:
        """Use other settings from now on; other replicas follow."""
        window = self._windows.get(subscription.name)
        if window is not None:
            await window.change(subscription)

    async def pass_over(self, subscription: Subscription) -> None:
        """Be done, at every replica, with what Seek has passed over.

        Raises:
            UnavailableError: A replica did not answer; it follows later.
        """
        await self.change(subscription)
        for answer in await self.replicas.ask_all({"what": "follow", "subscription": subscription.name}):
            if isinstance(answer, UnavailableError):  # one of the version before does not know the question
                raise answer

    async def _tend(self) -> None:
        """Follow what other replicas change, and give back what nobody asks for, for ever."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                if self._state.shared:
                    await self._state.fresh()
                    self._others = await self._claims.others()
            except PlexusError as error:
                log.warning("catalogue_not_followed", reason=error.reason)
                continue
            for name, window in list(self._windows.items()):
                try:
                    await self._look_after(name, window)
                except (*BROKEN, PlexusError) as error:
                    log.info("window_not_tended", subscription=name, error=type(error).__name__)
                except asyncio.CancelledError:
                    if not interrupted():
                        raise

    async def _look_after(self, name: str, window: Window) -> None:
        try:
            await window.change(await self._state.attached(name))
        except (NotFoundError, FailedPreconditionError):
            await self.drop(name)
            return
        bound = _UNASKED_S if self._state.shared else _IDLE_S
        if window.idle_s <= bound:
            return
        if not window.leased:
            await self.drop(name)
        elif self._state.shared:
            await window.rest()

    # Pulling.

    async def pull(self, name: str, max_messages: int, max_bytes: int, wait_s: float) -> list[Delivery]:
        """See Broker."""
        deadline = time.monotonic() + wait_s
        while True:
            subscription = await self._state.attached(name)
            owner = await self._owner(subscription)
            left = max(0.0, deadline - time.monotonic())
            if not owner:
                deliveries = await self._pull_here(subscription, max_messages, max_bytes, left)
            else:
                deliveries = await self.replicas.pull(owner, name, max_messages, max_bytes, left)
            if deliveries or time.monotonic() >= deadline:
                return deliveries

    async def _owner(self, subscription: Subscription) -> str:
        """The other replica that has an ordered subscription; empty if it is this one's to serve."""
        if not self._state.shared or not subscription.ordered:
            return ""
        name = subscription.name
        owner = await self._claims.take(ordered(name), lambda: self._spawn(self.drop(name)))
        return "" if owner == self._peers.address else owner

    async def _pull_here(
        self, subscription: Subscription, max_messages: int, max_bytes: int, wait_s: float
    ) -> list[Delivery]:
        deadline = time.monotonic() + wait_s
        name, apart = subscription.name, self._state.shared and subscription.ordered
        while not apart or self._claims.has(ordered(name)):
            window = await self._window(name)
            if wait_s == 0:
                # Beside others, what was published here may well arrive there.
                await window.arrivals(_RETRY_S if self._others else ARRIVAL_S)
            news = window.news()
            deliveries = window.lease(max_messages, max_bytes)
            left = deadline - time.monotonic()
            if deliveries or left <= 0:
                return deliveries
            try:
                with window.asked():
                    async with asyncio.timeout(left):
                        await news.wait()
            except TimeoutError:
                continue
        return []  # another replica has it now

    # Settling.

    async def acknowledge(self, name: str, ack_ids: Sequence[str]) -> list[str]:
        """See Broker."""

        async def here(ids: Sequence[str]) -> list[str]:
            window = await self._present(name)
            return list(ids) if window is None else await window.acknowledge(ids)

        return await self.replicas.settle(name, "acknowledge", [(ack_id, ack_id) for ack_id in ack_ids], here)

    async def nack(self, name: str, refusals: Sequence[Refusal]) -> list[str]:
        """See Broker."""

        async def here(said: Sequence[list[Any]]) -> list[str]:
            window = await self._present(name)
            given = [Refusal(*refusal) for refusal in said]
            return [refusal.ack_id for refusal in given] if window is None else await window.nack(given)

        said = [(r.ack_id, [r.ack_id, r.reason, r.delay_s, r.dead]) for r in refusals]
        return await self.replicas.settle(name, "nack", said, here)

    async def extend(self, name: str, leases: Sequence[tuple[str, float]]) -> list[str]:
        """See Broker."""

        async def here(said: Sequence[list[Any]]) -> list[str]:
            window = await self._present(name)
            return (
                [ack_id for ack_id, _ in said] if window is None else window.extend([(a, s) for a, s in said])
            )

        return await self.replicas.settle(
            name, "extend", [(ack_id, [ack_id, s]) for ack_id, s in leases], here
        )

    async def _present(self, name: str) -> Window | None:
        window = self._windows.get(name)
        if window is None:
            await self._state.subscription(name)
        return window

    # Answering other replicas.

    async def _answer(self, question: Say) -> Say:
        what, name = question.get("what"), str(question.get("subscription", ""))
        if what == "pull":
            return await self._answer_pull(name, question)
        if what in {"acknowledge", "nack", "extend"}:
            leases = question["leases"]
            if what == "acknowledge":
                expired = await self.acknowledge(name, leases)
            elif what == "nack":
                expired = await self.nack(name, [Refusal(*refusal) for refusal in leases])
            else:
                expired = await self.extend(name, [(ack_id, seconds) for ack_id, seconds in leases])
            return {"expired": expired}
        window = self._windows.get(name)
        if what == "counts":
            counts, past_seek = self._counts_here(name)
            return {"counts": counts, "past_seek": [int(level) for level in past_seek]}
        if what in {"clear", "settle"}:
            if window is not None:
                await (window.clear() if what == "clear" else window.settle())
            return {"there": window is not None}
        if what == "follow":
            await self._state.fresh()
            await self.change(await self._state.attached(name))
            return {}
        if what == "here":
            return {}
        raise InvalidArgumentError(f"a replica asks for {what!r}", reason="REPLICA_QUESTION_UNKNOWN")

    async def _answer_pull(self, name: str, question: Say) -> Say:
        if not self._claims.has(ordered(name)):
            return {"moved": True}
        deliveries = await self._pull_here(
            await self._state.attached(name),
            question["max_messages"],
            question["max_bytes"],
            min(question["wait_s"], FORWARD_S),
        )
        answer: Say = {"deliveries": [said_of(delivery) for delivery in deliveries]}
        if deliveries:
            leases = [[delivery.ack_id, 0.0] for delivery in deliveries]
            answer["given"] = {"subscription": name, "leases": leases}
        return answer

    # What concerns every replica.

    async def settle(self, subscription: Subscription) -> None:
        """Do, wherever messages are, what the time asks for."""
        name = subscription.name
        window = self._windows.get(name)
        if window is None:
            answers = await self.replicas.ask_all({"what": "settle", "subscription": name})
            if any(isinstance(answer, dict) and answer.get("there") for answer in answers):
                return
            if await self._owner(subscription):
                return
            window = await self._window(name)
        else:
            window = await self._window(name)
            await self.replicas.ask_all({"what": "settle", "subscription": name})
        await window.arrivals(_RETRY_S if self._others else ARRIVAL_S)
        await window.settle()

    def _counts_here(self, name: str) -> tuple[tuple[int, int, int], list[Priority]]:
        window = self._windows.get(name)
        return ((0, 0, 0), []) if window is None else (window.counts(), window.past_seek())

    async def counts(self, name: str) -> Counts:
        """Of all replicas that answer."""
        answers = await self.replicas.ask_all({"what": "counts", "subscription": name})
        here, past = self._counts_here(name)
        counted: list[Iterable[int]] = [here]
        past_seek = set(past)
        for said in answers:
            if isinstance(said, dict) and "counts" in said:
                counted.append(said["counts"])
                past_seek.update(map(Priority, said.get("past_seek", ())))
        ready, leased, waiting = (sum(column) for column in zip(*counted, strict=True))
        return Counts(ready, leased, waiting, frozenset(past_seek))

    def held(self, name: str, elsewhere: Stats) -> Stats:
        """What a subscription holds with what this replica has of it."""
        window = self._windows.get(name)
        return elsewhere if window is None else window.added_to(elsewhere)

    async def clear(self, name: str) -> None:
        """Be done with everything that any replica holds.

        Raises:
            UnavailableError: A replica did not answer.
        """
        for answer in await self.replicas.ask_all({"what": "clear", "subscription": name}):
            if isinstance(answer, PlexusError):
                raise answer
        if name in self._windows or not self._state.shared:
            await (await self._window(name)).clear()
