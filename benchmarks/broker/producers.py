"""Producers that know what was confirmed to them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from plexus.queueing.v1 import queueing_pb2 as pb

if TYPE_CHECKING:
    from plexus.queueing.v1.queueing_pb2_grpc import QueueingServiceStub as Stub

_RETRY_S = 0.2
_PUBLISH_S = 20.0
_TWICE = 0.15
_PRIORITIES = (pb.PRIORITY_LOW, pb.PRIORITY_NORMAL, pb.PRIORITY_HIGH, pb.PRIORITY_CRITICAL)


@dataclass(slots=True)
class Confirmed:
    """What producers were told.

    Attributes:
        ids: Message ids by name; of a message published twice within its window there must be one.
        deduplicated: Names of messages with a deduplication id.
        begun: By name, when its first publish began, for messages without a delay.
        unknown: Messages without a deduplication id whose publish failed: they may be stored or not.
        errors: Status codes of failed calls.
    """

    ids: dict[str, set[str]] = field(default_factory=dict)
    deduplicated: set[str] = field(default_factory=set)
    begun: dict[str, float] = field(default_factory=dict)
    unknown: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Producer:
    """Publishes batches, half of them with deduplication ids; those until they are confirmed, some again."""

    def __init__(self, stub: Stub, topic: str, number: int, seed: int, told: Confirmed) -> None:
        self._stub = stub
        self._topic = topic
        self._number = number
        self._dice = random.Random(f"{seed} producer {number}")  # noqa: S311 - repeatable
        self._told = told
        self._count = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until told to stop; what must be confirmed is confirmed then."""
        again: list[tuple[float, list[pb.Message]]] = []
        while not stop.is_set():
            deduplicated = self._dice.random() < 0.5
            messages = [self._message(deduplicated=deduplicated) for _ in range(self._dice.randint(1, 20))]
            if deduplicated:
                await self._insist(messages)
                if self._dice.random() < _TWICE:
                    again.append((time.monotonic() + self._dice.uniform(0, 5), messages))
            elif not await self._publish(messages, time.time()):
                self._told.unknown += len(messages)
            while again and again[0][0] < time.monotonic():
                await self._insist(again.pop(0)[1])
            await asyncio.sleep(self._dice.uniform(0, 0.2))
        for _, messages in again:
            await self._insist(messages)

    def _message(self, *, deduplicated: bool) -> pb.Message:
        self._count += 1
        name = f"{self._number}-{self._count}"
        message = pb.Message(data=name.encode(), priority=self._dice.choice(_PRIORITIES))
        if deduplicated:
            message.dedup_id = name
            self._told.deduplicated.add(name)
        if self._dice.random() < 0.1:
            message.delay.FromMilliseconds(self._dice.randint(100, 3000))
        return message

    async def _insist(self, messages: list[pb.Message]) -> None:
        began = time.time()
        while True:
            if await self._publish(messages, began):
                return
            await asyncio.sleep(_RETRY_S)

    async def _publish(self, messages: list[pb.Message], began: float) -> bool:
        request = pb.PublishRequest(topic=self._topic, messages=messages)
        try:
            answer = await self._stub.Publish(request, timeout=_PUBLISH_S)
        except grpc.aio.AioRpcError as error:
            self._told.errors[error.code().name] += 1
            return False
        for message, message_id in zip(messages, answer.message_ids, strict=True):
            name = message.data.decode()
            self._told.ids.setdefault(name, set()).add(message_id)
            if not message.HasField("delay"):
                self._told.begun.setdefault(name, began)
        return True
