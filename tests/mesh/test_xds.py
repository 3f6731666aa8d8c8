"""The mesh as a caller sees it: real processes, real certificates, real xDS, and real ends of processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from services.mesh.trust.local import LocalCertificateSource
from services.runtime.credentials import server_credentials
from tests.ports import free_port

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

PEERS = Path(__file__).with_name("peers.py")
ANSWER_S = 90.0


class Peer:
    """A process of peers.py."""

    def __init__(self, process: Process, errors: Path) -> None:
        self.process = process
        self.port = 0
        self._errors = errors

    async def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        except TimeoutError:
            line = b""
        assert line, f"no answer; its errors: {self._errors.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def command(self, name: str, value: Any = None) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({name: value}).encode() + b"\n")
        return (await self.read())["result"]

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> None:
        self.process.terminate()
        assert await asyncio.wait_for(self.process.wait(), ANSWER_S) == 0


class World:
    """A state folder, a control plane port, and the processes around them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._peers: list[Peer] = []
        self.control_port = free_port()

    async def start(self, role: str, *options: str, **environment: str) -> Peer:
        errors = self._folder / f"{len(self._peers)}-{role}.log"
        with errors.open("w") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(PEERS), role, str(self._folder / "state"), str(self.control_port)),
                *options,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
            )
        peer = Peer(process, errors)
        self._peers.append(peer)
        peer.port = (await peer.read())["ready"]
        return peer

    async def server(self, name: str, *options: str) -> Peer:
        return await self.start("server", "--id", name, *options)

    async def close(self) -> None:
        for peer in self._peers:
            if peer.process.returncode is None:
                peer.process.kill()
        for peer in self._peers:
            await peer.process.wait()
            # Closes the pipes; without it they would be closed by the garbage collector, with a warning.
            peer.process._transport.close()  # type: ignore[attr-defined]


def assert_none_failed(seen: dict[str, int]) -> None:
    """Background calls were made and each was answered, by whichever instance."""
    assert "v-1" in seen
    assert set(seen) <= {"v-1", "v-2"}, seen


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    try:
        yield world
    finally:
        await world.close()


async def test_calls_go_to_all_instances_in_turn(world: World) -> None:
    await world.start("control")
    _, _, client = await asyncio.gather(world.server("v-1"), world.server("v-2"), world.start("client"))
    await client.command("until", ["v-1", "v-2"])
    assert await client.command("calls", 50) == {"v-1": 25, "v-2": 25}


async def test_instances_join_and_leave_without_a_failed_call(world: World) -> None:
    await world.start("control")
    first, client = await asyncio.gather(world.server("v-1"), world.start("client"))
    await client.command("until", ["v-1"])
    await client.command("start", 10)
    await world.server("v-2")
    await client.command("until", ["v-1", "v-2"])
    await first.terminate()
    await client.command("until", ["v-2"])
    assert_none_failed(await client.command("stop"))


async def test_a_killed_instance_fails_no_call_and_is_forgotten_after_its_lease(world: World) -> None:
    await world.start("control")
    first, _, client = await asyncio.gather(
        world.server("v-1", "--lease", "2"), world.server("v-2", "--lease", "2"), world.start("client")
    )
    await client.command("until", ["v-1", "v-2"])
    await client.command("start", 20)
    await client.command("calls", 20)
    await first.kill()
    await client.command("until", ["v-2"])
    assert_none_failed(await client.command("stop"))
    await client.command("listed", ["v-2"])
    await world.server("v-1")
    await client.command("until", ["v-1", "v-2"])


async def test_an_instance_that_answers_unavailable_is_made_up_for_by_another(world: World) -> None:
    await world.start("control")
    _, client = await asyncio.gather(world.server("v-2"), world.start("client"))
    await client.command("until", ["v-2"])
    # Called from its first moment on: later it would be ejected and the test would show nothing of retries.
    # By one caller: among many, all attempts of one call may happen to meet the failing instance.
    await client.command("start", 1)
    await world.server("v-1", "--failing")
    await client.command("listed", ["v-1", "v-2"])
    await asyncio.sleep(0.5)  # some calls; ejection takes a second
    assert set(await client.command("stop")) == {"v-2"}


