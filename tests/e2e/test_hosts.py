"""Three hosts: a Consul server with the control plane, and two agents with the services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.backend import PLEXUS, REPOSITORY, eventually
from tests.models import model_folder
from tests.servers.hosts import Host, hosts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
CONTROL_PORT = 18500
PLACES = {
    1: ("control",),
    2: ("vectors", "search", "inference"),
    3: ("storage", "queueing", "knowledge", "edge"),
}
START_S = 180

# Runs on a host: one request to its edge; prints status and body.
_ASK = """
import sys, urllib.error, urllib.request
method, path, token, body = sys.argv[1:]
headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json"}
url = "http://127.0.0.1:8000" + path
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    answer = urllib.request.urlopen(request, timeout=60)
    print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(0, error)
"""


@dataclass
class Place:
    """What runs on a host."""

    host: Host
    folder: Path
    number: int
    consul: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
        return clean | {
            "PLEXUS_STATE": str(self.state),
            "PLEXUS_SERVER__HOST": self.host.address,
            "PLEXUS_MESH__CONTROL_PORT": str(CONTROL_PORT),
            "PLEXUS_MESH__CONTROL_PLANES": f"10.77.0.1:{CONTROL_PORT}",
            "PLEXUS_CONSUL__ADDRESS": "http://127.0.0.1:8500",
            "PLEXUS_CONSUL__GRPC_ADDRESS": "10.77.0.1:8502",
        }

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = self.host.start(
                *command, stdout=log, stderr=log, env=self.environment, cwd=REPOSITORY
            )

    def start_agent(self) -> None:
        config: dict[str, Any] = {
            "node_name": f"host-{self.number}",
            "data_dir": str(self.folder / "consul"),
            "bind_addr": self.host.address,
            "client_addr": "127.0.0.1",
            "connect": {"enabled": True},
            "disable_update_check": True,
            "limits": {"http_max_conns_per_client": 2000},
            "performance": {"raft_multiplier": 1},
        }
        if self.number == 1:
            config |= {
                "server": True,
                "bootstrap_expect": 1,
                "addresses": {"grpc": self.host.address},
                "ports": {"grpc": 8502, "grpc_tls": -1},
            }
        else:
            config["retry_join"] = ["10.77.0.1"]
        file = self.folder / "consul.json"
        file.write_text(json.dumps(config))
        self.start("consul", str(self.consul), "agent", f"-config-file={file}")

    def serve(self, name: str, number: int = 1) -> None:
        self.start(f"{name}-{number}", *PLEXUS, "serve", name, "--number", str(number))

    def plexus(self, *arguments: str) -> str:
        done = self.host.run(*PLEXUS, *arguments, env=self.environment, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log_tail(self) -> str:
        lines = []
        for file in sorted(self.folder.glob("*.log")):
            lines += [f"{file.name}: {line}" for line in file.read_text(errors="replace").splitlines()[-6:]]
        return "\n".join(lines)

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + 20
        for process in self.running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Cluster:
    """All of them, asked through the edge on the third."""

    def __init__(self, places: dict[int, Place]) -> None:
        self.places = places
        self._token = ""

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        edge = self.places[3]
        if not (edge.state / "credentials.json").exists():
            return 0, "the edge has not started yet"
        self._token = self._token or edge.plexus("token", "--consumer", "demo")
        text = "" if body is None else json.dumps(body)
        done = edge.host.run(sys.executable, "-c", _ASK, method, path, self._token, text, timeout_s=90)
        status, _, answer = done.stdout.partition(" ")
        return int(status or 0), answer

    def works(self) -> bool:
        """Whether a question is answered, which takes every service on both hosts."""
        status, answer = self.ask(
            "POST", "/v1/knowledge/collections/hosts:ask", {"question": "Who keeps bees?"}
        )
        return status == 200 and '"answer"' in answer and "Morag" in answer

    def explain(self) -> str:
        return "\n".join(place.log_tail() for place in self.places.values())


@pytest.fixture
def cluster(consul_program: Path, tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        places = {}
        for number, host in enumerate(stack.enter_context(hosts(3)), 1):
            folder = tmp_path / str(number)
            (folder / "state").mkdir(parents=True)
            (folder / "state" / "models").symlink_to(model_folder(), target_is_directory=True)
            places[number] = Place(host, folder, number, consul_program)
            stack.callback(places[number].stop)
            places[number].start_agent()
        for number, names in PLACES.items():
            for name in names:
                places[number].serve(name)
        yield Cluster(places)


def test_services_on_several_hosts_are_one_mesh_and_outlive_the_loss_of_an_instance_and_of_the_control_plane(
    cluster: Cluster,
) -> None:
    def created() -> bool:
        status, _ = cluster.ask("POST", "/v1/knowledge/collections", {"name": "hosts"})
        return status in {200, 409}

    eventually(created, START_S, cluster.explain)
    document = {
        "uri": "bees.txt",
        "content": "TW9yYWcga2VlcHMgYmVlcyBpbiBUb2Jlcm1vcnku",
    }  # Morag keeps bees in Tobermory.

    def ingested() -> bool:
        status, _ = cluster.ask(
            "POST", "/v1/knowledge/collections/hosts/documents:ingest", {"documents": [document]}
        )
        return status == 200 and cluster.works()

    eventually(ingested, START_S, cluster.explain)

    # A second instance on the other host takes over when the first is killed.
    cluster.places[3].serve("inference", 2)

    def both() -> bool:
        told = json.loads(cluster.places[1].plexus("mesh", "explain", "inference", "--json"))
        return "10.77.0.3" in json.dumps(told) and "10.77.0.2" in json.dumps(told)

    eventually(both, START_S, cluster.explain)
    first = cluster.places[2].running.pop("inference-1")
    first.kill()
    first.wait()
    eventually(cluster.works, 60, cluster.explain)

    # Without the first host there is neither control plane nor Consul server: what is known goes on.
    cluster.places[1].host.unplug()
    for _ in range(5):
        assert cluster.works(), cluster.explain()
    cluster.places[1].host.plug()
    cluster.places[2].serve("inference")
    eventually(both, START_S, cluster.explain)
    assert cluster.works(), cluster.explain()
