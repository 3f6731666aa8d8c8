"""Connections that are made anew when they break.

aio-pika's robust connections restore channels and consumers on their own and can do so in part, in silence; a
plain connection that is thrown away with everything on it has one state less to be in.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aio_pika
import structlog
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, ProbableAuthenticationError

from services.queueing.backends.rabbit.blocked import Blocked
from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from aio_pika.abc import AbstractChannel, AbstractConnection

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


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their end.

    Python 3.11's `wait_for`, which aio-pika waits with, forgets a cancellation that comes with the result, so
    that one is not enough.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_RETRY_S)


class Link:
    """A connection, made when it is first needed and again when it broke."""

    def __init__(self, url: str, *, name: str, heartbeat_s: int) -> None:
        self._url = url
        self._name = name
        self._heartbeat_s = heartbeat_s
        self._connection: AbstractConnection | None = None
        self._lock = asyncio.Lock()
        self._blocked = Blocked()

    @property
    def blocked(self) -> str:
        """Why the broker takes no messages, in its words; empty while it does, or has not said."""
        return self._blocked.reason

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

    @asynccontextmanager
    async def lent(self, why: str = "RabbitMQ cannot be reached") -> AsyncIterator[AbstractChannel]:
        """A channel of the block's own, which a refusal of the broker closes.

        Raises:
            UnavailableError: The broker cannot be reached, or refuses; `why` says what it was for.
        """
        channel = await self.channel()
        try:
            yield channel
        except BROKEN as error:
            raise away(why) from error
        except asyncio.CancelledError:
            if interrupted():
                raise away(why) from None
            raise
        finally:
            if not channel.is_closed:
                await channel.close()

    async def _connect(self) -> AbstractConnection:
        connection = await aio_pika.connect(
            self._url,
            timeout=_CONNECT_S,
            heartbeat=self._heartbeat_s,
            client_properties={"connection_name": self._name},
        )
        self._blocked.follow(connection.transport and connection.transport.connection)
        log.info("broker_connected", connection=self._name)
        return connection

    async def close(self) -> None:
        """Close it; what does not answer in time is left."""
        self._blocked.end()
        if self._connection is not None:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await self._connection.close()
            except (*BROKEN, TimeoutError) as error:
                log.info("broker_close_failed", error=type(error).__name__)
