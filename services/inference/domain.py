"""What embedding and chat models do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

MAX_TEXTS = 1024
MAX_TEXT_CHARACTERS = 100_000
MAX_OUTPUT_TOKENS = 4096
MAX_STOPS = 4


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of some texts.

    Attributes:
        vectors: float32, one row of unit length for each text.
        tokens: Tokens of each text after truncation.
        truncated: Positions of texts that were cut at the model's context.
    """

    vectors: NDArray[np.float32]
    tokens: list[int]
    truncated: list[int]


class Embedder(Protocol):
    """Text to vectors."""

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> Embeddings:
        """Compute the vectors; the same text gives the same vector whatever it is batched with.

        Args:
            texts: The texts.
            background: Nobody waits for them: texts of other callers go first, though never always.

        Raises:
            ResourceExhaustedError: The queue is full.
            FailedPreconditionError: The model's files are not on this machine.
        """
        ...


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How to answer: see ChatRequest in the proto for units and bounds."""

    temperature: float = 0.2
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:  # noqa: PLR2004 - stated in the proto
            raise InvalidArgumentError("must be 0 to 2", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidArgumentError("must be above 0 and at most 1", field="top_p")
        if not 1 <= self.max_tokens <= MAX_OUTPUT_TOKENS:
            raise InvalidArgumentError(f"must be 1 to {MAX_OUTPUT_TOKENS}", field="max_tokens")
        if len(self.stop) > MAX_STOPS or any(not text for text in self.stop):
            raise InvalidArgumentError(f"at most {MAX_STOPS}, none empty", field="stop")


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer; the last one has `finish` and the token counts."""

    text: str = ""
    finish: Finish | None = None
    input_tokens: int = 0
    output_tokens: int = 0


class ChatModel(Protocol):
    """Conversation to answer."""

    def chat(self, turns: Sequence[Turn], options: ChatOptions) -> AsyncIterator[Delta]:
        """Generate the answer; closing the iterator stops the generation.

        Raises:
            InvalidArgumentError: The conversation is longer than the context.
            ResourceExhaustedError: Too many conversations wait.
            FailedPreconditionError: The model's files are not on this machine.
        """
        ...


def check_texts(texts: Sequence[str]) -> None:
    """Apply the bounds of Embed.

    Raises:
        InvalidArgumentError: None, too many, empty or too long.
    """
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise InvalidArgumentError(f"needs 1 to {MAX_TEXTS} texts", field="texts")
    for position, text in enumerate(texts):
        if not text.strip():
            raise InvalidArgumentError("must not be empty", field=f"texts[{position}]")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidArgumentError(
                f"at most {MAX_TEXT_CHARACTERS} characters", field=f"texts[{position}]"
            )


def check_turns(turns: Sequence[Turn]) -> None:
    """Apply the bounds of Chat.

    Raises:
        InvalidArgumentError: No turn, or too long a one.
    """
    if not turns:
        raise InvalidArgumentError("needs at least one message", field="messages")
    for position, turn in enumerate(turns):
        if len(turn.content) > MAX_TEXT_CHARACTERS:
            raise InvalidArgumentError(
                f"at most {MAX_TEXT_CHARACTERS} characters", field=f"messages[{position}].content"
            )
