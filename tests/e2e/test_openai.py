"""OpenAI's official client against the edge, unchanged but for its base URL and key."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest

from tests.e2e.backend import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai.types.chat import ChatCompletionUserMessageParam

    from tests.e2e.backend import Backend

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TIMEOUT_S = 300.0
ASKED: ChatCompletionUserMessageParam = {"role": "user", "content": "Name three colours."}


def client_of(backend: Backend, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{backend.url}/v1", api_key=token, timeout=TIMEOUT_S, max_retries=0)


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[openai.OpenAI]:
    with client_of(backend, backend.token("reader")) as client:
        yield client


def reason_of(error: openai.APIStatusError) -> str:
    body: Any = error.body
    return str(body["details"][0]["reason"])


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["minilm", "smollm2"]
    model = client.models.retrieve("minilm")
    assert (model.id, model.object, model.owned_by) == ("minilm", "model", "plexus")


def test_embeddings_are_unit_vectors_and_the_same_in_both_encodings(client: openai.OpenAI) -> None:
    texts = ["a cat sleeps", "a dog barks", "stocks fell"]
    as_floats = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    assert [item.index for item in as_floats.data] == [0, 1, 2]
    rows = np.array([item.embedding for item in as_floats.data], np.float32)
    assert rows.shape == (3, 384)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    assert as_floats.usage.prompt_tokens == as_floats.usage.total_tokens > 6

    # The client asks for base64 unless told otherwise and decodes it itself.
    decoded = client.embeddings.create(model="minilm", input=texts)
    assert np.array_equal(np.array([item.embedding for item in decoded.data], np.float32), rows)
    raw: Any = client.embeddings.create(model="minilm", input=texts[0], encoding_format="base64")
    packed = np.frombuffer(base64.b64decode(raw.data[0].embedding), "<f4")
    assert np.allclose(packed, rows[0], atol=1e-6)


def test_chat_answers_as_a_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=[ASKED], max_tokens=12, temperature=0, seed=1
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=[ASKED], max_tokens=12, temperature=0)
    pieces: list[str] = []
    finish, usage = None, None
    with client.chat.completions.create(
        model="smollm2",
        messages=[ASKED],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finish = choice.finish_reason or finish
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-none", messages=[ASKED], stream=stream)
    assert reason_of(caught.value) == "MODEL_NOT_FOUND"
    assert "smollm2" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="gpt-none", input="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-none")


def test_what_cannot_be_honoured_is_refused_with_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2", messages=[ASKED], n=2)
    assert "n:" in caught.value.message
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="minilm", input=[])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smollm2", messages=[])


def test_a_wrong_or_expired_token_is_an_authentication_error(backend: Backend) -> None:
    expired = backend.plexus("token", "--consumer", "reader", "--ttl", "1s").stdout.strip()
    for token in ("no token at all", f"{backend.token('reader')}x"):
        with client_of(backend, token) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert reason_of(caught.value) == "UNAUTHENTICATED"
    with client_of(backend, expired) as client:

        def refused() -> bool:
            try:
                client.models.list()
            except openai.AuthenticationError:
                return True
            return False

        eventually(refused, within_s=60)  # a second of life, and one that the edge grants clocks


def test_a_missing_token_is_refused_in_the_same_shape(backend: Backend) -> None:
    answer = httpx.get(f"{backend.url}/v1/models", timeout=TIMEOUT_S)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["details"][0]["reason"] == "UNAUTHENTICATED"
