"""Composition of the search service."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from services.runtime.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the indexes, make the default ones, serve."""
    # Here and not above: the supervisor imports this module to learn the service's name.
    from plexus.search.v1 import search_pb2_grpc  # noqa: PLC0415 - see above
    from services.runtime.errors import AlreadyExistsError  # noqa: PLC0415 - see above
    from services.search.backends.tantivy import TantivyIndex  # noqa: PLC0415 - see above
    from services.search.config import SearchConfig  # noqa: PLC0415 - see above
    from services.search.defaults import DEFAULT_INDEXES  # noqa: PLC0415 - see above
    from services.search.servicer import SearchServicer  # noqa: PLC0415 - see above

    config = runtime.config(SearchConfig)
    index = await stack.enter_async_context(TantivyIndex.open(runtime.data_dir, config))
    for spec in DEFAULT_INDEXES:
        with suppress(AlreadyExistsError):  # every start but the first
            await index.create_index(spec)
    search_pb2_grpc.add_SearchServiceServicer_to_server(SearchServicer(index, config), runtime.server)
    runtime.spawn(index.keep_lean(), name="writer-release")


SERVICE = Service(name="search", compose=compose, proto_services=("plexus.search.v1.SearchService",))
