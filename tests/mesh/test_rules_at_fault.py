"""A service whose intentions are at fault when it starts: closed, and says why, until they are mended."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.mesh.trust.local import LocalCertificateSource
from services.runtime.config import project_file
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)
WITHIN_S = 120
PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]


class Processes:
    """A control plane and a service of one state folder, each started as an orchestrator would."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.rules = folder / "intentions"
        shutil.copytree(project_file("consul/intentions"), self.rules)
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PLEXUS_", "GRPC_"))
        }
        self._environment = kept | {
            "PLEXUS_STATE": str(self.state),
            "PLEXUS_MESH__INTENTIONS": str(self.rules),
            "PLEXUS_MESH__CONTROL_PORT": str(free_port()),
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> None:
        self._running.append(
            subprocess.Popen([*PLEXUS, "serve", name], env=self._environment, cwd=self.rules.parent)
        )

    def stop(self) -> list[int]:
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
        return [process.wait(WITHIN_S) for process in self._running]

    def kill(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()

    def registered(self, service: str) -> dict[str, Any]:
        try:
            entries = json.loads((self.state / "data/control/catalogue.json").read_text())["instances"]
        except (OSError, ValueError):
            return {}
        return next((entry for entry in entries if entry["service"] == service), {})

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done():
            assert [process.poll() for process in self._running] == [None] * len(self._running)
            assert time.monotonic() < deadline, (self.registered("control"), self.registered("storage"))
            time.sleep(0.05)

    def write(self, name: str, text: str) -> None:
        temporary = self.rules / f".{name}"
        temporary.write_text(text)
        temporary.replace(self.rules / f"{name}.yaml")

    async def health(self) -> str:
        """What the edge is told by the storage service about its health; or the code of the refusal."""
        identity = LocalCertificateSource(self.state, "edge", 3600).ensure()
        files = (identity.ca_path, identity.key_path, identity.cert_path)
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
        address = f"127.0.0.1:{self.registered('storage')['port']}"
        options = [("grpc.ssl_target_name_override", "storage.plexus.local")]
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=WITHIN_S)
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    try:
        yield made
    finally:
        made.kill()


def serves(processes: Processes, service: str) -> bool:
    entry = processes.registered(service)
    return bool(entry) and entry["health"] == "serving" and "waits" not in entry["meta"]


def test_a_service_denies_everything_and_waits_until_its_file_is_mended(processes: Processes) -> None:
    good = (processes.rules / "storage.yaml").read_text()
    processes.write("storage", good.replace("allow", "perhaps", 1))
    # What would let everyone in if the file at fault were as good as none.
    processes.write("any", "Kind: service-intentions\nName: '*'\nSources: [{Name: '*', Action: allow}]\n")
    processes.start("control")
    processes.until(lambda: serves(processes, "control"))
    processes.start("storage")
    processes.until(lambda: processes.registered("storage"))
    entry = processes.registered("storage")
    assert entry["health"] == "not_serving"
    assert f"intentions: {processes.rules}/storage.yaml:" in entry["meta"]["waits"]
    assert asyncio.run(processes.health()) == "PERMISSION_DENIED"
    processes.write("storage", good)
    processes.until(lambda: serves(processes, "storage"))
    assert asyncio.run(processes.health()) == "SERVING"
    # Once known, the rules hold whatever becomes of the file.
    processes.write("storage", "Kind: [")
    processes.write("search", "")
    assert asyncio.run(processes.health()) == "SERVING"
    assert processes.stop() == [0, 0]


def test_a_control_plane_waits_for_its_own_rules_too(processes: Processes) -> None:
    good = (processes.rules / "control.yaml").read_text()
    processes.write("control", good + "  - {Name: edge}\n")
    processes.start("control")
    processes.until(lambda: "waits" in processes.registered("control").get("meta", {}))
    assert processes.registered("control")["health"] == "not_serving"
    processes.write("control", good)
    processes.until(lambda: serves(processes, "control"))
    assert processes.stop() == [0]
