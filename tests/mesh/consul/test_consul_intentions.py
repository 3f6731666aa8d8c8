"""Intentions kept in a real Consul, followed live, and never opened by anything but a rule."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import pytest
import yaml
from structlog.testing import capture_logs

from services.mesh.consul.answers import Answer
from services.mesh.consul.intentions import ConsulIntentions, table_of, watch_intentions
from services.mesh.consul.kv import KeyValues
from services.mesh.consul.seed import SEEDED, seed
from services.mesh.intention_store import compared
from services.mesh.intentions import IntentionAuthorizer, IntentionTable, ServiceIntentions
from services.mesh.membership import Membership
from services.mesh.policy.domain import Document
from services.runtime.config import Settings
from services.runtime.errors import AbortedError, DataLossError, FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx

    from services.mesh.consul.client import ConsulClient
    from services.mesh.consul.config import ConsulConfig
    from tests.conftest import Serve

WITHIN_S = 60.0
GET = "/plexus.vectors.v1.VectorsService/GetPoints"
DELETE = "/plexus.vectors.v1.VectorsService/DeletePoints"


def intend(http: httpx.Client, destination: str, *sources: dict[str, Any], protocol: str = "grpc") -> None:
    if destination != "*":
        defaults = {"Kind": "service-defaults", "Name": destination, "Protocol": protocol}
        http.put("/config", json=defaults).raise_for_status()
    entry = {"Kind": "service-intentions", "Name": destination, "Sources": sources}
    answer = http.put("/config", json=entry)
    assert answer.status_code == 200, answer.text


def permissions(name: str, *rules: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"Name": name, "Permissions": [{"Action": action, "HTTP": http} for action, http in rules]}


async def now(client: ConsulClient, destination: str = "vectors") -> IntentionTable:
    watched: Any = watch_intentions(client, destination)
    try:
        return await asyncio.wait_for(anext(watched), WITHIN_S)
    finally:
        await watched.aclose()


async def test_without_a_rule_everything_is_denied(client: ConsulClient) -> None:
    decision = (await now(client)).decide("knowledge", "vectors", GET)
    assert (decision.allowed, decision.rule) == (False, "default deny")


async def test_consuls_precedence_holds(client: ConsulClient, http: httpx.Client) -> None:
    intend(http, "*", {"Name": "*", "Action": "allow"}, {"Name": "batch", "Action": "deny"})
    intend(http, "vectors", {"Name": "*", "Action": "deny"}, {"Name": "knowledge", "Action": "allow"})
    table = await now(client)
    assert table.decide("knowledge", "vectors", GET).allowed
    assert table.decide("search", "vectors", GET).rule == "* -> vectors"
    other = await now(client, "storage")
    assert other.decide("search", "storage", GET).rule == "* -> *"
    assert not other.decide("batch", "storage", GET).allowed
    # As Consul orders them itself.
    listed = http.get("/connect/intentions/match", params={"by": "destination", "name": "vectors"}).json()
    assert [rule["Precedence"] for rule in listed["vectors"]] == [9, 8, 6, 5]


async def test_rules_on_paths_and_methods_decide_in_order(client: ConsulClient, http: httpx.Client) -> None:
    rules = permissions(
        "knowledge",
        ("deny", {"PathExact": DELETE}),
        ("allow", {"PathPrefix": "/plexus.vectors.v1.", "Methods": ["POST"]}),
        ("allow", {"PathRegex": "/other[.]X/.*", "Methods": ["GET"]}),
    )
    intend(http, "vectors", rules)
    table = await now(client)
    assert table.decide("knowledge", "vectors", DELETE).rule == "knowledge -> vectors [0]"
    assert table.decide("knowledge", "vectors", GET).rule == "knowledge -> vectors [1]"
    assert not table.decide("knowledge", "vectors", "/other.X/Y").allowed  # no gRPC call is a GET


async def test_all_rules_can_be_shown(client: ConsulClient, http: httpx.Client) -> None:
    intend(http, "*", {"Name": "monitor", "Action": "allow"})
    intend(http, "vectors", permissions("knowledge", ("allow", {"PathExact": GET})))
    kept = ConsulIntentions(client)
    watched: Any = kept.watch()
    table: IntentionTable = await asyncio.wait_for(anext(watched), WITHIN_S)
    await watched.aclose()
    assert table.decide("knowledge", "vectors", GET).allowed
    assert not table.decide("knowledge", "vectors", DELETE).allowed
    assert table.decide("monitor", "storage", GET).rule == "monitor -> *"
    assert [(each.destination, each.origin) for each in kept.kept()] == [
        ("*", "service-intentions/*"),
        ("vectors", "service-intentions/vectors"),
    ]
    assert kept.kept()[0].text == (
        "Kind: service-intentions\nName: '*'\nSources:\n- Name: monitor\n  Action: allow\n"
    )


def document(destination: str, *sources: dict[str, Any]) -> dict[str, Document]:
    entry = {"Kind": "service-intentions", "Name": destination, "Sources": list(sources)}
    return {destination: Document(f"{destination}.yaml", yaml.safe_dump(entry))}


async def test_written_intentions_hold_for_those_who_follow_and_are_shown_at_once(
    client: ConsulClient, http: httpx.Client
) -> None:
    kept = ConsulIntentions(client)
    intend(http, "storage", {"Name": "batch", "Action": "allow"})
    following: Any = watch_intentions(client, "vectors")
    await asyncio.wait_for(anext(following), WITHIN_S)
    wanted = document("vectors", permissions("knowledge", ("allow", {"PathExact": GET})))
    await kept.write(wanted, remove=frozenset({"storage", "unknown"}))
    assert kept.table().decide("knowledge", "vectors", GET).allowed
    assert [each.destination for each in kept.kept()] == ["vectors"]
    assert compared(kept.kept()[0].text) == compared(wanted["vectors"].text)
    table: IntentionTable = await asyncio.wait_for(anext(following), WITHIN_S)
    assert table.decide("knowledge", "vectors", GET).allowed
    assert not table.decide("knowledge", "vectors", DELETE).allowed
    index = http.get("/config/service-intentions/vectors").json()["ModifyIndex"]
    await kept.write(wanted)  # says the same: nothing is written
    assert http.get("/config/service-intentions/vectors").json()["ModifyIndex"] == index
    await following.aclose()


async def test_a_change_by_somebody_else_meanwhile_is_not_overwritten(
    client: ConsulClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ConsulIntentions(client)
    intend(http, "vectors", {"Name": "search", "Action": "deny"})
    put = client.api.config.set

    async def late(kind: str, name: str, *rest: Any, **named: Any) -> Any:
        if name == "vectors":  # between the read and the write
            intend(http, "vectors", {"Name": "search", "Action": "allow"})
        return await put(kind, name, *rest, **named)

    monkeypatch.setattr(client.api.config, "set", late)
    both = document("storage", {"Name": "shop", "Action": "allow"})
    both |= document("vectors", {"Name": "shop", "Action": "allow"})
    with pytest.raises(AbortedError, match=r"vectors.*changed meanwhile.*; done before that: storage"):
        await kept.write(both)
    assert kept.table().decide("search", "vectors", GET).allowed
    assert not kept.table().decide("shop", "vectors", GET).allowed
    assert kept.table().decide("shop", "storage", GET).allowed


async def test_rules_on_paths_for_a_service_without_paths_are_refused_and_say_why(
    client: ConsulClient, http: httpx.Client
) -> None:
    intend(http, "vectors", {"Name": "search", "Action": "allow"}, protocol="tcp")
    wanted = document("vectors", permissions("knowledge", ("allow", {"PathExact": GET})))
    with pytest.raises(FailedPreconditionError, match=r"vectors speaks tcp.*service-defaults"):
        await ConsulIntentions(client).write(wanted)
    assert (await now(client)).decide("search", "vectors", GET).allowed


async def test_a_condition_that_cannot_be_judged_closes_and_never_opens(
    client: ConsulClient, http: httpx.Client
) -> None:
    header = [{"Name": "x-internal", "Present": True}]
    rules = permissions(
        "knowledge",
        ("allow", {"PathExact": DELETE, "Header": header}),
        ("deny", {"PathPrefix": "/closed", "Header": header}),
        ("allow", {"PathPrefix": "/closed"}),
        ("allow", {"PathExact": GET}),
    )
    intend(http, "vectors", rules)
    table = await now(client)
    assert not table.decide("knowledge", "vectors", DELETE).allowed
    assert table.decide("knowledge", "vectors", "/closed/X").rule == "knowledge -> vectors [1]"
    assert table.decide("knowledge", "vectors", GET).allowed
    assert table.unjudged() == ["knowledge -> vectors"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"vectors": 7}', b'{"vectors": [7]}', b'{"vectors": [{"SourceName": "a"}]}',
     b'{"vectors": [{"SourceName": "a", "DestinationName": "other", "Action": "allow"}]}',
     b'{"vectors": [{"SourceName": "a", "DestinationName": "vectors", "Action": "perhaps"}]}'],
)  # fmt: skip
def test_an_answer_that_is_not_understood_is_no_set_of_rules(body: bytes) -> None:
    with pytest.raises(DataLossError):
        table_of(Answer(200, body, 1, filtered=False), "vectors")


def test_rules_of_other_clusters_and_for_tokens_open_nothing() -> None:
    body = b"""{"vectors": [
        {"SourceName": "a", "DestinationName": "vectors", "Action": "allow", "SourcePeer": "west"},
        {"SourceName": "b", "DestinationName": "vectors", "Action": "allow", "JWT": {"Providers": []}},
        {"SourceName": "c", "DestinationName": "vectors", "Permissions": [
            {"Action": "allow", "HTTP": {"PathPrefix": "/", "NewCondition": 1}},
            {"Action": "allow", "HTTP": {"PathRegex": "(?P<broken"}}]}]}"""
    table = table_of(Answer(200, body, 1, filtered=False), "vectors")
    assert not any(table.decide(source, "vectors", GET).allowed for source in "abc")
    assert table.unjudged() == ["b -> vectors", "c -> vectors"]


async def test_a_condition_that_cannot_be_judged_is_told(
    config: ConsulConfig, http: httpx.Client, tmp_path: Path
) -> None:
    header = [{"Name": "x-internal", "Present": True}]
    intend(http, "vectors", permissions("knowledge", ("allow", {"PathExact": GET, "Header": header})))
    consul = {"PLEXUS_CONSUL__ADDRESS": config.address}
    with capture_logs() as entries:
        async with Membership("vectors", tmp_path, Settings(consul)) as member:
            assert member.consul is not None
            rules = watch_intentions(member.consul, "vectors")
            member.obey(await anext(rules))
            await cast("Any", rules).aclose()
    (told,) = [entry for entry in entries if entry["event"] == "intentions_not_judged"]
    assert told["rules"] == ["knowledge -> vectors"]


async def follow(client: ConsulClient, authorizer: IntentionAuthorizer) -> None:
    async for table in watch_intentions(client, "vectors"):
        authorizer.replace(table)


async def test_a_running_server_obeys_each_change_and_tells_who_was_refused(
    client: ConsulClient, http: httpx.Client, serve: Serve
) -> None:
    authorizer = IntentionAuthorizer(IntentionTable(), destination="vectors")

    async def answer(_request: bytes, _context: Any) -> bytes:
        return b"answer"

    handler: Any = grpc.unary_unary_rpc_method_handler(answer)
    generic = grpc.method_handlers_generic_handler("test.Who", {"Ask": handler})
    following = asyncio.create_task(follow(client, authorizer))

    async def until(channel: grpc.aio.Channel, *, allowed: bool) -> None:
        ask: Any = channel.unary_unary("/test.Who/Ask")
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    await ask(b"", timeout=30)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.PERMISSION_DENIED  # noqa: PT017 - both are answers
                    if not allowed:
                        return
                else:
                    if allowed:
                        return

    try:
        async with serve(
            lambda server: server.add_generic_rpc_handlers((generic,)),
            peer="knowledge",
            authorizer=authorizer,
        ) as channel:
            await until(channel, allowed=False)
            intend(http, "vectors", {"Name": "knowledge", "Action": "allow"})
            await until(channel, allowed=True)
            intend(http, "vectors", permissions("knowledge", ("deny", {"PathPrefix": "/test."})))
            with capture_logs() as logs:
                await until(channel, allowed=False)
            (denied,) = [entry for entry in logs if entry["event"] == "call_denied"][-1:]
            assert (denied["source"], denied["method"], denied["rule"], denied["log_level"]) == (
                "knowledge",
                "/test.Who/Ask",
                "knowledge -> vectors [0]",
                "warning",
            )
            http.delete("/config/service-intentions/vectors").raise_for_status()
            await until(channel, allowed=False)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


SHIPPED = [
    ServiceIntentions.model_validate(
        {
            "Kind": "service-intentions",
            "Name": name,
            "Sources": [
                {"Name": "edge", "Action": "allow"},
                permissions("control", ("allow", {"PathPrefix": "/grpc.health.v1.Health/"})),
            ],
        }
    )
    for name in ("vectors", "storage")
]


@pytest.fixture
async def seeding(client: ConsulClient) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(seed(client, SHIPPED))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def seeded(client: ConsulClient) -> None:
    async with asyncio.timeout(WITHIN_S):
        async for keys in KeyValues(client).watch(SEEDED):
            if keys:
                return


async def test_the_shipped_rules_are_written_once_and_an_operators_are_left_alone(
    client: ConsulClient, http: httpx.Client
) -> None:
    intend(http, "vectors", {"Name": "edge", "Action": "deny"})
    policies = {"plexus/policies/vectors": b"policy"}
    task = asyncio.create_task(seed(client, SHIPPED, policies))
    await seeded(client)
    kept = await KeyValues(client).get("plexus/policies/vectors")
    assert kept is not None
    assert kept.value == b"policy"
    assert not (await now(client)).decide("edge", "vectors", GET).allowed
    assert (await now(client, "storage")).decide("edge", "storage", GET).allowed
    assert not (await now(client, "storage")).decide("control", "storage", GET).allowed
    http.delete("/config/service-intentions/storage").raise_for_status()
    again = asyncio.create_task(seed(client, SHIPPED))
    done, _ = await asyncio.wait([again], timeout=0.5)  # whatever it does first
    assert not done
    assert not (await now(client, "storage")).decide("edge", "storage", GET).allowed
    for running in (task, again):
        running.cancel()
    await asyncio.gather(task, again, return_exceptions=True)


async def test_after_consul_lost_its_data_the_rules_are_written_again(
    client: ConsulClient, http: httpx.Client, seeding: asyncio.Task[None]
) -> None:
    await seeded(client)
    for entry in http.get("/config/service-intentions").json():
        http.delete(f"/config/service-intentions/{entry['Name']}").raise_for_status()
    http.delete(f"/kv/{SEEDED}").raise_for_status()
    await seeded(client)
    assert (await now(client)).decide("edge", "vectors", GET).allowed
    assert not seeding.done()
