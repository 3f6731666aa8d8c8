"""The control socket: one JSON object a line, a request and then answers, on a unix socket of mode 0600."""

from __future__ import annotations

import json
import os
import selectors
import socket
from typing import TYPE_CHECKING, Any

from services.runtime.errors import FailedPreconditionError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MAX_REQUEST_BYTES = 4096
_MAX_CLIENTS = 16


class ControlServer:
    """The supervisor's side, driven by its selector.

    Args:
        path: Where to listen; a stale socket there is removed.
        selector: The supervisor's; events carry a callable to call.
        handle: Takes a request and gives the answer.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        handle: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._path = path
        self._selector = selector
        self._handle = handle
        self._clients: dict[socket.socket, bytes] = {}
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.parent.stat().st_uid != os.getuid():
            raise FailedPreconditionError(f"{path.parent} belongs to someone else: remove it or set TMPDIR")
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(_MAX_CLIENTS)
        self._listener.setblocking(False)  # noqa: FBT003 - positional only
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def descriptors(self) -> list[int]:
        """What a child must close."""
        return [self._listener.fileno(), *(client.fileno() for client in self._clients)]

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setblocking(False)  # noqa: FBT003 - positional only
        if len(self._clients) >= _MAX_CLIENTS:
            client.close()
            return
        self._clients[client] = b""
        self._selector.register(client, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: socket.socket) -> None:
        if client not in self._clients:
            return  # dropped by an event of the same round
        try:
            data = client.recv(_MAX_REQUEST_BYTES)
        except OSError:
            data = b""
        buffered = self._clients[client] + data
        if not data or len(buffered) > _MAX_REQUEST_BYTES:
            self._drop(client)
            return
        *lines, rest = buffered.split(b"\n")
        self._clients[client] = rest
        for line in lines:
            try:
                request = json.loads(line)
                answer = self._handle(request if isinstance(request, dict) else {})
            except ValueError:
                answer = {"error": "not JSON"}
            self._send(client, answer)

    def _send(self, client: socket.socket, answer: dict[str, Any]) -> None:
        try:
            client.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:  # it left, or its buffer is full because it does not read
            self._drop(client)

    def broadcast(self, answer: dict[str, Any]) -> None:
        """Tell all connected clients, such as `plexus down`, what happens."""
        for client in list(self._clients):
            self._send(client, answer)

    def _drop(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            self._selector.unregister(client)
            client.close()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        for client in list(self._clients):
            self._drop(client)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)


def call(path: Path, request: dict[str, Any], timeout_s: float = 5.0) -> Iterator[dict[str, Any]]:
    """Send a request to a running supervisor and yield its answers until it closes the connection.

    Raises:
        UnavailableError: None runs, or it did not answer in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answers:
                for line in answers:
                    yield json.loads(line)
        except (FileNotFoundError, ConnectionError) as error:
            raise UnavailableError("Plexus is not running: start it with `plexus up`") from error
        except TimeoutError as error:
            raise UnavailableError("the supervisor does not answer: see `plexus logs supervisor`") from error


def ask(path: Path, command: str) -> dict[str, Any]:
    """The first answer to a command.

    Raises:
        UnavailableError: No supervisor answers.
    """
    answer = next(call(path, {"command": command}), None)
    if answer is None:
        raise UnavailableError("Plexus is stopping: try again in a moment")
    return answer
