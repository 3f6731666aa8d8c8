"""The models of this process: manifest entries joined with the engines that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.runtime.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.inference.domain import ChatModel, Embedder
    from services.inference.models import ModelSpec

DEFAULT_EMBEDDER = "minilm"
DEFAULT_CHAT = "smollm2"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What can be asked for.

    Attributes:
        specs: All known models by name.
        embedders: Engines of embedding models.
        chats: Engines of chat models.
        available: Whether a model's files are on this machine.
    """

    specs: Mapping[str, ModelSpec]
    embedders: Mapping[str, Embedder]
    chats: Mapping[str, ChatModel]
    available: Callable[[str], bool]

    def embedder(self, name: str) -> tuple[str, Embedder]:
        """The embedding model of a name, or the default for an empty one.

        Raises:
            NotFoundError: No such embedding model.
        """
        name = name or DEFAULT_EMBEDDER
        if name not in self.embedders:
            raise _unknown(name, self.embedders)
        return name, self.embedders[name]

    def chat(self, name: str) -> tuple[str, ChatModel]:
        """The chat model of a name, or the default for an empty one.

        Raises:
            NotFoundError: No such chat model.
        """
        name = name or DEFAULT_CHAT
        if name not in self.chats:
            raise _unknown(name, self.chats)
        return name, self.chats[name]

    def spec(self, name: str) -> ModelSpec:
        """What the manifest says of a model.

        Raises:
            NotFoundError: No such model.
        """
        if name not in self.specs:
            raise _unknown(name, self.specs)
        return self.specs[name]


def _unknown(name: str, known: Mapping[str, object]) -> NotFoundError:
    return NotFoundError(
        f"no such model {name!r}; there is {', '.join(sorted(known))}",
        reason="MODEL_NOT_FOUND",
        metadata={"model": name},
    )
