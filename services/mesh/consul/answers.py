"""What Consul answers, and reading it: none of it is trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.runtime.errors import DataLossError

if TYPE_CHECKING:
    from collections.abc import Mapping

NOT_FOUND = 404
_MAX_INDEX = 2**63 - 1


def index_of(text: str | None) -> int:
    """The index in a header; 0, which starts a watch anew, for anything that is not a usable one."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 20:  # noqa: PLR2004 - digits of 2^64
        return 0
    index = int(text)
    return index if index <= _MAX_INDEX else 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What Consul answered.

    Attributes:
        status: 200, or 404 where that is an answer.
        body: As sent.
        index: Of the data, 0 if there is none that could be used.
        filtered: Whether Consul says that it left out what the token may not see.
    """

    status: int
    body: bytes
    index: int
    filtered: bool

    def json(self) -> Any:
        """The body; None if nothing was found.

        Raises:
            DataLossError: It is not JSON.
        """
        if self.status == NOT_FOUND:
            return None
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise DataLossError("Consul's answer is not JSON", reason="CONSUL_ANSWER_INVALID") from error


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        DataLossError: It is none.
    """
    if not isinstance(value, dict):
        raise DataLossError(f"Consul's {what} is not an object", reason="CONSUL_ANSWER_INVALID")
    return value


def listing(value: Any, what: str) -> list[Any]:
    """A JSON array; none for null.

    Raises:
        DataLossError: It is neither.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataLossError(f"Consul's {what} is not a list", reason="CONSUL_ANSWER_INVALID")
    return value
