"""Our declared part of the xDS API is wire-compatible with the official one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from plexus.xds.v1 import xds_pb2
from services.mesh.trust.domain import spiffe_id
from services.mesh.xds.build import build
from tests.contracts.registry import instance
from tests.mesh.policies import EVERYTHING

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("official_xds.py")

pytestmark = pytest.mark.timeout(400)


def _uv() -> str:
    local = ROOT / ".tools" / "bin" / "uv"
    found = shutil.which("uv") or (str(local) if local.exists() else None)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("uv is needed: `make sync`")
        pytest.skip("needs uv: `make sync`")
    return found


def _compare(tmp_path: Path, file: descriptor_pb2.FileDescriptorProto) -> subprocess.CompletedProcess[str]:
    descriptors = tmp_path / "descriptors.pb"
    descriptors.write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())
    made = build("vectors", [instance()], EVERYTHING, spiffe_id("vectors"))
    resources = tmp_path / "resources.pb"
    resources.write_bytes(b"".join(resource.body.frame for resource in made.values()))
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run(
        [
            *(_uv(), "run", "--isolated", "--no-project", "--with", "xds-protos==1.85.0"),
            *("python", str(SCRIPT), str(ROOT / "protos/plexus/xds/v1/xds.proto"), descriptors, resources),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _ours() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    xds_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def test_every_field_is_the_official_one_and_resources_have_none_that_is_not(tmp_path: Path) -> None:
    done = _compare(tmp_path, _ours())
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]


def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    file = _ours()
    cluster = next(message for message in file.message_type if message.name == "Cluster")
    next(field for field in cluster.field if field.name == "lb_policy").number = 7
    done = _compare(tmp_path, file)
    assert done.returncode == 1
    assert done.stdout.startswith("Cluster.lb_policy: ")
