"""The containers of docker-compose.yml as plain processes: their command lines, environment and files.

What a container has of its own becomes what this machine has: nodes are addresses of the loopback network,
ports are free ones, `/state` and `/run/secrets` are folders. Consul, RabbitMQ and PostgreSQL are real.
"""

from __future__ import annotations

import json
import os
import re
import secrets as random
import signal
import ssl
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit, urlunsplit

import httpx

from services.mesh.consul import verdict
from tests.e2e.backend import PLEXUS, eventually
from tests.models import model_folder
from tests.ports import free_port
from tests.production.compose import ROOT
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.production.compose import Project, Service
    from tests.servers.postgres import PostgresServer

START_S = 600.0
"""About half a minute on an idle machine."""
STOP_S = 120.0
ADDRESSES = {"consul": "127.0.0.1", "node-a": "127.0.0.2", "node-b": "127.0.0.3"}


class ProductionRabbit(RabbitServer):
    """RabbitMQ as its container is configured: our rabbitmq.conf, definitions with the users' digests."""

    def __init__(self, program: Path, folder: Path, secrets: Path) -> None:
        super().__init__(program, folder)
        self._secrets = secrets
        password = (secrets / "rabbitmq-password-operator").read_text()
        self.management = self.management.replace("guest:guest", f"operator:{password}")

    def _configuration(self) -> str:
        replaced = {
            "listeners.tcp.default": f"127.0.0.1:{self.port}",
            "management.tcp.port": str(urlsplit(self.management).port),
            "disk_free_limit.absolute": "50MB",
            "load_definitions": str(self._secrets / "rabbitmq-definitions.json"),
        }
        text = (ROOT / "rabbitmq" / "rabbitmq.conf").read_text()
        for key, value in replaced.items():
            text, found = re.subn(rf"(?m)^({re.escape(key)} *= *).*$", rf"\g<1>{value}", text)
            assert found == 1, key
        return f"{text}management.tcp.ip = 127.0.0.1\nstream.listeners.tcp.1 = 127.0.0.1:{self._stream}\n"


