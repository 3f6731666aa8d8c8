"""Composition of the knowledge service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.knowledge.v1 import knowledge_pb2_grpc
from services.knowledge.config import KnowledgeConfig
from services.runtime.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the store, start the background work, serve."""
    from services.knowledge.answering import Answering  # noqa: PLC0415 - numpy, after the fork
    from services.knowledge.engines import Engines  # noqa: PLC0415 - the same
    from services.knowledge.ingestion import Ingestion  # noqa: PLC0415 - the same
    from services.knowledge.servicer import KnowledgeServicer  # noqa: PLC0415 - the same
    from services.knowledge.store import KnowledgeStore  # noqa: PLC0415 - the same

    config = runtime.config(KnowledgeConfig)
    store = await stack.enter_async_context(KnowledgeStore(runtime.data_dir / "knowledge.sqlite"))
    engines = Engines(runtime.mesh)
    ingestion = Ingestion(store, engines, config)
    stack.callback(ingestion.close)
    for name, loop in (
        ("prepare", ingestion.prepare()),
        ("queue", ingestion.queue()),
        ("work", ingestion.work()),
    ):
        runtime.spawn(loop, name=f"ingestion-{name}")
    knowledge_pb2_grpc.add_KnowledgeServiceServicer_to_server(
        KnowledgeServicer(store, engines, ingestion, Answering(store, engines, config)), runtime.server
    )


SERVICE = Service(name="knowledge", compose=compose, proto_services=("plexus.knowledge.v1.KnowledgeService",))
