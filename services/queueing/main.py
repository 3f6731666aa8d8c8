"""Composition of the queueing service."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import grpc.aio
from prometheus_client import REGISTRY

from plexus.queueing.v1 import queueing_pb2_grpc, sagas_pb2_grpc, schedules_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.calls import Calls
from services.queueing.config import QueueingConfig
from services.queueing.default_topics import make_default_topics
from services.queueing.expiry import Expiry, Uses
from services.queueing.faces import pubsub_access
from services.queueing.faces.pubsub import Face
from services.queueing.levels import LevelsCollector
from services.queueing.metered import metered
from services.queueing.sagas.methods import Methods
from services.queueing.sagas.orchestrator import Orchestrator, Pace
from services.queueing.sagas.requests import Channel
from services.queueing.sagas.servicer import SagaServicer
from services.queueing.sagas.store import DatabaseSagaStore
from services.queueing.sagas.watching import Changes
from services.queueing.schedules.runner import Runner
from services.queueing.schedules.servicer import ScheduleServicer
from services.queueing.schedules.store import ScheduleStore
from services.queueing.servicer import QueueingServicer
from services.queueing.state import Database
from services.runtime.access import AllowAll
from services.runtime.pipeline import Pipeline
from services.runtime.service import Service, server_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AsyncExitStack

    from services.queueing.domain import Broker
    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the broker and serve it."""
    config = runtime.config(QueueingConfig)
    database = Database(
        config.state_url.get_secret_value() or f"sqlite:///{runtime.data_dir / 'state.sqlite'}",
        pool_size=config.state_pool_size,
        statement_s=config.state_statement_s,
    )
    await stack.enter_async_context(database)
    uses = Uses()
    broker: Broker
    if config.backend == "rabbitmq":
        from services.queueing.backends.rabbit import RabbitBroker  # noqa: PLC0415 - only when it is used

        broker = await stack.enter_async_context(
            RabbitBroker(
                config.rabbitmq_url.get_secret_value(),
                database,
                dedup_window_s=config.dedup_window_s,
                max_waiting_writes=config.max_waiting_writes,
                heartbeat_s=config.heartbeat_s,
                publish_deadline_s=config.publish_deadline_s,
                used=uses.note,
                max_set_aside=config.max_set_aside,
            )
        )
    else:
        broker = await stack.enter_async_context(
            SqliteBroker(
                runtime.data_dir / "queue.sqlite",
                dedup_window_s=config.dedup_window_s,
                max_waiting_writes=config.max_waiting_writes,
                full_sync=config.full_sync,
                used=uses.note,
            )
        )
    levels = LevelsCollector(broker)
    REGISTRY.register(levels)
    stack.callback(REGISTRY.unregister, levels)
    broker = metered(broker)
    face = Face(broker, runtime.stopping, max_bytes=runtime.server_config.max_message_bytes)
    runtime.server.add_generic_rpc_handlers((face,))
    if config.pubsub_port:
        await stack.enter_async_context(_emulator(runtime, face, config.pubsub_port))
    topics = make_default_topics(broker, database, retention_s=config.default_topics_retention_s)
    runtime.spawn(topics, name="default-topics")
    runtime.spawn(Expiry(broker, database, uses).run(), name="expiry")
    calls = await stack.enter_async_context(Calls(broker))
    queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker, calls), runtime.server)
    schedules = await _schedules(runtime, stack, broker, database)
    schedules_pb2_grpc.add_ScheduleServiceServicer_to_server(schedules, runtime.server)
    sagas_pb2_grpc.add_SagaServiceServicer_to_server(_sagas(runtime, broker, database), runtime.server)


async def _schedules(
    runtime: ServiceRuntime, stack: AsyncExitStack, broker: Broker, database: Database
) -> ScheduleServicer:
    """Fire the schedules of the database."""
    config = runtime.config(QueueingConfig)
    store = ScheduleStore(database)
    await store.migrate()
    runner = Runner(broker, database, dedup_window_s=config.dedup_window_s, poll_s=config.schedule_poll_s)
    await stack.enter_async_context(runner.running(lambda loop: runtime.spawn(loop, name="schedules")))
    return ScheduleServicer(
        store,
        runner,
        broker,
        most=config.max_schedules,
        shortest=timedelta(seconds=config.schedule_min_interval_s),
    )


def _sagas(runtime: ServiceRuntime, broker: Broker, database: Database) -> SagaServicer:
    """Drive the sagas of the database."""
    config = runtime.config(QueueingConfig)
    store, changes = DatabaseSagaStore(database), Changes(runtime.stopping)
    pace = Pace(
        lease_s=config.saga_lease_s,
        concurrency=config.saga_concurrency,
        retention_s=config.saga_retention_s,
    )
    orchestrator = Orchestrator(store, Channel(broker), Methods(runtime.mesh.channel), changes, pace)
    runtime.spawn(orchestrator.run(), name="sagas")
    return SagaServicer(store, orchestrator, changes, max_running=config.max_running_sagas)


@asynccontextmanager
async def _emulator(runtime: ServiceRuntime, face: Face, port: int) -> AsyncIterator[None]:
    """Serve Google Pub/Sub's clients, whose emulator mode knows no TLS: to this machine only."""
    limits = runtime.server_config
    pipeline = Pipeline("queueing", limits, AllowAll(), trusted_peer="pubsub")
    server = grpc.aio.server(interceptors=[pipeline], options=server_options(limits))
    server.add_generic_rpc_handlers((face,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    runtime.log.info("pubsub_serving", port=port)
    try:
        yield
    finally:
        await server.stop(limits.drain_s)


SERVICE = Service(
    name="queueing",
    compose=compose,
    proto_services=(
        "plexus.queueing.v1.QueueingService",
        "plexus.queueing.v1.ScheduleService",
        "plexus.queueing.v1.SagaService",
    ),
    groups=pubsub_access.GROUPS,
)
