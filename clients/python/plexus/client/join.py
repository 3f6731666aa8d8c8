"""The way into the mesh for a program: its identity, and where the control plane is."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from plexus.client.channel import UNARY_TIMEOUT_S, Mesh
from plexus.client.state import default_state_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

IDENTITY = "cli"
"""The mesh identity of programs that this user runs; `plexus up` makes it and keeps it fresh."""
_FILE = "GRPC_XDS_BOOTSTRAP"
_INLINE = "GRPC_XDS_BOOTSTRAP_CONFIG"


class NotJoinedError(Exception):
    """This process has no way into a mesh; the text says what to do."""


@asynccontextmanager
async def connect(
    state: str | os.PathLike[str] | None = None, *, timeout_s: float = UNARY_TIMEOUT_S
) -> AsyncIterator[Mesh]:
    """Join the mesh and give typed stubs for every service; all channels are closed at the end.

        async with plexus.client.connect() as mesh:
            vectors = mesh.stub(vectors_pb2_grpc.VectorsServiceStub)

    On the machine where `plexus up` runs nothing is to be configured: the identity `cli` in the state folder
    is used. Elsewhere `GRPC_XDS_BOOTSTRAP` names a bootstrap file, as for any other gRPC client. gRPC reads
    it once, so a process belongs to one mesh for its life.

    Args:
        state: State folder of the Plexus to talk to. Default: what GRPC_XDS_BOOTSTRAP says, else
            `PLEXUS_STATE`, else the user's data folder.
        timeout_s: Deadline of a unary call that gives none itself, in seconds.

    Raises:
        NotJoinedError: No Plexus has run on the state folder, or the process has joined another mesh.
    """
    _choose_bootstrap(state)
    async with Mesh(timeout_s=timeout_s) as mesh:
        yield mesh


def _choose_bootstrap(state: str | os.PathLike[str] | None) -> None:
    present = os.environ.get(_FILE)
    if state is None and (present or os.environ.get(_INLINE)):
        return
    folder = (default_state_dir() if state is None else Path(state)).resolve()
    bootstrap = folder / "identities" / IDENTITY / "bootstrap.json"
    if present and Path(present).resolve() != bootstrap:
        raise NotJoinedError(
            f"{_FILE} is {present} already and gRPC reads it once: use one state folder in a process"
        )
    if not bootstrap.is_file():
        raise NotJoinedError(
            f"no Plexus has run on {folder}: start it with `plexus up`, or name its state folder with "
            "PLEXUS_STATE"
        )
    os.environ[_FILE] = str(bootstrap)
