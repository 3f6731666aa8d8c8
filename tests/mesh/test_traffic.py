"""Each traffic policy as a real gRPC client (C-core) honours it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from services.mesh.policy.domain import Document
from tests.mesh.policies import EVERYTHING_TEXT
from tests.mesh.traffic import ANSWER_S, Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def traffic(tmp_path: Path) -> AsyncIterator[Traffic]:
    async with Traffic(tmp_path) as traffic:
        yield traffic
        assert traffic.refusals() == []


async def test_weights_of_subsets_share_calls_and_move_live_without_a_failed_call(traffic: Traffic) -> None:
    await traffic.server("old", version="1.4")
    await traffic.server("new", version="2.0")
    traffic.publish()
    client = await traffic.client()

    shares = "subsets: {{stable: {{version: '1.*', weight: {}}}, canary: {{version: '2.*', weight: {}}}}}"
    traffic.policy(shares.format(90, 10))
    await client.until(lambda answers: 0 < answers.share("new") < 0.3)
    answers = await client.calls(2000, at_once=8)
    assert answers.share("new") == pytest.approx(0.1, abs=0.04)
    assert answers.failed() == 0
    moving = asyncio.create_task(client.calls(1000, at_once=4))
    traffic.policy(shares.format(0, 100))
    await client.until(lambda answers: answers.share("new") == 1)
    assert (await moving).failed() == 0


async def test_a_subset_whose_last_instance_left_gives_its_share_to_the_others(traffic: Traffic) -> None:
    await traffic.server("old", version="1.4")
    await traffic.server("new", version="2.0")
    traffic.publish()
    traffic.policy("subsets: {stable: {version: '1.*', weight: 50}, canary: {version: '2.*', weight: 50}}")
    client = await traffic.client()
    await client.until(lambda answers: {"old", "new"} == set(answers.seen))
    traffic.publish("old")
    await client.until(lambda answers: answers.share("old") == 1)


async def test_equal_headers_meet_one_instance_and_different_ones_all(traffic: Traffic) -> None:
    await traffic.start("a", "b", "c")
    traffic.policy("lb: {policy: ring_hash, header: x-user}")
    client = await traffic.client()
    met: set[str] = set()
    for user in range(30):
        answers = await client.calls(4, headers={"x-user": f"user {user}"})
        assert len(answers.seen) == 1, answers.seen
        met |= answers.seen.keys()
    assert met == {"a", "b", "c"}


async def test_a_timeout_ends_calls_and_a_shorter_deadline_counts(traffic: Traffic) -> None:
    (server,) = await traffic.start("a")
    traffic.policy("timeout: 1s")
    client = await traffic.client()
    await client.until(lambda answers: answers.share("a") == 1)
    server.delay_s = 30
    answers = await client.calls(1, timeout=60)
    assert set(answers.seen) == {"DEADLINE_EXCEEDED: Deadline Exceeded"}
    # C-core's clock of calls is behind its timers; without the control plane's allowance this ends at once.
    assert 0.9 < answers.seconds < 20
    answers = await client.calls(1, timeout=0.2)
    assert answers.failed() == 1


async def test_calls_are_tried_as_often_as_the_policy_says_and_only_for_its_codes(traffic: Traffic) -> None:
    (server,) = await traffic.start("a")
    traffic.policy("retry: {attempts: 4, backoff: {base: 5ms, max: 10ms}, budget: {percent: 100}}")
    client = await traffic.client()
    await client.until(lambda answers: answers.share("a") == 1)
    server.pipeline.retries.percent = 1000
    server.unavailable = True
    server.attempts.clear()
    assert (await client.calls(1)).failed() == 1
    assert server.attempts == ["0", "1", "2", "3"]
    server.unavailable = False
    server.attempts.clear()
    assert (await client.calls(1, headers={"x-invalid": "1"})).failed() == 1
    assert server.attempts == ["0"]
    traffic.policy("retry: {attempts: 1}")
    server.unavailable = True

    async def one_attempt() -> bool:
        server.attempts.clear()
        await client.calls(1)
        return server.attempts == ["0"]

    deadline = time.monotonic() + ANSWER_S
    while not await one_attempt():
        assert time.monotonic() < deadline


async def test_when_everything_fails_retries_stay_within_the_budget(traffic: Traffic) -> None:
    (server,) = await traffic.start("a")
    traffic.policy("retry: {attempts: 5, backoff: {base: 5ms, max: 10ms}}\noutlier_detection: null")
    client = await traffic.client()
    await client.until(lambda answers: answers.share("a") == 1)
    server.pipeline.retries.percent, server.pipeline.retries.min_per_second = 20, 0
    server.unavailable = True
    server.calls = 0
    answers = await client.calls(1000, at_once=20)
    assert answers.failed() == 1000
    # The calls that succeeded before count as well, for ten seconds.
    assert 1000 < server.calls <= 1.25 * 1000


async def test_the_circuit_breaker_sheds_at_its_bound(traffic: Traffic) -> None:
    (server,) = await traffic.start("a")
    traffic.policy("circuit_breaker: {max_requests: 5}\nretry: {attempts: 1}")
    client = await traffic.client()
    await client.until(lambda answers: answers.share("a") == 1)
    server.most = 0
    server.delay_s = 8
    answers = await client.calls(30, at_once=30)
    assert server.most == 5
    assert answers.seen["a"] == 5
    assert answers.failed() == 25
    assert any("circuit breaker" in text for text in answers.seen)


async def test_an_instance_that_fails_calls_is_set_aside_and_taken_back(traffic: Traffic) -> None:
    good, bad = await traffic.start("good", "bad")
    traffic.policy(
        "outlier_detection: {interval: 500ms, ejection: 2s, min_requests: 3, min_hosts: 1}\n"
        "retry: {attempts: 1}"
    )
    client = await traffic.client()
    await client.until(lambda answers: set(answers.seen) == {"good", "bad"})
    bad.unavailable = True
    await client.until(lambda answers: answers.share("good") == 1, count=100)
    bad.unavailable = False
    await client.until(lambda answers: set(answers.seen) == {"good", "bad"}, count=100)
    assert good.calls > bad.calls


async def test_delays_and_aborts_are_injected_into_their_share_of_calls(traffic: Traffic) -> None:
    await traffic.start("a")
    client = await traffic.client()
    await client.until(lambda answers: answers.share("a") == 1)
    traffic.policy("fault: {abort: {code: data_loss, percent: 30}}")
    await client.until(lambda answers: answers.failed() > 0)
    answers = await client.calls(1000, at_once=8)
    assert answers.failed() / 1000 == pytest.approx(0.3, abs=0.08)
    assert all(text == "a" or text.startswith("DATA_LOSS") for text in answers.seen)
    traffic.policy("fault: {delay: {duration: 2s}}")
    slow = await client.until(lambda answers: answers.failed() == 0 and answers.seconds >= 2, count=1)
    assert slow.seen == {"a": 1}
    traffic.policy("timeout: 60s")
    await client.until(lambda answers: answers.seconds < 2 and answers.share("a") == 1, count=1)


async def test_methods_and_headers_choose_the_subset(traffic: Traffic) -> None:
    await traffic.server("old", version="1")
    await traffic.server("new", version="2")
    traffic.publish()
    traffic.policy(
        """
