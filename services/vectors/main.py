"""Composition of the vectors service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.runtime.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Open the store, find inference by its name, serve."""
    # Here and not above: the supervisor imports this module to learn the service's name.
    from plexus.inference.v1 import inference_pb2_grpc  # noqa: PLC0415 - see above
    from plexus.vectors.v1 import vectors_pb2_grpc  # noqa: PLC0415 - see above
    from services.vectors.backends.inference import InferenceEmbedder  # noqa: PLC0415 - see above
    from services.vectors.backends.qdrant_edge import QdrantEdgeStore  # noqa: PLC0415 - see above
    from services.vectors.backends.qdrant_optimizer import Optimizer  # noqa: PLC0415 - see above
    from services.vectors.config import VectorsConfig  # noqa: PLC0415 - see above
    from services.vectors.servicer import VectorsServicer  # noqa: PLC0415 - see above

    config = runtime.config(VectorsConfig)
    store = await stack.enter_async_context(QdrantEdgeStore.open(runtime.data_dir, config))
    embedder = InferenceEmbedder(runtime.mesh.stub(inference_pb2_grpc.InferenceServiceStub))
    servicer = VectorsServicer(store, embedder, config)
    vectors_pb2_grpc.add_VectorsServiceServicer_to_server(servicer, runtime.server)
    runtime.spawn(Optimizer(store).run(), name="optimizer")


SERVICE = Service(name="vectors", compose=compose, proto_services=("plexus.vectors.v1.VectorsService",))
