"""Clients in other languages, under `plexus join`, on a control plane and servers inside the test.

Their gRPC libraries differ in what they make of the same resources; what is tested has to hold in all.
"""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from tests.mesh.traffic import Traffic
from tests.polyglot.callers import ANSWER_S, environment, joined_caller, ports

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


async def test_another_services_certificate_is_not_believed(traffic: Traffic, caller: Caller) -> None:
    (one,) = await traffic.start("one")
    impostor = await traffic.server("impostor", "other")
    posing = dataclasses.replace(impostor.instance(), service="vectors")
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: ports(answers)[one.port] == len(answers))
        traffic.plane.set_instances({"vectors": [one.instance(), posing]})
        both = await client.calls(40)
        assert ports(both) == {one.port: 40}
        traffic.plane.set_instances({"vectors": [posing]})
        alone = await client.until(lambda answers: all(answer.failed for answer in answers))
        assert {answer.code for answer in alone} == {"UNAVAILABLE"}
        assert impostor.calls == 0
        traffic.plane.set_instances({"vectors": [one.instance()]})
        await client.until(lambda answers: ports(answers)[one.port] == len(answers))


async def test_what_an_unavailable_instance_refuses_another_answers(traffic: Traffic, caller: Caller) -> None:
    # Java follows the retry policy of a route and ignores that of a virtual host.
    one, two = await traffic.start("one", "two")
    traffic.policy("retry: {attempts: 4, backoff: {base: 5ms, max: 10ms}}\noutlier_detection: null")
    for server in (one, two):
        server.pipeline.retries.percent = 1000
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: len(ports(answers)) == 2)
        one.unavailable = True
        before = one.calls
        answers = await client.calls(60)
        assert ports(answers) == {two.port: 60}
        assert one.calls > before
    assert traffic.refusals() == []


async def test_an_instance_that_fails_is_set_aside_and_the_caller_lives(
    traffic: Traffic, caller: Caller
) -> None:
    # Node's process dies of success-rate ejection in an interval without calls.
    one, two = await traffic.start("one", "two")
    traffic.policy(
        "outlier_detection: {interval: 500ms, ejection: 2s, min_requests: 3, min_hosts: 1}\n"
        "retry: {attempts: 1}"
    )
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: len(ports(answers)) == 2)
        one.unavailable = True
        if caller.sets_aside:
            await client.until(lambda answers: ports(answers) == {two.port: 30}, count=30)
        else:
            answers = await client.calls(30)
            assert {answer.code for answer in answers} == {"OK", "UNAVAILABLE"}
        one.unavailable = False
        await client.until(lambda answers: ports(answers)[one.port] > 0, count=30)
        assert client.process.returncode is None


async def test_a_service_without_instances_fails_at_once_and_is_called_again_when_it_has_some(
    traffic: Traffic, caller: Caller
) -> None:
    # Java calls old endpoints when the new set is empty; Node never recovers from a deleted resource.
    one, two = await traffic.start("one", "two")
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: len(ports(answers)) == 2)
        traffic.plane.set_instances({"vectors": []})
        await client.until(lambda answers: all(answer.code == "UNAVAILABLE" for answer in answers))
        called = one.calls + two.calls
        assert all(answer.failed for answer in await client.calls(20))
        assert one.calls + two.calls == called
        traffic.publish()
        await client.until(lambda answers: len(ports(answers)) == 2)
    assert traffic.refusals() == []


async def test_shares_of_versions_move_live_and_no_resource_is_refused(
    traffic: Traffic, caller: Caller
) -> None:
    old, new = await traffic.server("old", version="1.0"), await traffic.server("new", version="2.0")
    traffic.publish()
    shares = "subsets: {old: {version: '1.*', weight: %d}, new: {version: '2.*', weight: %d}}"
    traffic.policy(shares % (100, 0))
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: ports(answers) == {old.port: 12})
        async with client.meanwhile() as answers:
            traffic.policy(shares % (50, 50))
            async with asyncio.timeout(ANSWER_S):
                while not ports(answers)[new.port]:  # noqa: ASYNC110 - the answers give no event
                    await asyncio.sleep(0.05)
            traffic.policy(shares % (0, 100))
        await client.until(lambda answers: ports(answers) == {new.port: 12})
        assert not any(answer.failed for answer in answers)
    assert traffic.refusals() == []


async def test_without_a_control_plane_calls_go_on_and_later_changes_arrive(
    traffic: Traffic, caller: Caller
) -> None:
    one, two = await traffic.start("one", "two")
    async with calling(traffic, caller) as client:
        await client.until(lambda answers: len(ports(answers)) == 2)
        await traffic.stop_control()
        assert not any(answer.failed for answer in await client.calls(40))
        three = await traffic.server("three")
        traffic.publish("two", "three")
        await traffic.start_control()
        await client.until(lambda answers: ports(answers).keys() == {two.port, three.port})
    assert one.calls


async def test_after_its_certificate_expired_a_program_has_a_new_one_for_all_it_connects_to(
    traffic: Traffic, caller: Caller
) -> None:
    # Java takes a new certificate only when the CA file is new as well.
    (one,) = await traffic.start("one")
    file = traffic.state / "identities" / "shop" / "cert.pem"
    async with calling(traffic, caller, PLEXUS_MESH__CERTIFICATE_TTL_S="15") as client:
        await client.until(lambda answers: ports(answers)[one.port] == len(answers))
        # The program holds this one at best.
        expires = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
        async with client.meanwhile() as answers:
            while datetime.now(UTC) < expires:  # noqa: ASYNC110 - a clock gives no event
                await asyncio.sleep(0.1)
        assert not any(answer.failed for answer in answers)
        await traffic.stop_control()
        await one.stop()
        two = await traffic.server("two")
        traffic.publish("two")
        await traffic.start_control()
        await client.until(lambda answers: ports(answers)[two.port] == len(answers))