subsets: {stable: {version: "1", weight: 1}, canary: {version: "2"}}
routes:
  - match: {headers: [{name: x-canary, exact: "yes"}]}
    subsets: {canary: 1}
  - match: {method: /test.Who/Other}
    subsets: {canary: 1}
"""
    )
    client = await traffic.client()
    await client.until(lambda answers: answers.share("old") == 1)
    assert (await client.calls(10, headers={"x-canary": "yes"})).seen == {"new": 10}
    assert (await client.calls(10, headers={"x-canary": "no"})).seen == {"old": 10}
    assert (await client.calls(10, method="/test.Who/Other")).seen == {"new": 10}


async def test_callers_stay_in_their_zone_and_go_elsewhere_when_it_is_gone(traffic: Traffic) -> None:
    for zone in ("a", "b", "c"):
        await traffic.server(zone, zone=zone)
    traffic.publish()
    traffic.policy("locality: {failover: {a: [c]}}")
    client, stranger = await asyncio.gather(traffic.client("a"), traffic.client("nowhere"))
    await client.until(lambda answers: answers.share("a") == 1)
    assert set((await stranger.until(lambda answers: len(answers.seen) == 3)).seen) == {"a", "b", "c"}
    # Still listed: it is the connection that tells.
    await traffic.servers["a"].stop()
    await client.until(lambda answers: answers.share("c") == 1)
    await traffic.servers["c"].stop()
    await client.until(lambda answers: answers.share("b") == 1)
    await traffic.servers["a"].start(traffic.state)
    await client.until(lambda answers: answers.share("a") == 1)


async def test_weights_of_instances_count(traffic: Traffic) -> None:
    await traffic.server("light")
    await traffic.server("heavy", weight=3)
    traffic.publish()
    client = await traffic.client()
    await client.until(lambda answers: set(answers.seen) == {"light", "heavy"})
    assert (await client.calls(2000, at_once=8)).share("heavy") == pytest.approx(0.75, abs=0.05)


async def test_a_policy_that_says_everything_is_accepted_whole(traffic: Traffic) -> None:
    await traffic.server("old", version="1.1")
    await traffic.server("new", version="2", tags=("canary",), zone="b")
    traffic.publish()
    client = await traffic.client()
    await client.until(lambda answers: set(answers.seen) == {"old", "new"})
    traffic.plane.set_policies({"vectors": Document("vectors.yaml", EVERYTHING_TEXT)})
    await client.until(
        lambda answers: any(text.startswith("UNAVAILABLE") for text in answers.seen),
        headers={"x-canary": "1"},
    )


async def test_an_unknown_service_fails_at_once(traffic: Traffic) -> None:
    client = await traffic.client()
    answers = await client.calls(1, service="nobody", timeout=60)
    assert answers.failed() == 1
    assert answers.seconds < 15
    assert next(iter(answers.seen)).startswith("UNAVAILABLE")
