"""Programs in other languages in the mesh of a running `plexus up`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import yaml

from plexus.inference.v1 import inference_pb2
from services.mesh.trust.domain import spiffe_id
from tests.e2e.backend import REPOSITORY, Backend, eventually
from tests.models import model_folder
from tests.polyglot.callers import environment, joined, joined_caller, ports
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.polyglot.programs import Caller

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
LIST_MODELS = "/plexus.inference.v1.InferenceService/ListModels"
EMBED = "/plexus.inference.v1.InferenceService/Embed"
WITHIN_S = 90
AT_ONCE = 4
PYTHON = (sys.executable, REPOSITORY / "tests/mesh/caller.py")


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Three instances of inference, of which the service `shop` may list models and do nothing else."""
    made = Backend(tmp_path_factory.mktemp("state"), free_port())
    (made.state / "models").symlink_to(model_folder(), target_is_directory=True)
    intentions = shutil.copytree(REPOSITORY / "consul/intentions", made.state / "intentions")
    inference = yaml.safe_load((intentions / "inference.yaml").read_text())
    permission = {"Action": "allow", "HTTP": {"PathExact": LIST_MODELS}}
    inference["Sources"].append({"Name": "shop", "Permissions": [permission]})
    (intentions / "inference.yaml").write_text(yaml.safe_dump(inference))
    (made.state / "plexus.yaml").write_text(json.dumps({"mesh": {"intentions": str(intentions)}}))
    try:
        made.plexus("up", "--detach", "--scale", "inference=3")
        made.wait_serving(WITHIN_S)
        yield made
    finally:
        made.down()


def registered(backend: Backend, service: str) -> list[dict[str, Any]]:
    catalogue = json.loads((backend.state / "data/control/catalogue.json").read_text())["instances"]
    return [entry for entry in catalogue if entry["service"] == service]


def intend(backend: Backend, sources: list[dict[str, Any]]) -> None:
    """Replace the rules of inference while everything runs."""
    file = backend.state / "intentions" / "inference.yaml"
    temporary = file.with_suffix(".new")
    temporary.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "Sources": sources}))
    temporary.replace(file)


async def test_a_program_is_refused_while_an_intention_denies_it(
    scaled: Backend, caller: Caller, tmp_path: Path
) -> None:
    env = environment(PLEXUS_STATE=str(scaled.state))
    scaled.wait_serving(WITHIN_S)
    sources = yaml.safe_load((scaled.state / "intentions" / "inference.yaml").read_text())["Sources"]
    async with joined_caller(caller, "shop", "xds:///inference", env, tmp_path) as client:
        await client.until(lambda answers: not any(answer.failed for answer in answers), method=LIST_MODELS)
        try:
            intend(scaled, [*(each for each in sources if each["Name"] != "shop")])
            await client.until(
                lambda answers: {answer.code for answer in answers} == {"PERMISSION_DENIED"},
                method=LIST_MODELS,
            )
        finally:
            intend(scaled, sources)
        await client.until(lambda answers: not any(answer.failed for answer in answers), method=LIST_MODELS)


async def test_a_program_does_what_an_intention_allows_and_survives_a_killed_instance(
    scaled: Backend, caller: Caller, tmp_path: Path
) -> None:
    env = environment(PLEXUS_STATE=str(scaled.state))
    scaled.wait_serving(WITHIN_S)
    async with joined_caller(caller, "shop", "xds:///inference", env, tmp_path) as client:
        refused = await client.call(EMBED)
        assert refused.code == "PERMISSION_DENIED", refused
        spread = await client.until(
            lambda answers: len(ports(answers)) == 3 and not any(answer.failed for answer in answers),
            method=LIST_MODELS,
        )
        models = inference_pb2.ListModelsResponse.FromString(spread[0].body).models
        assert "minilm" in [model.name for model in models]
        before = ports(spread).keys()
        pid = scaled.wait_serving(WITHIN_S)["inference-2"]["pid"]
        async with client.meanwhile(LIST_MODELS, at_once=AT_ONCE) as answers:
            os.kill(pid, signal.SIGKILL)
            # Another instance takes its place, on a port of its own, and is called.
            await asyncio.to_thread(
                eventually, lambda: len({a.port for a in answers if not a.failed} - before) > 0, WITHIN_S
            )
        failed = [answer for answer in answers if answer.failed]
        in_doubt = [answer for answer in failed if (answer.code, answer.text) == caller.in_doubt]
        assert failed == in_doubt
        assert len(in_doubt) <= AT_ONCE


async def test_a_server_in_go_is_registered_and_called_by_a_python_service(
    scaled: Backend, go_program: Path, tmp_path: Path
) -> None:
    port = free_port()
    env = environment(PLEXUS_STATE=str(scaled.state))
    options = ("--port", str(port), "--version", "3.1")
    async with joined("orders", [go_program, "serve", str(port)], env, tmp_path, *options) as server:
        async with joined("accounts", PYTHON, env, tmp_path) as client:
            process = client.process
            assert process.stdin is not None
            assert process.stdout is not None
            assert json.loads(await asyncio.wait_for(process.stdout.readline(), WITHIN_S)) == {"ready": True}
            seen: dict[str, int] = {}
            async with asyncio.timeout(WITHIN_S):
                while seen != {spiffe_id("accounts"): 10}:
                    command = {"id": 0, "count": 10, "service": "orders", "method": "/shop.Orders/Get"}
                    process.stdin.write(json.dumps(command).encode() + b"\n")
                    seen = json.loads(await process.stdout.readline())["seen"]
        (instance,) = registered(scaled, "orders")
        assert (instance["port"], instance["version"]) == (port, "3.1")
        root = (scaled.state / "ca" / "ca.pem").read_bytes()
        # Who shows no certificate is not let in.
        async with grpc.aio.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(root)) as nobody:
            get: Any = nobody.unary_unary("/shop.Orders/Get")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await get(b"", timeout=WITHIN_S)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        with contextlib.suppress(ProcessLookupError):
            server.process.terminate()
        assert await asyncio.wait_for(server.process.wait(), WITHIN_S) == 0
    await asyncio.to_thread(eventually, lambda: not registered(scaled, "orders"), WITHIN_S)
