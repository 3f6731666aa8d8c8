"""SagaService over gRPC."""

from __future__ import annotations

import struct
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from plexus.queueing.v1 import sagas_pb2, sagas_pb2_grpc
from services.queueing.sagas import convert
from services.queueing.sagas.machine import Cancel, Resume
from services.queueing.sagas.methods import check_methods
from services.queueing.sagas.watching import watch
from services.runtime.errors import InvalidArgumentError
from services.runtime.paging import decode_token, encode_token, page_size
from services.runtime.request import current

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from services.queueing.sagas.contract import SagaStore
    from services.queueing.sagas.definitions import Definition
    from services.queueing.sagas.domain import Record
    from services.queueing.sagas.orchestrator import Orchestrator
    from services.queueing.sagas.watching import Changes


class SagaServicer(sagas_pb2_grpc.SagaServiceServicer):
    """Validates, delegates, converts."""

    def __init__(
        self,
        store: SagaStore,
        orchestrator: Orchestrator,
        changes: Changes,
        *,
        max_running: int,
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._changes = changes
        self._max_running = max_running

    async def CreateSagaDefinition(
        self, request: sagas_pb2.CreateSagaDefinitionRequest, context: Any
    ) -> sagas_pb2.SagaDefinition:
        return convert.definition_to(await self._store.create_definition(_checked(request.definition)))

    async def GetSagaDefinition(
        self, request: sagas_pb2.GetSagaDefinitionRequest, context: Any
    ) -> sagas_pb2.SagaDefinition:
        if request.version < 0:
            raise InvalidArgumentError("must not be negative", field="version")
        return convert.definition_to(await self._store.get_definition(request.definition, request.version))

    async def ListSagaDefinitions(
        self, request: sagas_pb2.ListSagaDefinitionsRequest, context: Any
    ) -> sagas_pb2.ListSagaDefinitionsResponse:
        limit, scope = page_size(request.page_size), "saga definitions"
        after = (decode_token(request.page_token, scope) or b"").decode()
        found = await self._store.list_definitions(limit=limit + 1, after=after)
        token = encode_token(found[limit - 1].name.encode(), scope) if len(found) > limit else ""
        return sagas_pb2.ListSagaDefinitionsResponse(
            definitions=map(convert.definition_to, found[:limit]), next_page_token=token
        )

    async def UpdateSagaDefinition(
        self, request: sagas_pb2.UpdateSagaDefinitionRequest, context: Any
    ) -> sagas_pb2.SagaDefinition:
        return convert.definition_to(await self._store.update_definition(_checked(request.definition)))

    async def DeleteSagaDefinition(
        self, request: sagas_pb2.DeleteSagaDefinitionRequest, context: Any
    ) -> sagas_pb2.DeleteSagaDefinitionResponse:
        await self._store.delete_definition(request.definition)
        return sagas_pb2.DeleteSagaDefinitionResponse()

    async def StartSaga(self, request: sagas_pb2.StartSagaRequest, context: Any) -> sagas_pb2.Saga:
        order = replace(convert.order_from(request, current()), max_running=self._max_running)
        return convert.saga_to(await self._orchestrator.start(order))

    async def GetSaga(self, request: sagas_pb2.GetSagaRequest, context: Any) -> sagas_pb2.Saga:
        return convert.saga_to(await self._store.get(request.saga))

    async def WatchSaga(
        self, request: sagas_pb2.WatchSagaRequest, context: Any
    ) -> AsyncIterator[sagas_pb2.WatchSagaResponse]:
        history = watch(self._store, self._changes, request.saga, request.after_revision)
        async with aclosing(cast("AsyncGenerator[Record | None]", history)) as records:
            async for record in records:
                event = None if record is None else convert.event_to(record)
                yield sagas_pb2.WatchSagaResponse(event=event)

    async def ListSagas(
        self, request: sagas_pb2.ListSagasRequest, context: Any
    ) -> sagas_pb2.ListSagasResponse:
        limit = page_size(request.page_size)
        scope = ("sagas", request.definition, str(request.state))
        place = decode_token(request.page_token, *scope)
        before = None if place is None else (struct.unpack("!d", place[:8])[0], place[8:].decode())
        found = await self._store.list_sagas(convert.which_from(request), limit=limit + 1, before=before)
        token = ""
        if len(found) > limit:
            last = found[limit - 1]
            token = encode_token(struct.pack("!d", last.created) + last.id.encode(), *scope)
        return sagas_pb2.ListSagasResponse(sagas=map(convert.saga_to, found[:limit]), next_page_token=token)

    async def ListSagaEvents(
        self, request: sagas_pb2.ListSagaEventsRequest, context: Any
    ) -> sagas_pb2.ListSagaEventsResponse:
        limit, scope = page_size(request.page_size), ("saga events", request.saga)
        after = int(decode_token(request.page_token, *scope) or b"0")
        found = await self._store.events(request.saga, limit=limit + 1, after=after)
        token = encode_token(str(found[limit - 1].revision).encode(), *scope) if len(found) > limit else ""
        return sagas_pb2.ListSagaEventsResponse(
            events=map(convert.event_to, found[:limit]), next_page_token=token
        )

    async def CancelSaga(self, request: sagas_pb2.CancelSagaRequest, context: Any) -> sagas_pb2.Saga:
        return convert.saga_to(await self._orchestrator.change(request.saga, Cancel()))

    async def RetrySaga(self, request: sagas_pb2.RetrySagaRequest, context: Any) -> sagas_pb2.Saga:
        return convert.saga_to(await self._orchestrator.change(request.saga, Resume(skip=request.skip)))


def _checked(message: sagas_pb2.SagaDefinition) -> Definition:
    definition = convert.definition_from(message)
    definition.check()
    check_methods(definition, current())
    return definition
