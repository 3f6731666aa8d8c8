"""Connections that are made anew when they break, and publishing that is sure or says that it is not.

aio-pika's robust connections restore channels and consumers on their own and can do so in part, in silence; a
plain connection that is thrown away with everything on it has one state less to be in.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aio_pika
import structlog
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, ProbableAuthenticationError
from aiormq.abc import DeliveredMessage

from services.queueing.backends.rabbit.topology import DEAD, EXCHANGES, UNCLAIMED
from services.queueing.backends.rabbit.wire import AGAIN
from services.runtime.errors import PlexusError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange

log = structlog.get_logger(__name__)

BROKEN = (AMQPError, ChannelInvalidStateError, ConnectionError, OSError, RuntimeError)
"""What aio-pika raises when a connection or a channel is gone; also CancelledError, see `interrupted`."""
DEPENDENCY = "rabbitmq"
_CONNECT_S = 10.0
_CLOSE_S = 5.0
_RETRY_S = 0.2


def away(why: str = "RabbitMQ cannot be reached") -> UnavailableError:
    """The one error for a broker that is not there."""
    return UnavailableError(why, dependency=DEPENDENCY, reason="BROKER_UNAVAILABLE", retry_after_s=1)


def interrupted() -> bool:
    """Whether a CancelledError is aio-pika's, whose waits end so with the connection, not our caller's."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0


class Link:
    """A connection, made when it is first needed and again when it broke."""

    def __init__(self, url: str, *, name: str, heartbeat_s: int) -> None:
        self._url = url
        self._name = name
        self._heartbeat_s = heartbeat_s
        self._connection: AbstractConnection | None = None
        self._lock = asyncio.Lock()

    async def channel(self, *, confirms: bool = False) -> AbstractChannel:
        """A new channel.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        try:
            async with asyncio.timeout(_CONNECT_S):
                async with self._lock:
                    # `is_closed` tells only of our own close; a connection that broke is not `connected`.
                    if self._connection is None or not self._connection.connected.is_set():
                        self._connection = await self._connect()
                return await self._connection.channel(publisher_confirms=confirms)
        except ProbableAuthenticationError as error:
            raise away("RabbitMQ refuses our credentials") from error
        except (*BROKEN, TimeoutError) as error:
            raise away() from error
        except asyncio.CancelledError:
            if interrupted():
                raise away() from None
            raise

    async def _connect(self) -> AbstractConnection:
        connection = await aio_pika.connect(
            self._url,
            timeout=_CONNECT_S,
            heartbeat=self._heartbeat_s,
            client_properties={"connection_name": self._name},
        )
        log.info("broker_connected", connection=self._name)
        return connection

    async def close(self) -> None:
        """Close it; what does not answer in time is left."""
        if self._connection is not None:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await self._connection.close()
            except (*BROKEN, TimeoutError) as error:
                log.info("broker_close_failed", error=type(error).__name__)


class Publisher:
    """Publishes with confirms on one channel, trying again until a deadline."""

    def __init__(self, link: Link, *, deadline_s: float) -> None:
        self._link = link
        self._deadline_s = deadline_s
        self._channel: AbstractChannel | None = None
        self._exchanges: dict[str, AbstractExchange] = {}
        self._lock = asyncio.Lock()

    async def _ready(self) -> dict[str, AbstractExchange]:
        if self._channel is not None and not self._channel.is_closed:
            return self._exchanges
        async with self._lock:
            if self._channel is None or self._channel.is_closed:
                channel = await self._link.channel(confirms=True)
                self._exchanges = {
                    name: await channel.declare_exchange(name, aio_pika.ExchangeType(kind), durable=True)
                    for name, kind in EXCHANGES.items()
                }
                unclaimed = await channel.declare_queue(
                    UNCLAIMED, durable=True, arguments={"x-queue-type": "quorum"}
                )
                await unclaimed.bind(DEAD, "")
                self._channel = channel
        return self._exchanges

    async def prepare(self) -> None:
        """Declare what exists before the first subscription.

        Raises:
            UnavailableError: The broker cannot be reached.
        """
        try:
            await self._ready()
        except BROKEN as error:
            raise away() from error

    async def publish(self, exchange: str, messages: Sequence[tuple[str, aio_pika.Message]]) -> list[bool]:
        """Publish pairs of routing key and message, in order; for each, whether a queue has it.

        A message whose confirmation did not come is published again with the same id until the deadline.

        Raises:
            UnavailableError: The broker cannot be reached; some messages may have been stored.
            ResourceExhaustedError: The broker takes no messages now: its memory or disk is short, or it is
                overloaded. Some may be stored later.
        """
        deadline = time.monotonic() + self._deadline_s
        results = await asyncio.gather(
            *(self._publish(exchange, key, message, deadline) for key, message in messages),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result is True for result in results]

    async def _publish(self, exchange: str, key: str, message: aio_pika.Message, deadline: float) -> bool:
        failure: PlexusError = away()
        while (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    exchanges = await self._ready()
                    confirmation = await exchanges[exchange].publish(message, key, mandatory=True)
                return not isinstance(confirmation, DeliveredMessage)
            except TimeoutError:
                raise ResourceExhaustedError(
                    "RabbitMQ takes no messages now: its memory or disk is short, or it is overloaded",
                    reason="BROKER_BLOCKED",
                    retry_after_s=5,
                ) from None
            except UnavailableError as error:
                failure = error
            except BROKEN:
                failure = away()
            except asyncio.CancelledError:
                if not interrupted():
                    raise
                failure = away()
            message.headers[AGAIN] = 1  # it may be there, unconfirmed
            await asyncio.sleep(_RETRY_S)
        raise failure
