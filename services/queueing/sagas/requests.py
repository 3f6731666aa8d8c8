"""The channel between sagas and the workers that do their steps: requests out, replies in."""

from __future__ import annotations

import asyncio
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
    PlexusError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.queueing.domain import Broker, Delivery
    from services.queueing.sagas.definitions import Action, Definition
    from services.queueing.sagas.domain import Attempt, Saga

log = structlog.get_logger(__name__)

REPLIES = "plexus.sagas.replies"
"""The topic, and its subscription, where the replies of all workers go; any replica reads them."""
SAGA, STEP, PHASE = "plexus-saga", "plexus-saga-step", "plexus-saga-phase"
"""Attributes of a request, for filters: the saga's id, the step's name, `action` or `compensation`."""
_BATCH = 100
_BYTES = 4 * 1024 * 1024
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

    async def send(self, requests: Sequence[tuple[Saga, Definition]]) -> list[Failed | PlexusError | None]:
        """Send the requests of attempts, again under the same ids if they may have been sent before.

        Returns:
            For each None if it was sent, else why it cannot be sent, or an error of the broker that passes.
        """
        answers: list[Failed | PlexusError | None] = [None] * len(requests)
        topics: dict[str, list[tuple[int, str, Message]]] = {}
        for position, (saga, definition) in enumerate(requests):
            action = saga.action_of(definition)
            if saga.attempt is None:
                raise ValueError(f"nothing to send of saga {saga.id!r}")
            message = _message(saga, saga.attempt, action)
            topics.setdefault(action.topic, []).append((position, saga.attempt.call_id, message))

        async def one(topic: str, jobs: list[tuple[int, str, Message]]) -> None:
            for part in _parts(jobs):
                for (position, _, _), answer in zip(part, await self._publish(topic, part), strict=True):
                    answers[position] = answer

        async with asyncio.TaskGroup() as group:
            for topic, jobs in topics.items():
                group.create_task(one(topic, jobs))
        return answers

    async def _publish(
        self, topic: str, jobs: Sequence[tuple[int, str, Message]]
    ) -> list[Failed | PlexusError | None]:
        """Publish to one topic; what is refused together is tried one by one."""
        answers: list[Failed | PlexusError | None] = [None] * len(jobs)
        try:
            subscribers = await self._broker.subscribers(topic)
            wanted: list[Message] = []
            for position, (_, call_id, message) in enumerate(jobs):
                if any(each.wants(message.attributes) for each in subscribers):
                    wanted.append(message)
                else:
                    problem = Problem("UNAVAILABLE", f"nobody subscribes to topic {topic!r}")
                    answers[position] = Failed(call_id, problem, untouched=True)
            if wanted:
                await self._broker.publish(topic, wanted)
        except (NotFoundError, FailedPreconditionError, InvalidArgumentError) as error:
            if len(jobs) > 1:
                return [answer for job in jobs for answer in await self._publish(topic, [job])]
            problem = Problem("FAILED_PRECONDITION", f"{topic}: {error.message}")
            return [Failed(jobs[0][1], problem, untouched=True)]
        except PlexusError as error:
            return [answer or error for answer in answers]
        return answers

    async def receive(self) -> Sequence[Delivery]:
        """Replies, waiting for the first.

        Raises:
            PlexusError: The broker is away.
        """
        try:
            return await self._broker.pull(REPLIES, max_messages=_BATCH, max_bytes=4 * _BYTES, wait_s=_WAIT_S)
        except NotFoundError:  # not made yet, or deleted by somebody
            await self.open()
            return ()

    async def done(self, deliveries: Sequence[Delivery]) -> None:
        """Be done with replies."""
        await self._broker.acknowledge(REPLIES, [delivery.ack_id for delivery in deliveries])

    async def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Have replies come again, however often, since it is no fault of theirs."""
        await self._broker.extend(REPLIES, [(delivery.ack_id, 0.0) for delivery in deliveries])


def _message(saga: Saga, attempt: Attempt, action: Action) -> Message:
    """The request of an attempt."""
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
    return Message(
        json_text(content).encode(),
        attributes,
        dedup_id=attempt.call_id,
        ordering_key=saga.id,
        ttl_s=action.timeout_s,  # nobody waits for it any longer, and it must not overtake what follows
        correlation_id=saga.id,
    )


def _parts(jobs: list[tuple[int, str, Message]]) -> Iterator[list[tuple[int, str, Message]]]:
    """Requests in parts that are published together, of a bounded size."""
    part: list[tuple[int, str, Message]] = []
    size = 0
    for job in jobs:
        size += len(job[2].data)
        if part and (len(part) == _BATCH or size > _BYTES):
            yield part
            part, size = [], len(job[2].data)
        part.append(job)
    if part:
        yield part


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
