"""Sagas over the REST API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from services.runtime.errors import InvalidArgumentError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.cli.api import Api

STATES = ("running", "compensating", "succeeded", "compensated", "stuck")
_PAGE = 100


def read_definition(file: str) -> dict[str, Any]:
    """The definition in a YAML or JSON file; `-` is standard input.

    Raises:
        InvalidArgumentError: It is none.
    """
    import yaml  # noqa: PLC0415 - not needed to declare the commands

    try:
        value = yaml.safe_load(sys.stdin.read() if file == "-" else Path(file).read_text())
        json.dumps(value)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise InvalidArgumentError(f"{file}: must be an object with a name and steps")
    return value


def read_input(text: str) -> dict[str, Any]:
    """The input of a saga.

    Raises:
        InvalidArgumentError: It is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"--input: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError("--input: must be a JSON object")
    return value


def short(value: str) -> str:
    """`stuck` for `SAGA_STATE_STUCK`: enum values as people say them."""
    for prefix in ("SAGA_STEP_STATE_", "SAGA_STATE_", "SAGA_CAUSE_", "SAGA_EVENT_TYPE_"):
        if value.startswith(prefix):
            return value.removeprefix(prefix).lower()
    return value


class Sagas:
    """Calls of SagaService."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def define(self, definition: dict[str, Any]) -> dict[str, Any]:
        """Create a definition, or give it a new version."""
        try:
            return self._api.call("POST", "/v1/sagaDefinitions", definition)
        except PlexusError as error:
            if error.reason != "SAGA_DEFINITION_EXISTS":
                raise
        return self._api.call("PATCH", f"/v1/sagaDefinitions/{_part(definition['name'])}", definition)

    def start(self, definition: str, value: dict[str, Any], saga_id: str, request_id: str) -> dict[str, Any]:
        """Start a saga."""
        body = {"definition": definition, "input": value, "id": saga_id, "requestId": request_id}
        return self._api.call("POST", "/v1/sagas", body)

    def get(self, saga_id: str) -> dict[str, Any]:
        """A saga."""
        return self._api.call("GET", f"/v1/sagas/{_part(saga_id)}")

    def history(self, saga_id: str) -> list[dict[str, Any]]:
        """All events of a saga."""
        return list(self._pages(f"/v1/sagas/{_part(saga_id)}/events", "events", {}))

    def watch(self, saga_id: str, after: int) -> Iterator[dict[str, Any]]:
        """Events of a saga after a revision, until it has ended."""
        query = urlencode({"afterRevision": after})
        for answer in self._api.events("GET", f"/v1/sagas/{_part(saga_id)}:watch?{query}"):
            if event := answer.get("event"):
                yield event

    def listed(self, definition: str, state: str, limit: int) -> list[dict[str, Any]]:
        """The newest sagas."""
        if state and state not in STATES:
            raise InvalidArgumentError(f"--only: must be one of {', '.join(STATES)}")
        query = {"definition": definition}
        if state:
            query["state"] = f"SAGA_STATE_{state.upper()}"
        found = self._pages("/v1/sagas", "sagas", query, limit)
        return [saga for saga, _ in zip(found, range(limit), strict=False)]

    def definitions(self) -> list[dict[str, Any]]:
        """All definitions, by name."""
        return list(self._pages("/v1/sagaDefinitions", "definitions", {}))

    def cancel(self, saga_id: str) -> dict[str, Any]:
        """Have a saga undone."""
        return self._api.call("POST", f"/v1/sagas/{_part(saga_id)}:cancel", {})

    def retry(self, saga_id: str, *, skip: bool) -> dict[str, Any]:
        """Have a stuck saga go on."""
        return self._api.call("POST", f"/v1/sagas/{_part(saga_id)}:retry", {"skip": skip})

    def _pages(
        self, path: str, items: str, query: dict[str, Any], size: int = _PAGE
    ) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            asked = urlencode(query | {"pageSize": min(size, _PAGE), "pageToken": token})
            answer = self._api.call("GET", f"{path}?{asked}")
            yield from answer.get(items, [])
            token = answer.get("nextPageToken", "")
            if not token:
                return


def _part(name: str) -> str:
    return quote(name, safe="")
