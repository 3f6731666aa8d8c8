"""Between inference messages and the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.inference.v1 import inference_pb2
from services.inference.domain import ChatOptions, Delta, Embeddings, Finish, Role, Turn
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.inference.models import ModelSpec

_ROLES = {
    inference_pb2.ROLE_SYSTEM: Role.SYSTEM,
    inference_pb2.ROLE_USER: Role.USER,
    inference_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
}
_FINISHES = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_KINDS = {"embedding": inference_pb2.MODEL_KIND_EMBEDDING, "chat": inference_pb2.MODEL_KIND_CHAT}


def turns_from(request: inference_pb2.ChatRequest) -> list[Turn]:
    """The conversation.

    Raises:
        InvalidArgumentError: A turn without a role.
    """
    turns = []
    for position, message in enumerate(request.messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidArgumentError("must be set", field=f"messages[{position}].role")
        turns.append(Turn(role, message.content))
    return turns


def options_from(request: inference_pb2.ChatRequest) -> ChatOptions:
    """The options, with the domain's defaults for what is not set."""
    given = {
        name: getattr(request, name)
        for name in ("temperature", "top_p", "max_tokens", "seed")
        if request.HasField(name)
    }
    return ChatOptions(stop=tuple(request.stop), **given)


def embeddings_to(
    model: str, embeddings: Embeddings, encoding: inference_pb2.VectorEncoding.ValueType
) -> inference_pb2.EmbedResponse:
    """The proto's response."""
    if encoding == inference_pb2.VECTOR_ENCODING_VALUES:
        vectors = [inference_pb2.Vector(values=row) for row in embeddings.vectors.tolist()]
    else:
        vectors = [inference_pb2.Vector(packed=row.astype("<f4").tobytes()) for row in embeddings.vectors]
    return inference_pb2.EmbedResponse(
        model=model,
        vectors=vectors,
        usage=inference_pb2.Usage(input_tokens=sum(embeddings.tokens)),
        truncated=embeddings.truncated,
    )


def delta_to(delta: Delta) -> inference_pb2.ChatResponse:
    """The proto's piece of an answer."""
    if delta.finish is None:
        return inference_pb2.ChatResponse(delta=delta.text)
    return inference_pb2.ChatResponse(
        delta=delta.text,
        finish_reason=_FINISHES[delta.finish],
        usage=inference_pb2.Usage(input_tokens=delta.input_tokens, output_tokens=delta.output_tokens),
    )


def model_to(spec: ModelSpec, *, available: bool) -> inference_pb2.Model:
    """The proto's model."""
    return inference_pb2.Model(
        name=spec.name,
        kind=_KINDS[spec.kind],
        dimension=spec.dimension,
        context_tokens=spec.context_tokens,
        licence=spec.licence,
        available=available,
    )
