"""A program of any language joins: files, environment, registration, its end."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from services.mesh.join.environment import Language, how
from services.mesh.join.session import RESERVED, check_service
from services.runtime.errors import InvalidArgumentError
from tests.e2e.backend import alive
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(300)
PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]
CONTROL = """
import asyncio, signal, sys
from pathlib import Path
from services.mesh import main

async def run(state):
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await main.serve(state, int(sys.argv[2]), lambda: print("ready", flush=True), stop)

asyncio.run(run(Path(sys.argv[1]).resolve()))
"""
SERVER = """
import json, os, signal, sys, time
from concurrent import futures
from pathlib import Path
import grpc

def read(name):
    return Path(os.environ[name]).read_bytes()

def configuration():
    pair = (read("PLEXUS_KEY_PATH"), read("PLEXUS_CERTIFICATE_PATH"))
    return grpc.ssl_server_certificate_configuration([pair], read("PLEXUS_CA_PATH"))

server = grpc.server(futures.ThreadPoolExecutor(2))
ask = grpc.unary_unary_rpc_method_handler(lambda request, context: b"joined")
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Ask": ask}),))
credentials = grpc.dynamic_ssl_server_credentials(configuration(), configuration, True)
server.add_secure_port("127.0.0.1:" + sys.argv[1], credentials)
server.start()
def stop(*_):
    # Who joined it has said in the registry that it leaves, before it is told to.
    catalogue = Path(os.environ["PLEXUS_STATE"], "data/control/catalogue.json")
    while '"draining"' not in catalogue.read_text():
        time.sleep(0.05)
    print("drained", flush=True)
    server.stop(1)

signal.signal(signal.SIGTERM, stop)
server.wait_for_termination()
sys.exit(7)
"""
CLIENT = """
import sys, time
import grpc, grpc.experimental

credentials = grpc.xds_channel_credentials(grpc.experimental.insecure_channel_credentials())
deadline = time.monotonic() + 60
with grpc.secure_channel("xds:///orders", credentials) as channel:
    ask = channel.unary_unary("/test.Who/Ask")
    while True:
        try:
            print(ask(b"", timeout=10).decode(), flush=True)
            break
        except grpc.RpcError as error:
            if time.monotonic() > deadline:
                sys.exit(str(error))
            time.sleep(0.1)
"""


def environment(state: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLEXUS_", "GRPC_XDS"))}
    return {**kept, "PLEXUS_STATE": str(state)}


@contextmanager
def running(*command: Any, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [str(part) for part in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    with running(sys.executable, "-c", CONTROL, folder, free_port(), env=environment(folder)) as control:
        assert control.stdout is not None
        assert control.stdout.readline() == "ready\n"
        yield folder


def plexus(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PLEXUS, *arguments],
        env=environment(state),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def joined(state: Path, service: str, *arguments: str) -> dict[str, Any]:
    done = plexus(state, "join", "--service", service, "--once", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_files_are_complete_and_the_key_is_for_its_owner_alone(state: Path) -> None:
    report = joined(state, "orders", "--zone", "b")
    variables = report["environment"]
    certificate = x509.load_pem_x509_certificate(Path(variables["PLEXUS_CERTIFICATE_PATH"]).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [report["spiffe_id"]]
    key = Path(variables["PLEXUS_KEY_PATH"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().startswith("-----BEGIN PRIVATE KEY-----")  # PKCS#8: Java reads no SEC1
    bootstrap = json.loads(Path(variables["GRPC_XDS_BOOTSTRAP"]).read_text())
    # What one of the four libraries cannot do without.
    assert bootstrap["node"]["id"]
    assert bootstrap["node"]["locality"]["zone"] == "b"
    (server,) = bootstrap["xds_servers"]
    assert [entry["type"] for entry in server["channel_creds"]] == ["plexus_tls", "tls", "google_default"]
    assert "ignore_resource_deletion" in server["server_features"]
    provider = bootstrap["certificate_providers"]["plexus"]["config"]
    for files in (provider, server["channel_creds"][0]["config"]):
        assert files["refresh_interval"]
        for name in ("ca_certificate_file", "certificate_file", "private_key_file"):
            assert Path(files[name]).is_file()


def test_the_variables_can_be_taken_over_by_a_shell(state: Path) -> None:
    done = plexus(state, "join", "--service", "orders", "--once", "--language", "go")
    script = f'{done.stdout}\ntest -f "$GRPC_XDS_BOOTSTRAP" -a -f "$PLEXUS_KEY_PATH"'
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0
    assert "xds:///inference" in done.stdout


@pytest.mark.parametrize("language", [entry for entry in Language if entry is not Language.ENV])
def test_there_is_a_how_to_for_every_language(language: Language) -> None:
    assert any("xds:///" in line for line in how(language))


@pytest.mark.parametrize("service", [*sorted(RESERVED), "Orders", "a/b", "", "-"])
def test_names_that_are_none_or_believed_are_refused(service: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_service(service)


def test_without_a_mesh_it_says_so(tmp_path: Path) -> None:
    done = plexus(tmp_path, "join", "--service", "orders", "--once")
    assert done.returncode == 1
    assert "start it with `plexus up`" in done.stderr


def test_an_unknown_language_names_those_that_there_are(state: Path) -> None:
    done = plexus(state, "join", "--service", "orders", "--once", "--language", "cobol")
    assert "there are env, go, java, node, cpp, python" in done.stderr


def test_a_server_that_joined_is_called_by_a_client_that_joined_until_it_ends(
    state: Path, tmp_path: Path
) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    (tmp_path / "client.py").write_text(textwrap.dedent(CLIENT))
    serving = [*PLEXUS, "join", "--service", "orders", "--port", str(port), "--version", "3.1"]
    calling = [*PLEXUS, "join", "--service", "shop"]
    program = (sys.executable, str(tmp_path / "server.py"), str(port))
    with running(*serving, *program, env=environment(state)) as server:
        client = subprocess.run(
            [*calling, sys.executable, str(tmp_path / "client.py")],
            env=environment(state),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (client.returncode, client.stdout) == (0, "joined\n"), client.stderr
        (instance,) = instances(state)
        assert (instance["port"], instance["version"]) == (port, "3.1")
        server.terminate()
        output, errors = server.communicate(timeout=60)
        assert (server.returncode, output) == (7, "drained\n"), errors  # the program's own code
    deadline = time.monotonic() + 60
    while instances(state):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def instances(state: Path) -> list[dict[str, Any]]:
    catalogue = json.loads((state / "data/control/catalogue.json").read_text())["instances"]
    return [entry for entry in catalogue if entry["service"] == "orders"]


@pytest.mark.skipif(sys.platform != "linux", reason="nothing ties processes elsewhere")
def test_a_program_does_not_outlive_the_killed_command_that_runs_it(state: Path) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    joining = [*PLEXUS, "join", "--service", "orders", "--", sys.executable, "-c", program]
    with running(*joining, env=environment(state)) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
        process.wait(60)
        deadline = time.monotonic() + 60
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_program_that_is_not_there_is_named(state: Path) -> None:
    done = plexus(state, "join", "--service", "orders", "--", "no-such-program")
    assert done.returncode == 1
    assert "no-such-program: no such program" in done.stderr
