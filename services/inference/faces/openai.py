"""OpenAI's REST interface on the domain: chat completions, embeddings, models.

What a client sends beyond what is known here is ignored, as OpenAI itself does for options of other models;
what changes the meaning of the answer and cannot be honoured (tools, several choices) is refused.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from services.inference.domain import ChatOptions, Finish, Role, Turn, check_texts, check_turns
from services.runtime.errors import FieldViolation, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from services.inference.catalogue import Catalogue
    from services.inference.domain import Delta
    from services.inference.models import ModelSpec

ModelT = TypeVar("ModelT", bound=BaseModel)

CREATED = 1_700_000_000
"""OpenAI's clients want a creation time of each model; ours have none, so it is a constant."""


def _join_parts(content: object) -> object:
    """Text of a message given as a list of parts; parts other than text are left to fail validation."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _ChatRequest(BaseModel):
    model: str = ""
    messages: list[_Message]
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    tools: Annotated[list[object] | None, Field(max_length=0)] = None

    def options(self) -> ChatOptions:
        """The domain's options, with its defaults for what is absent."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
        }
        present: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return ChatOptions(stop=tuple(self.stop or ()), **present)


class _EmbeddingRequest(BaseModel):
    model: str = ""
    input: Annotated[list[str], BeforeValidator(_as_list)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def _parse(model: type[ModelT], body: bytes) -> ModelT:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        violations = [
            FieldViolation(".".join(map(str, problem["loc"])) or "body", problem["msg"])
            for problem in error.errors(include_url=False, include_input=False)
        ]
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise InvalidArgumentError(text, violations=violations) from error


def _json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _event(content: object) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


class OpenAIFace:
    """JSON documents in, JSON documents or events out."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def chat(self, body: bytes) -> tuple[str, AsyncGenerator[bytes]]:
        """Answer a chat completion: the content type and the body in pieces.

        Raises:
            InvalidArgumentError: The document is not a request that can be honoured.
            NotFoundError: No such model.
        """
        request = _parse(_ChatRequest, body)
        name, model = self._catalogue.chat(request.model)
        roles = {"developer": Role.SYSTEM}
        turns = [Turn(roles.get(m.role) or Role(m.role), m.content) for m in request.messages]
        check_turns(turns)
        answer = cast("AsyncGenerator[Delta]", model.chat(turns, request.options()))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            usage = request.stream_options is not None and request.stream_options.include_usage
            return "text/event-stream", _events(head, answer, include_usage=usage)
        return "application/json", _document(head, answer)

    async def embeddings(self, body: bytes) -> bytes:
        """Answer an embeddings request.

        Raises:
            InvalidArgumentError: The document is not a request that can be honoured.
            NotFoundError: No such model.
        """
        request = _parse(_EmbeddingRequest, body)
        name, embedder = self._catalogue.embedder(request.model)
        dimension = self._catalogue.specs[name].dimension
        if request.dimensions not in {None, dimension}:  # cut short, its vectors would mean nothing
            raise InvalidArgumentError(
                f"{name} has vectors of {dimension} dimensions only", field="dimensions"
            )
        check_texts(request.input)
        embeddings = await embedder.embed(request.input)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": row.tolist()
                if request.encoding_format == "float"
                else base64.b64encode(row.astype("<f4").tobytes()).decode(),
            }
            for index, row in enumerate(embeddings.vectors)
        ]
        tokens = sum(embeddings.tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": name, "usage": usage})

    def models(self) -> bytes:
        """List the models."""
        specs = sorted(self._catalogue.specs.values(), key=lambda spec: spec.name)
        return _json({"object": "list", "data": [_model(spec) for spec in specs]})

    def model(self, name: str) -> bytes:
        """Describe one model.

        Raises:
            NotFoundError: No such model.
        """
        return _json(_model(self._catalogue.spec(name)))


def _model(spec: ModelSpec) -> dict[str, object]:
    return {"id": spec.name, "object": "model", "created": CREATED, "owned_by": "plexus"}


def _usage(delta: Delta) -> dict[str, int]:
    return {
        "prompt_tokens": delta.input_tokens,
        "completion_tokens": delta.output_tokens,
        "total_tokens": delta.input_tokens + delta.output_tokens,
    }


async def _events(
    head: dict[str, object], answer: AsyncGenerator[Delta], *, include_usage: bool
) -> AsyncGenerator[bytes]:
    base = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], finish: Finish | None) -> bytes:
        return _event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    async with aclosing(answer) as deltas:
        first = True
        async for delta in deltas:
            if first:
                # Not before the model has begun: until then an error still is a status, not a broken stream.
                yield chunk({"role": "assistant", "content": ""}, None)
                first = False
            if delta.text:
                yield chunk({"content": delta.text}, None)
            if delta.finish is not None:
                yield chunk({}, delta.finish)
                if include_usage:
                    yield _event({**base, "choices": [], "usage": _usage(delta)})
    yield b"data: [DONE]\n\n"


async def _document(head: dict[str, object], answer: AsyncGenerator[Delta]) -> AsyncGenerator[bytes]:
    text = []
    last: Delta | None = None
    async with aclosing(answer) as deltas:
        async for delta in deltas:
            text.append(delta.text)
            last = delta
    if last is None or last.finish is None:
        raise RuntimeError("the answer ended without a reason")
    message = {"role": "assistant", "content": "".join(text)}
    yield _json(
        {
            **head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": last.finish}],
            "usage": _usage(last),
        }
    )
