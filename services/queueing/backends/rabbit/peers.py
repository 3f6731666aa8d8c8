"""Replicas that ask one another, over RabbitMQ.

A lease belongs to the replica whose channel has the message; a consumer may settle it anywhere. Each replica
has an exclusive queue, gone with its connection as its leases are, and a new one, under a new address, with
the next: what is asked of an address that is no more is returned by the broker at once.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import TYPE_CHECKING, Any

import structlog

from services.queueing.backends.rabbit.link import BROKEN, away, end, interrupted
from services.queueing.backends.rabbit.topology import DIRECT, replica_name
from services.queueing.backends.rabbit.wire import Packet
from services.runtime import errors
from services.runtime.errors import NotFoundError, PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from services.queueing.backends.rabbit.link import Link
    from services.queueing.backends.rabbit.publisher import Publisher

log = structlog.get_logger(__name__)

_ADDRESS = re.compile(r"([0-9a-f]{16})\.")
_REPLY_TO = "plexus-replica"
_DEADLINE_S = 10.0
_RETRY_S = 0.5
_AT_ONCE = 200
_EXPIRES_MS = 60_000

Answer = dict[str, Any]


class GoneError(NotFoundError):
    """No replica has this address any more: all leases of it have ended."""


def address_in(ack_id: str) -> str:
    """Of the replica that gave out a lease; empty if the id does not tell."""
    found = _ADDRESS.match(ack_id)
    return found[1] if found else ""


class Peers:
    """This replica's address, and a way to the others; `run` is its life."""

    def __init__(
        self, link: Link, publisher: Publisher, answer: Callable[[Answer], Awaitable[Answer]]
    ) -> None:
        """Set it up.

        Args:
            link: Whose end is the end of all leases given out here.
            publisher: To RabbitMQ.
            answer: What this replica says to a question; errors of ours are passed on.
        """
        self._link = link
        self._publisher = publisher
        self._answer = answer
        self._address = ""
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._listening = asyncio.Event()

    @property
    def address(self) -> str:
        """Of this replica for as long as its connection lasts; empty without one."""
        return self._address

    async def ready(self) -> str:
        """Wait for an address.

        Raises:
            UnavailableError: There is none in time.
        """
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await self._listening.wait()
        except TimeoutError:
            raise away() from None
        return self._address

    async def run(self) -> None:
        """Listen, for ever."""
        try:
            while True:
                try:
                    channel = await self._listen()
                    closed = asyncio.Event()
                    channel.close_callbacks.add(lambda *_, closed=closed: closed.set())
                    if not channel.is_closed:
                        await closed.wait()
                except (*BROKEN, PlexusError, TimeoutError) as error:
                    log.info("replica_not_listening", error=type(error).__name__)
                except asyncio.CancelledError:
                    if not interrupted():
                        raise
                self._deafen()
                await asyncio.sleep(_RETRY_S)
        finally:
            self._deafen()
            await end(self._tasks)

    def _deafen(self) -> None:
        self._address = ""
        self._listening.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(away())

    async def _listen(self) -> AbstractChannel:
        await self._publisher.prepare()
        address = uuid.uuid4().hex[:16]
        name = replica_name(address)
        channel = await self._link.channel()
        queue = await channel.declare_queue(name, exclusive=True, arguments={"x-expires": _EXPIRES_MS})
        await queue.bind(DIRECT, name)
        await queue.consume(self._hear, no_ack=True)
        self._address = address
        self._listening.set()
        return channel

    async def _hear(self, incoming: AbstractIncomingMessage) -> None:
        said: Answer = json.loads(incoming.body)
        if _REPLY_TO not in incoming.headers:
            future = self._waiting.get(incoming.message_id or "")
            if future is not None and not future.done():
                future.set_result(said)
            elif said.get("given"):
                await self._return(said["given"])
            return
        task = asyncio.create_task(self._reply(incoming, said))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _return(self, given: Answer) -> None:
        """Give back at once what came too late to be handed on."""
        address = address_in(str(given["leases"][0][0]))
        task = asyncio.create_task(self._quietly(address, {"what": "extend", **given}))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, address: str, question: Answer) -> None:
        try:
            await self.ask(address, question)
        except PlexusError as error:
            log.info("replica_silent", reason=error.reason)

    async def _reply(self, incoming: AbstractIncomingMessage, question: Answer) -> None:
        async with self._room:
            try:
                answer = await self._answer(question)
            except PlexusError as error:
                answer = {"error": type(error).__name__, "text": error.message, "reason": error.reason}
            reply = Packet(json.dumps(answer).encode(), {}, incoming.message_id or "")
            try:
                to = str(incoming.headers[_REPLY_TO])
                (arrived,) = await self._publisher.publish(DIRECT, [(to, reply)])
            except PlexusError:
                arrived = False
            if not arrived and answer.get("given"):
                await self._answer({"what": "extend", **answer["given"]})

    async def ask(self, address: str, question: Answer, *, wait_s: float = 0.0) -> Answer:
        """Ask a replica, which may take `wait_s` more than the usual time.

        Raises:
            GoneError: There is none under this address.
            UnavailableError: It did not answer in time.
            PlexusError: What it raised.
        """
        own = await self.ready()
        correlation = uuid.uuid4().hex
        future = self._waiting[correlation] = asyncio.get_running_loop().create_future()
        packet = Packet(json.dumps(question).encode(), {_REPLY_TO: replica_name(own)}, correlation)
        try:
            (there,) = await self._publisher.publish(DIRECT, [(replica_name(address), packet)])
            if not there:
                raise GoneError("the replica that gave out these leases is gone", reason="REPLICA_GONE")
            async with asyncio.timeout(_DEADLINE_S + wait_s):
                answer: Answer = await future
        except TimeoutError:
            raise UnavailableError(
                "the replica that gave out these leases does not answer",
                dependency="queueing",
                reason="REPLICA_SILENT",
                retry_after_s=1,
            ) from None
        finally:
            del self._waiting[correlation]
            if future.done() and not future.cancelled():
                future.exception()
        if "error" in answer:
            kind = getattr(errors, answer["error"], UnavailableError)
            raise kind(answer["text"], reason=answer["reason"])
        return answer
