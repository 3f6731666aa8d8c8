"""Consul's HTTP API: one session, a deadline on every request, typed errors.

py-consul gives the requests their shape; what it leaves to chance (connection limits, deadlines, exceptions
of its HTTP library, an environment variable that beats the token given) is done here. Blocking queries go
past it, since it hides the headers they need.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp

from consul import base  # type: ignore[attr-defined]  # mypy sees the folder consul/ of this project
from services.mesh.consul.answers import NOT_FOUND, Answer, index_of
from services.runtime.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PlexusError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from services.mesh.consul.config import ConsulConfig

T = TypeVar("T")
Params = list[tuple[str, Any]]

CONNECT_S = 2.0
"""Longest time to open a connection, in seconds."""
MAX_BODY_BYTES = 64 * 1024 * 1024
"""Largest answer that is read; ten thousand instances take about a tenth of it."""
_TEXT_BYTES = 200  # of an error's body that are told
_OK = 200


class ConsulClient:
    """A session with one agent; open it with `async with`.

    Attributes:
        config: What it was made from.
        api: py-consul's requests over this session; their errors are those of `request`.
    """

    def __init__(self, config: ConsulConfig) -> None:
        """Keep the configuration; the session is opened by `async with`.

        Args:
            config: With an address.
        """
        self.config = config
        self.api = _Api(self)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        context = await asyncio.to_thread(tls_context, self.config) if self.config.tls else True
        headers = {}
        if token := self.config.secret:
            headers["X-Consul-Token"] = token
        self._session = aiohttp.ClientSession(
            # No limit: every watch holds a connection, and a plain request must not queue behind them.
            connector=aiohttp.TCPConnector(limit=0, ssl=context),
            headers=headers,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def another(self) -> ConsulClient:
        """A session of its own with the same agent, as another event loop needs it."""
        return ConsulClient(self.config)

    async def request(
        self,
        method: str,
        path: str,
        params: Iterable[tuple[str, Any]] = (),
        *,
        data: bytes | str | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Ask the agent.

        Args:
            method: GET, PUT, POST or DELETE.
            path: From `/v1/` on.
            params: The query; the datacentre is added.
            data: The body.
            timeout_s: Deadline in seconds of the whole request; default: the configured one.

        Raises:
            UnavailableError: Consul does not answer, not in time, or has no leader.
            PermissionDeniedError: The token is unknown or lacks a right.
            ResourceExhaustedError: The agent takes no more connections of this host.
            InvalidArgumentError: Consul finds the request wrong.
        """
        if self._session is None:
            raise RuntimeError("the client is not open")
        query = [(name, str(value)) for name, value in params]
        if self.config.datacentre and not any(name == "dc" for name, _ in query):
            query.append(("dc", self.config.datacentre))
        timeout = aiohttp.ClientTimeout(
            total=timeout_s or self.config.request_timeout_s, sock_connect=CONNECT_S, connect=CONNECT_S
        )
        try:
            async with self._session.request(
                method, self.config.address + path, params=query, data=data, timeout=timeout
            ) as response:
                body = await _bounded(response)
                if response.status not in {_OK, NOT_FOUND}:
                    raise _error(response.status, body)
                return Answer(
                    status=response.status,
                    body=body,
                    index=index_of(response.headers.get("X-Consul-Index")),
                    filtered=response.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true",
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"Consul does not answer ({type(error).__name__})", dependency="consul"
            ) from error

    async def get(self, path: str, *params: tuple[str, Any]) -> Any:
        """The JSON at a path.

        Raises:
            NotFoundError: There is nothing.
            PlexusError: As `request`.
        """
        answer = await self.request("GET", path, params)
        if answer.status == NOT_FOUND:
            raise NotFoundError(_text(answer.body) or "Consul knows no such thing")
        return answer.json()

    async def put(self, path: str, content: Any = None, *params: tuple[str, Any]) -> Any:
        """Send JSON; return the JSON answered, if any.

        Raises:
            NotFoundError: What it is about does not exist.
            PlexusError: As `request`.
        """
        data = None if content is None else json.dumps(content)
        answer = await self.request("PUT", path, params, data=data)
        if answer.status == NOT_FOUND:
            raise NotFoundError(_text(answer.body) or "Consul knows no such thing")
        return answer.json() if answer.body.strip() else None

    async def check_access(self) -> None:
        """Tell a token that may do nothing from a catalogue that is empty: Consul's reads do not.

        Raises:
            FailedPreconditionError: ACLs are on and no token is configured.
            PermissionDeniedError: The token is unknown.
            UnavailableError: Consul does not answer.
        """
        try:
            await self.get("/v1/acl/token/self")
        except FailedPreconditionError:
            return  # ACLs are off
        except PermissionDeniedError as error:
            if self.config.secret:
                raise
            raise FailedPreconditionError(
                "Consul has ACLs on: set consul.token, for without one it answers as if nothing existed",
                reason="CONSUL_TOKEN_MISSING",
            ) from error


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, but not more than is sensible."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise DataLossError("Consul's answer is beyond all bounds", reason="CONSUL_ANSWER_INVALID")
        parts.append(part)
    return b"".join(parts)


