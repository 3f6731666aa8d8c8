"""Following a saga's history as it grows.

What this replica writes is told to its watchers as it is stored, without reading it again; of the newest
sagas that it started it knows the whole history. What others write is found by comparing revisions.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from services.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from services.queueing.sagas.contract import SagaStore
    from services.queueing.sagas.domain import Record

ALIVE_S = 30.0
"""How long a watcher hears nothing; below the silence that proxies allow."""
_PAGE = 100
_SAGAS = 2000
_RECORDS = 100
_REMEMBERED_S = 10.0
"""Of so many sagas so much history is remembered, if it is whole, for those that begin to watch now."""


class Watcher:
    """Somebody who follows a saga, and what he was told and has not passed on yet."""

    def __init__(self) -> None:
        self.told: list[Record] = []
        self.seen = 0
        self.behind = True
        self.changed = asyncio.Event()

    def take(self) -> list[Record]:
        """What was told and follows what is seen; `behind` says that there may be more in the store."""
        told, self.told = self.told, []
        self.changed.clear()
        fresh: list[Record] = []
        for record in told:
            if record.revision == self.seen + 1:
                self.seen = record.revision
                fresh.append(record)
            elif record.revision > self.seen:
                self.behind = True
                break
        return fresh

    def tell(self, records: Sequence[Record]) -> None:
        """Pass on what was added; of one who does not keep up nothing is kept."""
        if len(self.told) + len(records) > _RECORDS:
            self.told, self.behind = [], True
        else:
            self.told += records
        self.changed.set()


class Changes:
    """Tells watchers of this replica that a saga changed; `stopping` is set when they are to go elsewhere."""

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        self.stopping = stopping or asyncio.Event()
        self._watchers: defaultdict[str, set[Watcher]] = defaultdict(set)
        self._newest: OrderedDict[str, list[Record]] = OrderedDict()

    def tell(self, saga_id: str, records: Sequence[Record]) -> None:
        """Pass on what was added to a saga's history."""
        self._remember(saga_id, records)
        for watcher in self._watchers.get(saga_id, ()):
            watcher.tell(records)

    def _remember(self, saga_id: str, records: Sequence[Record]) -> None:
        known = (
            self._newest.setdefault(saga_id, []) if records[0].revision == 1 else self._newest.get(saga_id)
        )
        if known is None:
            return
        follows = records[0].revision == len(known) + 1
        if not follows or len(known) + len(records) > _RECORDS:
            del self._newest[saga_id]  # another replica wrote in between, or it becomes too long
            return
        known += records
        self._forget_old()

    def _forget_old(self) -> None:
        """Forget the oldest: ids may be used again when a saga is forgotten by the store."""
        before = time.time() - _REMEMBERED_S
        while self._newest:
            oldest = next(iter(self._newest))
            if len(self._newest) <= _SAGAS and self._newest[oldest][0].time >= before:
                return
            del self._newest[oldest]

    def watched(self) -> list[str]:
        """The sagas that somebody follows."""
        return list(self._watchers)

    def wake_all(self) -> None:
        """Have all look around them."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    def compare(self, saga_ids: Sequence[str], revisions: Mapping[str, int]) -> None:
        """Have those read again who are not where a saga is, or whose saga is not there any more."""
        for saga_id in saga_ids:
            for watcher in self._watchers.get(saga_id, ()):
                told = watcher.told[-1].revision if watcher.told else watcher.seen
                if revisions.get(saga_id, -1) not in {told, watcher.seen}:
                    watcher.behind = True
                    watcher.changed.set()

    @contextmanager
    def of(self, saga_id: str, after: int = 0) -> Iterator[Watcher]:
        """Somebody who follows a saga from a revision on."""
        watcher = Watcher()
        watcher.seen = after
        self._forget_old()
        if (found := self._newest.get(saga_id)) and found[-1].revision > after:
            watcher.told = list(found)
            watcher.behind = False
        self._watchers[saga_id].add(watcher)
        try:
            yield watcher
        finally:
            self._watchers[saga_id].discard(watcher)
            if not self._watchers[saga_id]:
                del self._watchers[saga_id]


async def watch(
    store: SagaStore, changes: Changes, saga_id: str, after: int, *, alive_s: float = ALIVE_S
) -> AsyncIterator[Record | None]:
    """The history of a saga after a revision, and then what is added, until the saga has ended.

    Args:
        store: Where it is.
        changes: Of this replica.
        saga_id: Which.
        after: The last revision that is known.
        alive_s: None is given when nothing happened for so long.

    Raises:
        NotFoundError: No such saga.
        UnavailableError: The service stops: another replica knows how it goes on.
    """
    loop = asyncio.get_running_loop()
    heard = loop.time()
    with changes.of(saga_id, after) as watcher:
        while True:
            ended = False
            for record in watcher.take():
                yield record
                heard, ended = loop.time(), record.state.ended
            if watcher.behind:
                watcher.behind = False
                ended = (await store.get(saga_id)).state.ended  # before the history: its end is then in there
                while records := await store.events(saga_id, limit=_PAGE, after=watcher.seen):
                    for record in records:
                        yield record
                    watcher.seen, heard = records[-1].revision, loop.time()
                    ended = records[-1].state.ended  # it may have ended in between
            if ended:
                return
            if changes.stopping.is_set():
                raise UnavailableError("the service is stopping", reason="STOPPING")
            if loop.time() - heard >= alive_s:
                yield None
                heard = loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, heard + alive_s - loop.time())):
                    await watcher.changed.wait()
