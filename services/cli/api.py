"""The REST API as the command uses it: where the edge is, who asks, and errors as one line."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Self

import httpx

from services.runtime.errors import PlexusError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CONNECT_S = 5.0
_READ_S = 300.0
_TOKEN_LIFE_S = 3600.0
_REMEDIES: dict[int | str, str] = {
    "COLLECTION_NOT_FOUND": "`plexus ingest PATH --collection NAME` makes one",
    401: "mint a token with `plexus token`",
    403: "use a consumer with the needed group: gateway/kong.yml names them",
    429: "wait a moment, or raise the limits in gateway/kong.yml",
    503: "see `plexus status`",
}


def edge_url(state_dir: Path, given: str | None) -> str:
    """The edge's address: the option, PLEXUS_URL, or the edge that runs on this state folder.

    Raises:
        UnavailableError: None of them.
    """
    url = given or os.environ.get("PLEXUS_URL")
    if url:
        return url.rstrip("/")
    from services.cli.supervisor import control, rundir  # noqa: PLC0415 - not needed with a URL

    answer = control.ask(rundir.RunDir(state_dir.resolve()).socket, "status")
    return str(answer["edge"])


def bearer_token(state_dir: Path, given: str | None, consumer: str) -> str:
    """A token: the option, PLEXUS_TOKEN, or one minted from the state folder's credentials.

    Raises:
        PlexusError: The consumer is unknown or its key is kept elsewhere.
    """
    token = given or os.environ.get("PLEXUS_TOKEN")
    if token:
        return token
    from services.gateway.credentials import CredentialStore  # noqa: PLC0415 - not needed with a token

    return CredentialStore(state_dir).mint_token(consumer, _TOKEN_LIFE_S)


class Api:
    """Calls to one edge with one token; use with `with`."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._client.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the JSON answer.

        Raises:
            PlexusError: What the edge or the service refused, with a remedy where one is known.
        """
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        self._check(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer

    def events(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Send one request and yield the server-sent events of its answer.

        Raises:
            PlexusError: As `call`, or the stream broke off.
        """
        headers = {"Accept": "text/event-stream"}
        try:
            with self._client.stream(method, path, json=body, headers=headers) as response:
                if response.is_error:
                    response.read()
                self._check(response)
                for data in _event_data(response.iter_lines()):
                    event = json.loads(data)
                    if "error" in event:
                        problem = event["error"]
                        raise PlexusError(problem.get("message", str(problem)))
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> UnavailableError:
        text = str(error) or type(error).__name__
        return UnavailableError(
            f"{self.url} does not answer ({text}): see `plexus status` and `plexus doctor`"
        )

    @staticmethod
    def _check(response: httpx.Response) -> None:
        if not response.is_error:
            return
        reason = f"HTTP_{response.status_code}"
        try:
            problem = response.json()
            problem = problem.get("error", problem)
            message = problem.get("message") or response.text
            for detail in problem.get("details", []):
                reason = detail.get("reason", reason)
                if fields := detail.get("fieldViolations"):
                    message = "; ".join(f"{each['field']}: {each['description']}" for each in fields)
        except (ValueError, AttributeError, KeyError):
            message = response.text[:200] or response.reason_phrase
        remedy = _REMEDIES.get(reason) or _REMEDIES.get(response.status_code)
        text = f"{message} (HTTP {response.status_code})" + (f": {remedy}" if remedy else "")
        raise PlexusError(text, reason=reason)


def _event_data(lines: Iterator[str]) -> Iterator[str]:
    """The data of each server-sent event; `[DONE]` ends the stream."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == "[DONE]":
                return
            yield text
    if data:
        yield "\n".join(data)
