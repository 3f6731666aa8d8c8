"""Following a saga's history as it grows."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from services.queueing.sagas.domain import Record, SagaStore

ALIVE_S = 30.0
"""How long a watcher hears nothing; below the silence that proxies allow."""
_PAGE = 100


class Changes:
    """Tells watchers of this replica that a saga changed; `stopping` is set when they are to go elsewhere."""

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        self.stopping = stopping or asyncio.Event()
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def tell(self, saga_id: str) -> None:
        """Wake the watchers of a saga."""
        for event in self._watchers.get(saga_id, ()):
            event.set()

    @contextmanager
    def of(self, saga_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the saga changes."""
        event = asyncio.Event()
        self._watchers[saga_id].add(event)
        try:
            yield event
        finally:
            self._watchers[saga_id].discard(event)
            if not self._watchers[saga_id]:
                del self._watchers[saga_id]


async def watch(
    store: SagaStore, changes: Changes, saga_id: str, after: int, *, poll_s: float, alive_s: float = ALIVE_S
) -> AsyncIterator[Record | None]:
    """The history of a saga after a revision, and then what is added, until the saga has ended.

    Args:
        store: Where it is.
        changes: Of this replica.
        saga_id: Which.
        after: The last revision that is known.
        poll_s: How often to look for what other replicas did.
        alive_s: None is given when nothing happened for so long.

    Raises:
        NotFoundError: No such saga.
        UnavailableError: The service stops: another replica knows how it goes on.
    """
    loop = asyncio.get_running_loop()
    with changes.of(saga_id) as changed:
        heard = loop.time()
        while True:
            changed.clear()
            saga = await store.get(saga_id)  # before the history: what ends it is then in there
            while records := await store.events(saga_id, limit=_PAGE, after=after):
                for record in records:
                    yield record
                after, heard = records[-1].revision, loop.time()
            if saga.state.ended:
                return
            if changes.stopping.is_set():
                raise UnavailableError("the service is stopping", reason="STOPPING")
            if loop.time() - heard >= alive_s:
                yield None
                heard = loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await changed.wait()
