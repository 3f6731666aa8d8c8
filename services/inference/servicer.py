"""InferenceService over a catalogue of models."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from google.api import httpbody_pb2

from plexus.inference.v1 import inference_pb2, inference_pb2_grpc
from services.inference import convert
from services.inference.domain import check_texts, check_turns

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from services.inference.catalogue import Catalogue
    from services.inference.domain import Delta
    from services.inference.faces.openai import OpenAIFace

JSON = "application/json"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Validates, delegates, converts."""

    def __init__(self, catalogue: Catalogue, openai: OpenAIFace) -> None:
        self._catalogue = catalogue
        self._openai = openai

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> inference_pb2.EmbedResponse:
        name, embedder = self._catalogue.embedder(request.model)
        check_texts(request.texts)
        embeddings = await embedder.embed(list(request.texts), background=request.background)
        return convert.embeddings_to(name, embeddings, request.encoding)

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: Any
    ) -> AsyncIterator[inference_pb2.ChatResponse]:
        _, model = self._catalogue.chat(request.model)
        turns = convert.turns_from(request)
        check_turns(turns)
        answer = cast("AsyncGenerator[Delta]", model.chat(turns, convert.options_from(request)))
        async with aclosing(answer) as deltas:
            async for delta in deltas:
                yield convert.delta_to(delta)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        specs = sorted(self._catalogue.specs.values(), key=lambda spec: spec.name)
        return inference_pb2.ListModelsResponse(
            models=[convert.model_to(spec, available=self._catalogue.available(spec.name)) for spec in specs]
        )

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Any) -> inference_pb2.Model:
        spec = self._catalogue.spec(request.model)
        return convert.model_to(spec, available=self._catalogue.available(spec.name))

    async def OpenAIChatCompletions(
        self, request: inference_pb2.OpenAIChatCompletionsRequest, context: Any
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        content_type, pieces = self._openai.chat(request.body.data)
        async with aclosing(pieces):
            async for piece in pieces:
                yield httpbody_pb2.HttpBody(content_type=content_type, data=piece)

    async def OpenAIEmbeddings(
        self, request: inference_pb2.OpenAIEmbeddingsRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        return httpbody_pb2.HttpBody(content_type=JSON, data=await self._openai.embeddings(request.body.data))

    async def OpenAIListModels(
        self, request: inference_pb2.OpenAIListModelsRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        return httpbody_pb2.HttpBody(content_type=JSON, data=self._openai.models())

    async def OpenAIGetModel(
        self, request: inference_pb2.OpenAIGetModelRequest, context: Any
    ) -> httpbody_pb2.HttpBody:
        return httpbody_pb2.HttpBody(content_type=JSON, data=self._openai.model(request.model))
