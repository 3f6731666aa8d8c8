"""The channel between sagas and the workers that do their steps: requests out, replies in."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from services.queueing.domain import Message
from services.queueing.replies import Kind, Request, reply_of
from services.queueing.resources import Backoff, RetryPolicy, Subscription, Topic
from services.queueing.sagas.codec import json_text
from services.queueing.sagas.domain import Problem, saga_of
from services.queueing.sagas.machine import Failed, Succeeded
from services.queueing.sagas.results import result_of_reply, text_of
from services.runtime.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Broker, Delivery
    from services.queueing.sagas.definitions import Action
    from services.queueing.sagas.domain import Attempt, Saga

log = structlog.get_logger(__name__)

REPLIES = "plexus.sagas.replies"
"""The topic, and its subscription, where the replies of all workers go; any replica reads them."""
SAGA, STEP, PHASE = "plexus-saga", "plexus-saga-step", "plexus-saga-phase"
"""Attributes of a request, for filters: the saga's id, the step's name, `action` or `compensation`."""
_BATCH = 100
_BYTES = 16 * 1024 * 1024
_WAIT_S = 30.0
_FAR = RetryPolicy(Backoff.FIXED, 1.0, 1.0, max_attempts=1000)


class Channel:
    """Sends requests to workers, and receives their replies."""

    def __init__(self, broker: Broker, *, ack_deadline_s: float = 10.0) -> None:
        """Set it up.

        Args:
            broker: Carries both ways.
            ack_deadline_s: How long replies are left to a replica that has fallen silent.
        """
        self._broker = broker
        self._ack_deadline_s = ack_deadline_s

    async def open(self) -> None:
        """Make the topic of replies and its subscription."""
        with suppress(AlreadyExistsError):
            await self._broker.create_topic(Topic(REPLIES))
        with suppress(AlreadyExistsError):
            await self._broker.create_subscription(
                Subscription(REPLIES, REPLIES, ack_deadline_s=self._ack_deadline_s, retry=_FAR)
            )

    async def send(self, saga: Saga, attempt: Attempt, action: Action) -> Failed | None:
        """Send the request of an attempt, again under the same id if it may have been sent before.

        Returns:
            Why it cannot be sent; None if it was.

        Raises:
            PlexusError: The broker cannot take it now.
        """
        phase = "compensation" if saga.undoing else "action"
        step = saga.steps[saga.position].name
        content = {
            "saga_id": saga.id,
            "step": step,
            "phase": phase,
            "attempt": attempt.number,
            "input": saga.input,
            "results": saga.results,
        }
        request = Request(REPLIES, attempt.call_id, time.time() + action.timeout_s)
        attributes = {**request.attributes(), SAGA: saga.id, STEP: step, PHASE: phase}
        if saga.trace:
            attributes["traceparent"] = saga.trace
        message = Message(
            json_text(content).encode(),
            attributes,
            dedup_id=attempt.call_id,
            ordering_key=saga.id,
            ttl_s=action.timeout_s,  # nobody waits for it any longer, and it must not overtake what follows
            correlation_id=saga.id,
        )
        try:
            subscribers = await self._broker.subscribers(action.topic)
            if not any(each.wants(attributes) for each in subscribers):
                problem = Problem("UNAVAILABLE", f"nobody subscribes to topic {action.topic!r}")
                return Failed(attempt.call_id, problem, untouched=True)
            await self._broker.publish(action.topic, [message])
        except (NotFoundError, FailedPreconditionError, InvalidArgumentError) as error:
            problem = Problem("FAILED_PRECONDITION", f"{action.topic}: {error.message}")
            return Failed(attempt.call_id, problem, untouched=True)
        return None

    async def receive(self) -> Sequence[Delivery]:
        """Replies, waiting for the first.

        Raises:
            PlexusError: The broker is away.
        """
        try:
            return await self._broker.pull(REPLIES, max_messages=_BATCH, max_bytes=_BYTES, wait_s=_WAIT_S)
        except NotFoundError:  # not made yet, or deleted by somebody
            await self.open()
            return ()

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        """Be done with replies."""
        await self._broker.acknowledge(REPLIES, [delivery.ack_id for delivery in deliveries])

    async def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Have replies come again, however often, since it is no fault of theirs."""
        await self._broker.extend(REPLIES, [(delivery.ack_id, 0.0) for delivery in deliveries])


def answer_in(delivery: Delivery) -> tuple[str, Succeeded | Failed] | None:
    """The saga and the event of a reply; None of what is no answer: progress, or nothing of ours."""
    reply = reply_of(delivery.message.attributes, delivery.data)
    saga_id = saga_of(reply.call_id) if reply is not None else ""
    if reply is None or not saga_id:
        log.warning("saga_reply_not_readable", message_id=delivery.message.message_id)
        return None
    if reply.kind is Kind.PROGRESS:
        return None
    if reply.kind is Kind.RESULT:
        return saga_id, result_of_reply(reply.call_id, reply.data)
    problem = Problem(reply.code[:64] or "UNKNOWN", text_of(reply.data))
    return saga_id, Failed(reply.call_id, problem)
