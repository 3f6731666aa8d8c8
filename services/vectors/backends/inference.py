"""Text embedded by the inference service."""

from __future__ import annotations

import asyncio
import sys
from array import array
from typing import TYPE_CHECKING

import grpc.aio

from plexus.inference.v1 import inference_pb2
from services.runtime.status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plexus.inference.v1 import inference_pb2_grpc
    from services.vectors.domain import Vector

TEXTS_PER_CALL = 256
"""Inference takes more, but its calls should not grow as large as ours."""
CONCURRENT_CALLS = 4


class InferenceEmbedder:
    """The TextEmbedder that calls `xds:///inference`."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
        self._stub = stub
        self._slots = asyncio.Semaphore(CONCURRENT_CALLS)

    async def embed(self, model: str, texts: Sequence[str]) -> list[Vector]:
        """As TextEmbedder.embed."""
        starts = range(0, len(texts), TEXTS_PER_CALL)
        calls = [self._embed(model, texts[start : start + TEXTS_PER_CALL]) for start in starts]
        return [vector for part in await asyncio.gather(*calls) for vector in part]

    async def _embed(self, model: str, texts: Sequence[str]) -> list[Vector]:
        request = inference_pb2.EmbedRequest(
            model=model, texts=texts, encoding=inference_pb2.VECTOR_ENCODING_PACKED
        )
        async with self._slots:
            try:
                response = await self._stub.Embed(request)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, dependency="inference") from error
        return [_numbers(vector) for vector in response.vectors]


def _numbers(vector: inference_pb2.Vector) -> Vector:
    if not vector.packed:
        return array("f", vector.values)
    numbers = array("f")
    numbers.frombytes(vector.packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
