"""A process that starts while what it needs is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from structlog.testing import capture_logs

from services.mesh.membership import Membership
from services.runtime.config import Settings
from tests.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

WITHIN_S = 90.0


async def test_it_waits_for_a_control_plane_says_so_and_goes_on_when_there_is_one(tmp_path: Path) -> None:
    port = free_port()
    with capture_logs() as entries:
        async with Membership("vectors", tmp_path, Settings({})) as member, asyncio.timeout(WITHIN_S):
            arriving = asyncio.create_task(member.arrive(port))
            while not any(entry["event"] == "waiting_for" for entry in entries):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert not arriving.done()
            async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port):
                assert (await arriving).spiffe_id.endswith("/svc/vectors")
    told = [(entry["event"], entry["dependency"]) for entry in entries if "dependency" in entry]
    assert told == [("waiting_for", "control"), ("found", "control")]
