"""What comes from the broker: handed out at once, or looked into first since it may be over already."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import structlog

from services.queueing.backends.rabbit.held import Held, Identity
from services.queueing.backends.rabbit.topology import level_of
from services.queueing.backends.rabbit.wire import AGAIN, read
from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import DeliveredMessage

    from services.queueing.backends.rabbit.alarm import Alarm
    from services.queueing.backends.rabbit.aside import Aside
    from services.queueing.backends.rabbit.session import Current, Session, Settling

log = structlog.get_logger(__name__)

_REMEMBERED = 20_000
_CHECKED = 500
_RETRY_S = 0.2
_SKEW_S = 5.0


class Admission:
    """Lets messages into a window's session; `run` is its life."""

    def __init__(
        self, current: Current, settling: Settling, aside: Aside, alarm: Alarm, *, shared: bool
    ) -> None:
        """Set it up.

        Args:
            current: Of the window.
            settling: Knows what is over.
            aside: Of the window.
            alarm: Of the window.
            shared: Whether other processes consume the same subscription.
        """
        self._current = current
        self._settling = settling
        self._aside = aside
        self._alarm = alarm
        # Doubles of what was published later are known by their ids here, those of before by the state.
        self._doubtful_to = math.inf if shared else time.time() + _SKEW_S
        self._seen: OrderedDict[Identity, None] = OrderedDict()
        self._doubtful: asyncio.Queue[tuple[Session, Held]] = asyncio.Queue()

    def arrive(self, session: Session, incoming: DeliveredMessage) -> None:
        """A message came over a session's channel."""
        subscription, holding = self._current.subscription, session.holding
        headers = incoming.header.properties.headers or {}
        message_id = incoming.header.properties.message_id
        carried = read(message_id, headers, incoming.body, topic=incoming.routing_key or "")
        held = Held(
            carried,
            next(self._current.numbers),
            carried.attempts,
            tag=incoming.delivery_tag or 0,
            redelivered=bool(incoming.redelivered),
            repeated=AGAIN in headers,
            since=time.time(),
        )
        session.out += 1
        session.entered[level_of(subscription, carried.stored.priority)] = max(
            carried.stored.published, carried.made
        )
        if not carried.expires and subscription.ttl_s:
            carried.expires = max(carried.stored.published, 1.0) + subscription.ttl_s
        carried.once = carried.once or subscription.exactly_once
        holding.awaited.pop(carried.stored.message_id, None)
        # Behind those of an ordered subscription that are being asked for, so that nothing overtakes them.
        if self._is_doubtful(session, held) or (subscription.ordered and holding.checking):
            holding.checking += 1
            self._doubtful.put_nowait((session, held))
        else:
            self._admit(session, held)
        session.arrived.set()

    def _is_doubtful(self, session: Session, held: Held) -> bool:
        """Whether it takes a while to say that this message is to be handed out."""
        return (
            self._must_ask(held)
            or held.identity in self._seen
            or held.identity in session.holding.present
            or not held.carried.wanted(self._current.subscription)
        )

    def _must_ask(self, held: Held) -> bool:
        """Whether only the state knows that this message is over."""
        carried = held.carried
        if held.redelivered or held.repeated:
            return True
        old = carried.stored.published < self._doubtful_to
        return carried.once and bool(old or carried.copy or carried.attempts)

    def _admit(self, session: Session, held: Held) -> None:
        self._seen[held.identity] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        session.holding.admit(held, held.since)
        if session.holding.busy:
            self._current.errands.set()
        self._alarm.plan(min(held.carried.expires or math.inf, self._aside.next_time(held.since)))
        self._alarm.wake()

    async def run(self) -> None:
        """Look into what is doubtful, for ever."""
        while True:
            session, held = await self._doubtful.get()
            some = [held]
            while not self._doubtful.empty() and len(some) < _CHECKED:
                other, held = self._doubtful.get_nowait()
                if other is not session:
                    some.clear()  # their channel is gone, and the broker has them back
                    session = other
                some.append(held)
            while session is self._current.session:
                try:
                    await self._look_into(session, some)
                    break
                except PlexusError as error:
                    name = self._current.subscription.name
                    log.warning("messages_stuck", subscription=name, reason=error.reason)
                    await asyncio.sleep(_RETRY_S)
            session.holding.checking -= len(some)
            session.arrived.set()

    async def _look_into(self, session: Session, some: Sequence[Held]) -> None:
        subscription = self._current.subscription
        asked = [held for held in some if self._must_ask(held)]
        over: set[int] = set()
        if asked:
            known = await self._settling.settled(subscription, [held.carried for held in asked])
            over = {held.number for held, done in zip(asked, known, strict=True) if done}
        dropped = []
        for held in some:
            again = held.identity in session.holding.present
            seen = held.identity in self._seen and not held.redelivered
            wanted = held.carried.wanted(subscription)
            if again or seen or not wanted or held.number in over:
                dropped.append(held)
            elif session is self._current.session:
                self._admit(session, held)
        await session.tell(dropped)
