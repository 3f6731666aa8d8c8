"""What a step answered, as a JSON value that can be kept and shown."""

from __future__ import annotations

import json
from typing import Any

from services.queueing.sagas.codec import json_text
from services.queueing.sagas.domain import MAX_ERROR, MAX_RESULT_BYTES, Problem
from services.queueing.sagas.machine import Failed, Succeeded

MAX_DEPTH = 32


def result_of_call(call_id: str, value: Any) -> Succeeded | Failed:
    """The event of an answer; one that cannot be kept is a failure after which the step must be undone."""
    if len(json_text(value)) > MAX_RESULT_BYTES:
        return Failed(call_id, Problem("DATA_LOSS", f"the result is larger than {MAX_RESULT_BYTES} bytes"))
    if _depth(value) > MAX_DEPTH:
        return Failed(call_id, Problem("DATA_LOSS", f"the result is nested more than {MAX_DEPTH} deep"))
    return Succeeded(call_id, value)


def result_of_reply(call_id: str, data: bytes) -> Succeeded | Failed:
    """The event of a reply: its content as JSON, or as text if it is none; without content null."""
    if len(data) > MAX_RESULT_BYTES:
        return result_of_call(call_id, data.hex())
    return result_of_call(call_id, _value(data))


def text_of(data: bytes) -> str:
    """The text of an error, within its bound."""
    return data[: 4 * MAX_ERROR].decode(errors="replace").replace("\0", "\ufffd")[:MAX_ERROR]


def _value(data: bytes) -> Any:
    if not data:
        return None
    try:
        value = json.loads(data, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return data.decode(errors="replace")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