def _text(body: bytes) -> str:
    return body[:_TEXT_BYTES].decode("utf-8", "replace").strip()


def _error(status: int, body: bytes) -> PlexusError:
    """The error of a status; an index that came with it is of no use and is not kept."""
    text = _text(body)
    if status == 403:  # noqa: PLR2004 - HTTP
        return PermissionDeniedError(f"Consul refuses: {text}", reason="CONSUL_DENIED")
    if status == 401:  # noqa: PLR2004 - so it says that ACLs are off
        return FailedPreconditionError(f"Consul: {text}", reason="CONSUL_ACL_DISABLED")
    if status == 429:  # noqa: PLR2004 - HTTP
        return ResourceExhaustedError(
            "the Consul agent takes no more connections of this host (http_max_conns_per_client)",
            reason="CONSUL_BUSY",
            retry_after_s=1,
        )
    if status in {400, 413, 405, 409}:
        return InvalidArgumentError(f"Consul: {text}", reason="CONSUL_INVALID")
    return UnavailableError(f"Consul: {status} {text}", dependency="consul")


def tls_context(config: ConsulConfig) -> ssl.SSLContext:
    """Trust in the configured authority alone, and the client certificate if there is one.

    Raises:
        InvalidArgumentError: A file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.certificate is not None:
            context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(
            f"consul.ca, consul.certificate, consul.key: {error}", reason="CONSUL_TLS_FILES"
        ) from error
    return context


class _Transport(base.HTTPClient):  # type: ignore[misc]  # untyped
    """py-consul's HTTP client over a ConsulClient."""

    def __init__(self, client: ConsulClient) -> None:
        parts = urlsplit(client.config.address)
        super().__init__(parts.hostname or "", parts.port or 0, parts.scheme)
        self._client = client

    async def _send(
        self, method: str, callback: Callable[[Any], T], path: str, params: Params | None, data: Any
    ) -> T:
        answer = await self._client.request(method, path, params or (), data=data or None)
        headers = {"X-Consul-Index": str(answer.index)}
        return callback(base.Response(answer.status, headers, answer.body.decode("utf-8", "replace")))

    def get(self, callback: Any, path: str, params: Params | None = None, **_: Any) -> Any:
        return self._send("GET", callback, path, params, None)

    def put(self, callback: Any, path: str, params: Params | None = None, data: Any = "", **_: Any) -> Any:
        return self._send("PUT", callback, path, params, data)

    def post(self, callback: Any, path: str, params: Params | None = None, data: Any = "", **_: Any) -> Any:
        return self._send("POST", callback, path, params, data)

    def delete(self, callback: Any, path: str, params: Params | None = None, data: Any = "", **_: Any) -> Any:
        return self._send("DELETE", callback, path, params, data)

    def close(self) -> None:
        """Nothing: the session belongs to the client."""


class _Api(base.Consul):  # type: ignore[misc]  # untyped
    """py-consul's endpoints over a ConsulClient, which adds token and datacentre."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        super().__init__(token=None)
        self.token = None  # an environment variable would otherwise beat the configured token

    def http_connect(self, *_: Any, **__: Any) -> _Transport:
        return _Transport(self._client)