class Production:
    """All of it; open it with `with`."""

    def __init__(
        self, project: Project, secrets: Path, folder: Path, *, consul: Path, rabbitmq: Path
    ) -> None:
        """Choose ports and write the files; nothing runs yet.

        Args:
            project: The Compose file.
            secrets: Its secrets, which are changed: the URLs name other ports.
            folder: For everything that the processes write.
            consul: The program.
            rabbitmq: The program.
        """
        self.project = project
        self.secrets = secrets
        self.folder = folder
        self._consul = consul
        self.rabbit = ProductionRabbit(rabbitmq, self._made("rabbitmq"), secrets)
        self.agents = {name: free_port() for name in ADDRESSES}
        self.edge_port = free_port()
        self._control, self._signer, self._gossip = free_port(), free_port(), free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: dict[tuple[str, str], httpx.Client] = {}
        self._stack = ExitStack()
        (self._made("inference") / "models").symlink_to(model_folder(), target_is_directory=True)
        self._point("queueing-rabbitmq-url", f"127.0.0.1:{self.rabbit.port}", "plexus")

    def _made(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def _point(self, secret: str, host: str, user: str) -> None:
        """Lead a URL among the secrets to another host, user and database."""
        file = self.secrets / secret
        url = urlsplit(file.read_text())
        file.write_text(urlunsplit(url._replace(netloc=f"{user}:{url.password}@{host}", path=f"/{user}")))

    def use_postgres(self, server: PostgresServer) -> None:
        """Make role and database as the container does at its first start, under a name of their own."""
        name = f"production_{random.token_hex(6)}"
        statements = (self.secrets / "postgres-init.sql").read_text().replace("plexus", name)
        for statement in statements.strip().split(";\n"):
            server.sql(statement)
        self._stack.callback(server.sql, f"DROP ROLE {name}")
        self._stack.callback(server.sql, f"DROP DATABASE {name} WITH (FORCE)")
        self._point("queueing-state-url", f"127.0.0.1:{server.port}", name)

    # --- what a container sees, here

    def here(self, service: Service, text: str) -> str:
        """A text of the Compose file or of a mounted file, as it reads on this machine."""
        nodes = [node for node in ADDRESSES if node.startswith("node")]
        control = ",".join(f"{ADDRESSES[node]}:{self._control}" for node in nodes)
        replaced = [
            *((path, str(self.secrets / source)) for path, source in sorted(service.secrets.items())[::-1]),
            ("/run/consul", str(self.secrets)),
            ("/consul/data", str(self.folder / service.name / "data")),
            ("/consul/acl", str(ROOT / "consul" / "acl")),
            ("https://127.0.0.1:8501", f"https://127.0.0.1:{self.agents.get(service.node, 0)}"),
            ("https://consul:8501", f"https://127.0.0.1:{self.agents['consul']}"),
            ("consul:8503", f"127.0.0.1:{self._signer}"),
            ('["consul"]', f'["127.0.0.1:{self._gossip}"]'),
            ("control.plexus.local:18500", control),
            *((self.project.address(node), ADDRESSES[node]) for node in nodes),
        ]
        for old, new in replaced:
            text = text.replace(old, new)
        whole = {
            "/state": str(self._made(service.name)),
            "18500": str(self._control),
            "8443": str(self.edge_port),
        }
        return whole.get(text, text)

    def environment(self, service: Service) -> dict[str, str]:
        """The variables of a process."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PLEXUS_", "GRPC_", "CONSUL_"))
        }
        return clean | {name: self.here(service, value) for name, value in service.environment.items()}

    # --- start and stop

    def _start(self, service: Service, command: Sequence[str | Path]) -> None:
        with (self.folder / f"{service.name}.log").open("ab") as log:
            self._running[service.name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(service),
                cwd=self._made(service.name),
            )

    def _start_agent(self, name: str) -> None:
        service = self.project.services[name]
        place = service.node or "consul"
        folder = self._made(name)
        (mount,) = (mount for mount in service.mounts() if mount["type"] == "bind")
        configuration = folder / "agent.hcl"
        configuration.write_text(self.here(service, (ROOT / mount["source"]).read_text()))
        ports = {"https": self.agents[place], "server": free_port(), "serf_lan": free_port()}
        if place == "consul":
            ports |= {"serf_lan": self._gossip, "grpc_tls": self._signer}
        # Elections in seconds instead of ten times that.
        ours: dict[str, Any] = {"ports": ports, "performance": {"raft_multiplier": 1}}
        if place == "consul":
            ours |= {"bind_addr": ADDRESSES[place], "client_addr": ADDRESSES[place]}
        (folder / "ports.json").write_text(json.dumps(ours))
        arguments = [self.here(service, word) for word in service.command]
        files = (f"-config-file={file}" for file in (configuration, folder / "ports.json"))
        self._start(service, [self._consul, *arguments, *files])

    def _agent_is_ready(self, place: str) -> bool:
        """What the health check of the agents asks."""
        try:
            leader = self.consul(place).get("/status/leader")
        except httpx.HTTPError:
            return False
        return leader.status_code == httpx.codes.OK and ":" in leader.text

    def consul(self, place: str, token: str = "") -> httpx.Client:
        """An agent's API, with a token of the secrets."""
        if (place, token) not in self._clients:
            trusted = ssl.create_default_context(cafile=self.secrets / "consul-ca.pem")
            secret = (self.secrets / f"consul-token-{token}").read_text() if token else ""
            client = httpx.Client(
                base_url=f"https://127.0.0.1:{self.agents[place]}/v1",
                verify=trusted,
                headers={"X-Consul-Token": secret} if secret else {},
                timeout=30,
            )
            self._clients[place, token] = self._stack.enter_context(client)
        return self._clients[place, token]

    def apply_acl(self) -> str:
        """Run the job that makes policies and tokens; what it says."""
        job = self.project.services["consul-acl"]
        command = [self.here(job, word) for word in job.content["entrypoint"]]
        environment = self.environment(job)
        environment["PATH"] = f"{self._consul.parent}:{environment['PATH']}"
        done = subprocess.run(
            [*command, self.secrets],
            env=environment,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return done.stdout

    def serve(self, name: str) -> None:
        """Start a process of Plexus."""
        service = self.project.services[name]
        self._start(service, [*PLEXUS, *(self.here(service, word) for word in service.command)])

    def healthy(self, name: str) -> bool:
        """Whether this life of the process, and no earlier one, is registered and healthy."""
        service = self.project.services[name]
        instance = verdict.instance_of(service.command)
        try:
            known = self.consul(service.node, "management").get(f"/agent/service/{instance}")
            if not known.is_success or known.json()["Meta"]["pid"] != str(self._running[name].pid):
                return False
            return verdict.ask(instance, self.environment(service))[0]
        except (OSError, httpx.HTTPError):
            return False

    def wait_healthy(self) -> None:
        """Wait until every process is."""
        waiting = {service.name for service in self.project.processes()}

        def all_are() -> bool:
            name = min(waiting)  # one at a time: each look costs a handshake
            status = self._running[name].poll()
            assert status is None, f"{name} ended with {status}\n{self.explain()}"
            if self.healthy(name):
                waiting.discard(name)
            return not waiting

        eventually(all_are, START_S, lambda: f"not healthy: {waiting}\n{self.explain()}")

    def start(self) -> None:
        """Start everything in the order that the health conditions make."""
        self.rabbit.begin()
        self._start_agent("consul")
        eventually(lambda: self._agent_is_ready("consul"), START_S, self.explain)
        self.apply_acl()
        for name in ("consul-a", "consul-b"):
            self._start_agent(name)
        for node in ("node-a", "node-b"):
            eventually(lambda node=node: self._agent_is_ready(node), START_S, self.explain)  # type: ignore[misc]
        for service in self.project.processes():
            self.serve(service.name)
        self.rabbit.wait_ready()
        self.wait_healthy()

    def kill(self, name: str) -> None:
        """End a process as kill -9 does."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> dict[str, int]:
        """Ask the processes of Plexus to end; with which status each did."""
        running = {
            each.name: self._running[each.name]
            for each in self.project.processes()
            if each.name in self._running
        }
        for process in running.values():
            process.terminate()
        return {name: process.wait(STOP_S) for name, process in running.items()}

    def explain(self) -> str:
        """The last lines of every log."""
        lines = []
        for file in sorted(self.folder.glob("*.log")):
            lines += [f"{file.name}: {line}" for line in file.read_text(errors="replace").splitlines()[-6:]]
        return "\n".join(lines)

    def plexus(self, name: str, *arguments: str) -> str:
        """Run a command in a container, as `docker compose exec` does; what it prints."""
        done = subprocess.run(
            [*PLEXUS, *arguments],
            env=self.environment(self.project.services[name]),
            capture_output=True,
            text=True,
            timeout=STOP_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def edge(self, consumer: str = "demo") -> httpx.Client:
        """A client of the public API."""
        token = self.plexus("edge", "token", "--consumer", consumer)
        trusted = ssl.create_default_context(cafile=self.secrets / "edge.pem")
        headers = {"Authorization": f"Bearer {token}"}
        url = f"https://localhost:{self.edge_port}"
        return self._stack.enter_context(
            httpx.Client(base_url=url, verify=trusted, headers=headers, timeout=60)
        )

    def check_health(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run the health check of the image as a program."""
        service = self.project.services[name]
        return subprocess.run(
            [sys.executable, "-m", verdict.__name__, verdict.instance_of(service.command)],
            env=self.environment(service),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=STOP_S,
            check=False,
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self.rabbit.kill()
        self._stack.close()
