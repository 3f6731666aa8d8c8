"""Clients in other languages, under `plexus join`, on a control plane and servers inside the test.

Their gRPC libraries differ in what they make of the same resources; what is tested has to hold in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.mesh.traffic import Traffic
from tests.polyglot.callers import environment, joined_caller, ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.polyglot.callers import Calling
    from tests.polyglot.programs import Caller

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def traffic(tmp_path: Path) -> AsyncIterator[Traffic]:
    async with Traffic(tmp_path) as made:
        yield made


def calling(
    traffic: Traffic, caller: Caller, service: str = "shop", **variables: str
) -> AbstractAsyncContextManager[Calling]:
    controls = {"PLEXUS_MESH__CONTROL_PLANES": f"localhost:{traffic.port}"}
    env = environment(PLEXUS_STATE=str(traffic.state), **controls, **variables)
    return joined_caller(caller, service, "xds:///vectors", env, traffic.folder)


async def test_calls_spread_and_follow_instances_that_come_and_go(traffic: Traffic, caller: Caller) -> None:
    one, two = await traffic.start("one", "two")
    async with calling(traffic, caller) as client:
        first = await client.until(lambda answers: len(ports(answers)) == 2)
        assert set(ports(first)) == {one.port, two.port}
        three = await traffic.server("three")
        traffic.publish()
        await client.until(lambda answers: ports(answers)[three.port] > 0)
        traffic.publish("two", "three")
        left = await client.until(lambda answers: not ports(answers)[one.port])
        assert not any(answer.failed for answer in left)
    assert traffic.refusals() == []
