"""From a document to chunks in the engines, carried by a queue so that nothing taken is forgotten."""

from __future__ import annotations

import asyncio
import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import structlog

from plexus.client.subscriber import RejectError, Subscriber
from services.knowledge.chunking import chunk, title_of
from services.knowledge.domain import State, check_document, document_id
from services.knowledge.engines import SUBSCRIPTION, Engines
from services.knowledge.extraction import ExtractionError, content_type_of, extract
from services.runtime.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    PlexusError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from plexus.queueing.v1 import queueing_pb2
    from services.knowledge.config import KnowledgeConfig
    from services.knowledge.domain import Chunk, ChunkingPolicy, DocumentInput, Operation, Task
    from services.knowledge.store import KnowledgeStore

log = structlog.get_logger(__name__)

_EXTRACTORS = 2
_PUBLISH_BATCH = 500
_RETRY_S = 1.0
_IDLE_S = 30.0
_STORE_CONCURRENCY = 8
_MAX_ATTEMPTS = 5
"""Deliveries of a document, each ended by a failure of its own or by the end of the process that read it."""
_OUTAGE = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)
"""Not the document's fault: waited out, for as long as it takes."""
_OUTAGE_MIN_S, _OUTAGE_MAX_S = 0.2, 5.0


class Ingestion:
    """Takes documents, works on them in the background, and tells of the progress."""

    def __init__(self, store: KnowledgeStore, engines: Engines, config: KnowledgeConfig) -> None:
        self._store = store
        self._engines = engines
        self._config = config
        self._extractors = ThreadPoolExecutor(_EXTRACTORS, "extract")
        self._to_queue = asyncio.Event()
        self._prepared = asyncio.Event()
        self._progress: dict[str, asyncio.Event] = {}

    def close(self) -> None:
        """Let go of the threads; a text being extracted is not waited for."""
        self._extractors.shutdown(wait=False, cancel_futures=True)

    async def take(self, collection: str, documents: Sequence[DocumentInput]) -> Operation:
        """Take documents: store their originals, record the operation, queue the work.

        Raises:
            NotFoundError: No such collection.
            InvalidArgumentError: A document is over a bound or of a type that cannot be read.
            UnavailableError: Storage cannot be reached; nothing was taken.
        """
        known = await self._store.collection(collection)
        inputs = []
        for position, document in enumerate(documents):
            check_document(document, position)
            kind = content_type_of(document.uri, document.content_type)
            inputs.append((document.uri, kind, hashlib.sha256(document.content).hexdigest()))
        if len({uri for uri, _, _ in inputs}) != len(inputs):
            raise InvalidArgumentError("a URI is given twice", field="documents")
        gate = asyncio.Semaphore(_STORE_CONCURRENCY)

        async def keep(document: DocumentInput, kind: str, sha256: str) -> None:
            async with gate:
                identifier = document_id(known.name, document.uri)
                await self._engines.store(identifier, sha256, document.content, kind)

        present = await self._store.versions([document_id(known.name, uri) for uri, _, _ in inputs])
        async with asyncio.TaskGroup() as group:
            for document, (uri, kind, sha256) in zip(documents, inputs, strict=True):
                before = present.get(document_id(known.name, uri))
                if before is None or before.version != sha256 or before.state is not State.READY:
                    group.create_task(keep(document, kind, sha256))
        operation, _ = await self._store.take(collection, inputs)
        self._to_queue.set()
        return operation

    async def watch(self, operation: str) -> AsyncIterator[Operation]:
        """An operation now and after each step, until it is done.

        Raises:
            NotFoundError: No such operation.
        """
        while True:
            changed = self._progress.setdefault(operation, asyncio.Event())
            now = await self._store.operation(operation)
            yield now
            if now.done:
                self._progress.pop(operation, None)
                return
            await changed.wait()

    def _step(self, operation: str) -> None:
        event = self._progress.pop(operation, None)
        if event is not None:
            event.set()

    # Background loops.

    async def prepare(self) -> None:
        """Make what ingestion needs in the other services, trying until they are there."""
        while not self._prepared.is_set():
            try:
                await self._engines.prepare()
            except PlexusError as error:
                log.info("waiting_for", dependency=error.metadata.get("dependency", ""), reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            self._prepared.set()

    async def queue(self) -> None:
        """Publish what has been taken; a task is marked only after its message is durable."""
        await self._prepared.wait()
        while True:
            self._to_queue.clear()
            tasks = await self._store.unqueued(limit=_PUBLISH_BATCH)
            if not tasks:
                try:
                    async with asyncio.timeout(_IDLE_S):
                        await self._to_queue.wait()
                except TimeoutError:
                    continue
                continue
            try:
                await self._engines.publish(tasks)
            except PlexusError as error:
                log.warning("publish_failed", reason=error.reason)
                await asyncio.sleep(_RETRY_S)
                continue
            await self._store.mark_queued(tasks)

    async def work(self) -> None:
        """Take tasks from the queue for ever."""
        await self._prepared.wait()
        subscriber = Subscriber(
            self._engines.queueing,
            SUBSCRIPTION,
            self._handle,
            concurrency=self._config.workers,
            on_error=lambda error: log.warning("ingestion_failed", error=type(error).__name__),
        )
        await subscriber.run()

    async def _handle(self, delivery: queueing_pb2.Delivery) -> None:
        known = await self._store.task(delivery.data.decode())
        if known is None:
            return  # its collection is gone
        task, state = known
        if state is not State.PENDING:
            return  # delivered again after it was done
        if delivery.attempt > _MAX_ATTEMPTS:
            await self._give_up(task, f"the process that read it ended, {_MAX_ATTEMPTS} times")
        try:
            await self._ingest_through_outages(task)
        except ExtractionError as error:
            await self._give_up(task, str(error), error)
        except Exception as error:
            if delivery.attempt >= _MAX_ATTEMPTS:
                await self._give_up(task, f"given up after {delivery.attempt} attempts: {error}", error)
            raise
        await self._store.finish(task, State.READY)
        self._step(task.operation)

    async def _give_up(self, task: Task, reason: str, cause: Exception | None = None) -> NoReturn:
        await self._store.finish(task, State.FAILED, reason)
        self._step(task.operation)
        raise RejectError(f"{task.uri}: {reason}") from cause

    async def _ingest_through_outages(self, task: Task) -> None:
        pause = _OUTAGE_MIN_S
        while True:
            try:
                return await self._ingest(task)
            except _OUTAGE as error:
                if pause == _OUTAGE_MIN_S:
                    log.warning(
                        "ingestion_waits", document=task.document, reason=error.reason, error=str(error)
                    )
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only
                pause = min(_OUTAGE_MAX_S, 2 * pause)

    async def _ingest(self, task: Task) -> None:
        collection = await self._store.collection(task.collection)
        content = await self._engines.original(task)
        read = partial(_read, content, task, collection.chunking)
        try:
            async with asyncio.timeout(self._config.extraction_timeout_s):
                text, title, chunks = await asyncio.get_running_loop().run_in_executor(self._extractors, read)
        except TimeoutError as error:
            raise ExtractionError("its text could not be extracted in time") from error
        await self._engines.store_text(task.document, task.sha256, text)
        vectors = await self._engines.embed([entry.embedded(title) for entry in chunks], bulk=True)
        name = collection.engine_name
        await self._engines.index(name, task.document, task.sha256, chunks, vectors)
        before = (await self._store.versions([task.document])).get(task.document)
        # The switch: searches show only the version that the store names. Old chunks are deleted after it, so
        # that at no moment both or none of them answer.
        current = await self._store.make_ready(task, title=title, chunks=len(chunks))
        if not current:
            return  # overtaken by a newer content, whose own task cleans up
        if before is not None and before.version not in {"", task.sha256}:
            await self._engines.remove(name, task.document, keep_version=task.sha256)
            await self._engines.discard(task.document, before.version)


def _read(content: bytes, task: Task, policy: ChunkingPolicy) -> tuple[str, str, list[Chunk]]:
    """Text, title and chunks of a document; no chunks if it is only headings and links. Blocking."""
    text = extract(content, task.content_type)
    return text, title_of(text, task.uri.rsplit("/", 1)[-1]), chunk(text, policy)
