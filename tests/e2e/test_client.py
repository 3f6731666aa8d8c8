"""plexus.client in a program of its own, as a user writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.backend import Backend

pytestmark = pytest.mark.e2e

PROGRAM = """
import asyncio, json
import grpc
import plexus.client
from plexus.vectors.v1 import vectors_pb2 as pb, vectors_pb2_grpc

async def main():
    async with plexus.client.connect() as mesh:
        vectors = mesh.stub(vectors_pb2_grpc.VectorsServiceStub)
        films = pb.Collection(name="films", dimension=3)
        await vectors.CreateCollection(pb.CreateCollectionRequest(collection=films))
        points = [
            pb.Point(id="near", vector=pb.Vector(values=[1, 0, 0])),
            pb.Point(id="far", vector=pb.Vector(values=[0, 1, 0])),
        ]
        await vectors.UpsertPoints(pb.UpsertPointsRequest(collection="films", points=points))
        asked = pb.SearchPointsRequest(collection="films", vector=pb.Vector(values=[1, 0.1, 0]))
        found = [result.point.id for result in (await vectors.SearchPoints(asked)).results]
        asked = pb.SearchPointsRequest(collection="films", vector=pb.Vector(values=[1, 2]))
        try:
            await vectors.SearchPoints(asked)
        except grpc.RpcError as error:
            refused = plexus.client.problem(error)
        print(json.dumps({
            "found": found,
            "code": refused.code.name,
            "domain": refused.domain,
            "fields": [violation.field for violation in refused.violations],
        }))

asyncio.run(main())
"""


def run(program: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={name: value for name, value in os.environ.items() if not name.startswith(("PLEXUS_", "GRPC_"))}
        | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_program_finds_the_running_backend_calls_it_and_reads_errors(backend: Backend) -> None:
    done = run(PROGRAM, {"PLEXUS_STATE": str(backend.state)})
    assert done.returncode == 0, f"{done.stderr}\n{backend.log_tail()}"
    said: dict[str, Any] = json.loads(done.stdout)
    assert said == {
        "found": ["near", "far"],
        "code": "INVALID_ARGUMENT",
        "domain": "plexus",
        "fields": ["vector"],
    }


def test_a_joined_program_needs_the_bootstrap_file_alone(backend: Backend) -> None:
    program = """
import asyncio
import plexus.client
from plexus.storage.v1 import storage_pb2, storage_pb2_grpc

async def main():
    async with plexus.client.connect() as mesh:
        storage = mesh.stub(storage_pb2_grpc.StorageServiceStub)
        print(len((await storage.ListBuckets(storage_pb2.ListBucketsRequest())).buckets))

asyncio.run(main())
"""
    bootstrap = backend.state / "identities" / "cli" / "bootstrap.json"
    done = run(program, {"GRPC_XDS_BOOTSTRAP": str(bootstrap), "PLEXUS_STATE": "/nowhere"})
    assert done.returncode == 0, f"{done.stderr}\n{backend.log_tail()}"
    assert int(done.stdout) >= 3
