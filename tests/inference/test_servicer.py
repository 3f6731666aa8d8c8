"""InferenceService and its OpenAI face over a real server, with the real models."""

from __future__ import annotations

import base64
import json
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import numpy as np
import pytest
from google.api import httpbody_pb2

from plexus.inference.v1 import inference_pb2, inference_pb2_grpc
from services.inference.config import InferenceConfig
from services.inference.main import compose
from tests.models import model_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.runtime.service import ServiceRuntime
    from tests.conftest import Serve

QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    "temperature": 0,
}


@pytest.fixture
async def stub(serve: Serve) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with AsyncExitStack() as stack:
        servers: list[grpc.aio.Server] = []
        channel = await stack.enter_async_context(serve(servers.append, start=False))
        runtime = SimpleNamespace(
            config=lambda _model: InferenceConfig(), state_dir=model_folder().parent, server=servers[0]
        )
        await compose(cast("ServiceRuntime", runtime), stack)
        await servers[0].start()
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def test_embed_gives_packed_or_plain_vectors(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    packed = await stub.Embed(inference_pb2.EmbedRequest(texts=["hello", "world"]))
    plain = await stub.Embed(
        inference_pb2.EmbedRequest(texts=["hello"], encoding=inference_pb2.VECTOR_ENCODING_VALUES)
    )
    first = np.frombuffer(packed.vectors[0].packed, "<f4")
    assert first.shape == (384,)
    assert first == pytest.approx(np.array(plain.vectors[0].values), abs=0.02)
    assert packed.usage.input_tokens == 6


@pytest.mark.parametrize(
    ("texts", "field"), [([], "texts"), (["x", " "], "texts[1]"), (["x" * 100_001], "texts[0]")]
)
async def test_bad_texts_name_their_position(
    stub: inference_pb2_grpc.InferenceServiceStub, texts: list[str], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Embed(inference_pb2.EmbedRequest(texts=texts))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field.encode() in dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]


async def test_chat_streams(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    message = inference_pb2.Message(
        role=inference_pb2.ROLE_USER, content="What is the capital of France? Answer in one sentence."
    )
    request = inference_pb2.ChatRequest(messages=[message], temperature=0)
    responses = [response async for response in stub.Chat(request)]
    assert "Paris" in "".join(response.delta for response in responses)
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_STOP


async def _openai(stub: Any, document: object) -> tuple[str, bytes]:
    body = httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(document).encode())
    request = inference_pb2.OpenAIChatCompletionsRequest(body=body)
    bodies = [body async for body in stub.OpenAIChatCompletions(request)]
    return bodies[0].content_type, b"".join(body.data for body in bodies)


async def test_openai_chat_as_a_document(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    content_type, data = await _openai(stub, QUESTION)
    document = json.loads(data)
    assert content_type == "application/json"
    assert "Paris" in document["choices"][0]["message"]["content"]
    assert document["usage"]["total_tokens"] > 0


async def test_openai_chat_as_events_says_the_same(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    whole = json.loads((await _openai(stub, QUESTION))[1])["choices"][0]["message"]["content"]
    content_type, data = await _openai(
        stub, {**QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert content_type == "text/event-stream"
    events = data.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == whole


async def _openai_embedding(stub: inference_pb2_grpc.InferenceServiceStub, **document: object) -> Any:
    body = httpbody_pb2.HttpBody(data=json.dumps({"input": "hello", "model": "minilm"} | document).encode())
    answer = await stub.OpenAIEmbeddings(inference_pb2.OpenAIEmbeddingsRequest(body=body))
    return json.loads(answer.data)["data"][0]["embedding"]


async def test_openai_embeddings_in_both_formats(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    packed = await _openai_embedding(stub, encoding_format="base64")
    decoded = np.frombuffer(base64.b64decode(packed), "<f4")
    assert decoded == pytest.approx(np.array(await _openai_embedding(stub, dimensions=384)), abs=1e-5)


async def test_openai_embeddings_of_another_length_are_refused(
    stub: inference_pb2_grpc.InferenceServiceStub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="384 dimensions only") as caught:
        await _openai_embedding(stub, dimensions=256)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ({"messages": []}, grpc.StatusCode.INVALID_ARGUMENT),
        ({**QUESTION, "model": "gpt-none"}, grpc.StatusCode.NOT_FOUND),
        ({**QUESTION, "n": 2}, grpc.StatusCode.INVALID_ARGUMENT),
        ({**QUESTION, "temperature": 9}, grpc.StatusCode.INVALID_ARGUMENT),
        ({**QUESTION, "tools": [{"type": "function"}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ("not an object", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_openai_requests_that_cannot_be_honoured(
    stub: inference_pb2_grpc.InferenceServiceStub, document: object, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _openai(stub, document)
    assert caught.value.code() is code


async def test_models_are_listed(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    models = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(model.name, model.available) for model in models] == [("minilm", True), ("smollm2", True)]
    face = await stub.OpenAIListModels(inference_pb2.OpenAIListModelsRequest())
    assert [model["id"] for model in json.loads(face.data)["data"]] == ["minilm", "smollm2"]