async def test_another_service_on_a_dead_instances_port_is_never_believed(world: World) -> None:
    await world.start("control")
    port = ("--port", str(free_port()))
    # Its lease outlasts the test: once it ended the client would no longer be told of the port.
    first, client = await asyncio.gather(world.server("v-1", "--lease", "600", *port), world.start("client"))
    await client.command("until", ["v-1"])
    await first.kill()
    impostor = await world.server("impostor", "--service", "storage", "--unregistered", *port)
    # Most fail at once; on a starved machine a handshake may outlast a call's deadline.
    seen = await client.command("calls", 20)
    assert sum(seen.values()) == 20
    assert all(answer.startswith(("UNAVAILABLE: ", "DEADLINE_EXCEEDED: ")) for answer in seen), seen
    # The refusal is about who it is, not about the port: the right identity there is believed.
    await impostor.kill()
    await world.server("v-1", "--unregistered", *port)
    await client.command("until", ["v-1"])


async def test_callers_of_a_service_without_instances_are_told_at_once_and_recover(world: World) -> None:
    await world.start("control")
    client = await world.start("client")
    # Left to wait for the resource, the call would end at its deadline.
    (answer,) = await client.command("calls", 1)
    assert answer.startswith("UNAVAILABLE")
    await world.server("v-1")
    await client.command("until", ["v-1"])


async def test_a_control_plane_killed_and_started_again_fails_no_call(world: World) -> None:
    control = await world.start("control")
    _, client = await asyncio.gather(world.server("v-1"), world.start("client"))
    await client.command("until", ["v-1"])
    await client.command("start", 5)
    await control.kill()
    await client.command("calls", 50)
    await world.start("control")
    await world.server("v-2")
    await client.command("until", ["v-1", "v-2"])
    assert_none_failed(await client.command("stop"))


async def test_certificates_change_under_calls_and_new_connections_use_the_new_ones(world: World) -> None:
    ttl_s = 3.0
    ttl = ("--ttl", str(ttl_s))
    life = {"PLEXUS_MESH__CERTIFICATE_TTL_S": str(ttl_s)}
    control = await world.start("control", **life)
    _, client = await asyncio.gather(world.server("v-1", *ttl), world.start("client", *ttl))
    await client.command("until", ["v-1"])
    await client.command("start", 5)
    first_certificates_end = time.monotonic() + ttl_s
    while time.monotonic() < first_certificates_end + 1:
        await client.command("calls", 50)
    # Every connection from here on is made with certificates that did not exist at the start.
    await control.kill()
    await world.start("control", **life)
    await world.server("v-2", *ttl)
    await client.command("until", ["v-1", "v-2"])
    assert_none_failed(await client.command("stop"))


@pytest.mark.parametrize("caller", ["right", "plaintext", "no certificate", "other authority"])
async def test_only_certificates_of_the_own_authority_are_let_in(tmp_path: Path, caller: str) -> None:
    identity = LocalCertificateSource(tmp_path / "own", "vectors", 3600).ensure()
    state = tmp_path / ("other" if caller == "other authority" else "own")
    own = LocalCertificateSource(state, "cli", 3600).ensure()

    async def ask(_request: bytes, _context: Any) -> bytes:
        return b"in"

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(ask)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Ask": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity))
    await server.start()
    root = identity.ca_path.read_bytes()
    if caller == "plaintext":
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    elif caller == "no certificate":
        channel = grpc.aio.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(root))
    else:
        pair = (own.key_path.read_bytes(), own.cert_path.read_bytes())
        channel = grpc.aio.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(root, *pair))
    try:
        async with channel:
            ask_server: Any = channel.unary_unary("/test.Who/Ask")
            call = ask_server(b"", timeout=10)
            if caller == "right":
                assert await call == b"in"
            else:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(1)
