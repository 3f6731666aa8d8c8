"""Composition of the queueing service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.queueing.v1 import queueing_pb2_grpc
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.config import QueueingConfig
from services.queueing.servicer import QueueingServicer
from services.runtime.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.queueing.domain import Broker
    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the broker and serve it."""
    config = runtime.config(QueueingConfig)
    broker: Broker
    if config.backend == "rabbitmq":
        from services.queueing.backends.rabbit import RabbitBroker  # noqa: PLC0415 - only when it is used

        broker = await stack.enter_async_context(
            RabbitBroker(
                config.rabbitmq_url.get_secret_value(),
                runtime.data_dir / "rabbitmq.sqlite",
                dedup_window_s=config.dedup_window_s,
                max_waiting_writes=config.max_waiting_writes,
                heartbeat_s=config.heartbeat_s,
                publish_deadline_s=config.publish_deadline_s,
            )
        )
    else:
        broker = await stack.enter_async_context(
            SqliteBroker(
                runtime.data_dir / "queue.sqlite",
                dedup_window_s=config.dedup_window_s,
                max_waiting_writes=config.max_waiting_writes,
                full_sync=config.full_sync,
            )
        )
    queueing_pb2_grpc.add_QueueingServiceServicer_to_server(QueueingServicer(broker), runtime.server)


SERVICE = Service(name="queueing", compose=compose, proto_services=("plexus.queueing.v1.QueueingService",))
