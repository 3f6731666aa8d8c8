"""Two processes of the service on one RabbitMQ and one PostgreSQL; one is killed at the worst moments."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc.aio
import pytest

from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc
from tests.servers.postgres import PostgresServer
from tests.servers.queueing import QueueingServer
from tests.servers.rabbitmq import RabbitServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

Stub = queueing_pb2_grpc.QueueingServiceStub
# Servers of their own, since these tests harm them.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.xdist_group("replicas-killed")]
PATIENCE_S = 240.0
ALARM = "{resource_limit, memory, node()}"


class Lab:
    """The two databases, the two replicas, and what was confirmed and consumed."""

    def __init__(
        self,
        rabbit: RabbitServer,
        postgres: PostgresServer,
        database: str,
        servers: Sequence[QueueingServer],
    ) -> None:
        self.rabbit = rabbit
        self.postgres = postgres
        self._database = database
        self.first, self.second = servers

    @contextlib.asynccontextmanager
    async def stubs(self) -> AsyncIterator[tuple[Stub, Stub]]:
        async with self.first.channel() as one, self.second.channel() as two:
            yield Stub(one), Stub(two)

    @contextlib.asynccontextmanager
    async def no_memory(self) -> AsyncIterator[None]:
        """RabbitMQ confirms nothing during the block."""
        await self._alarm(f"rabbit_alarm:set_alarm({{{ALARM}, []}}).")
        try:
            yield
        finally:
            await self._alarm(f"rabbit_alarm:clear_alarm({ALARM}).")

    async def _alarm(self, expression: str) -> None:
        await asyncio.to_thread(self.rabbit.control, "eval", expression)

    async def count(self, rows: str) -> int:
        """Of rows in the state."""
        query = f"SELECT count(*) FROM {rows}"  # noqa: S608 - a test's own words
        return int(await asyncio.to_thread(self.postgres.sql, query, self._database))

    async def blocked(self) -> bool:
        """Whether RabbitMQ has stopped reading from somebody who publishes."""

        def states() -> set[str]:
            with self.rabbit.http() as http:
                return {connection.get("state", "") for connection in http.get("/connections").json()}

        return "blocked" in await asyncio.to_thread(states)

    async def revive(self) -> None:
        await asyncio.to_thread(self.first.start)


@pytest.fixture(scope="module")
def rabbit(rabbitmq_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    with RabbitServer(rabbitmq_program, tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture(scope="module")
def database(postgres_program: Path) -> Iterator[PostgresServer]:
    with PostgresServer(postgres_program) as server:
        yield server


@pytest.fixture(scope="module")
def lab(
    rabbit: RabbitServer, database: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    with rabbit.vhost() as vhost, database.database() as state, contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                QueueingServer(tmp_path_factory.mktemp(f"replica-{number}"), rabbit.url(vhost), state)
            )
            for number in range(2)
        ]
        yield Lab(rabbit, database, urlsplit(state).path[1:], servers)


@pytest.fixture
async def work(lab: Lab, request: pytest.FixtureRequest) -> str:
    """A topic of the test's own and its subscription, by the same name."""
    name: str = request.node.name.replace("test_", "t-", 1)[:100]
    async with lab.stubs() as (first, _):
        await first.CreateTopic(pb.CreateTopicRequest(topic=name), wait_for_ready=True, timeout=PATIENCE_S)
        subscription = pb.Subscription(name=name, topic=name)
        subscription.ack_deadline.FromSeconds(600)
        subscription.retry.backoff = pb.BACKOFF_IMMEDIATE
        subscription.retry.max_attempts = 100
        await first.CreateSubscription(pb.CreateSubscriptionRequest(subscription=subscription))
    return name


def messages(*names: str, **fields: Any) -> list[pb.Message]:
    return [pb.Message(data=name.encode(), **fields) for name in names]


PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def tried(call: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    """What a call gives once the service is there for it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in PASSING:
                    raise
                await asyncio.sleep(0.1)


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110 - polls
            await asyncio.sleep(0.01)


async def consumed(stub: Stub, name: str, wanted: set[str]) -> list[str]:
    """Pull and acknowledge until all wanted ids were seen; the ids, in order."""
    seen: list[str] = []
    request = pb.PullRequest(subscription=name, max_messages=500)
    request.wait.FromMilliseconds(500)
    async with asyncio.timeout(PATIENCE_S):
        while not wanted <= set(seen):
            pulled = await tried(stub.Pull, request)
            ids = [delivery.ack_id for delivery in pulled.deliveries]
            if not ids:
                continue
            said = pb.AcknowledgeRequest(subscription=name, ack_ids=ids)
            answer = await tried(stub.Acknowledge, said)
            lost = set(answer.expired)
            seen += [d.message_id for d in pulled.deliveries if d.ack_id not in lost]
    return seen


async def test_killed_while_confirms_are_pending(lab: Lab, work: str) -> None:
    """Between reserving a deduplication id and its confirmation, and while delayed messages are moved."""
    async with lab.stubs() as (first, second):
        deduplicated = pb.PublishRequest(topic=work, messages=messages("same", dedup_id="one"))
        plain = pb.PublishRequest(topic=work, messages=messages("plain"))
        later = pb.PublishRequest(topic=work, messages=messages(*map(str, range(20))))
        for message in later.messages:
            message.delay.FromMilliseconds(1)
        async with lab.no_memory():
            # The first publish after an alarm still passes, and has the connection stopped behind it.
            prime = pb.PublishRequest(topic=work, messages=messages("prime"))
            primed = asyncio.ensure_future(tried(first.Publish, prime))
            await until(lab.blocked)
            confirmed = set((await tried(first.Publish, later)).message_ids)
            pending = [asyncio.ensure_future(first.Publish(asked)) for asked in (deduplicated, plain)]
            await until(lambda: lab.count("queues_dedup WHERE until > 0"))
            await until(lambda: lab.count("pg_stat_activity WHERE state = 'idle in transaction'"))
            lab.first.kill()
            primed.cancel()
            for call in pending:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
        (message_id,) = (await tried(second.Publish, deduplicated)).message_ids
        confirmed |= {message_id, *(await tried(second.Publish, plain)).message_ids}
        assert list((await second.Publish(deduplicated)).message_ids) == [message_id]
        seen = await consumed(second, work, confirmed)
        assert seen.count(message_id) == 1
        assert await lab.count("queues_deferred") == 0
        await lab.revive()


async def test_killed_while_it_holds_leases(lab: Lab, work: str) -> None:
    async with lab.stubs() as (first, second):
        request = pb.PublishRequest(topic=work, messages=messages(*map(str, range(20))))
        confirmed = set((await tried(first.Publish, request)).message_ids)
        asked = pb.PullRequest(subscription=work, max_messages=5)
        asked.wait.FromSeconds(30)
        held = (await first.Pull(asked)).deliveries
        assert held
        lab.first.kill()
        ids = [delivery.ack_id for delivery in held]
        gone = pb.AcknowledgeRequest(subscription=work, ack_ids=ids)
        assert sorted((await tried(second.Acknowledge, gone)).expired) == sorted(ids)
        await consumed(second, work, confirmed)
        await lab.revive()


async def test_killed_while_it_has_an_ordered_subscription(lab: Lab, work: str) -> None:
    async with lab.stubs() as (first, second):
        name = f"{work}-ordered"
        ordered = pb.Subscription(name=name, topic=work, ordered=True)
        ordered.ack_deadline.FromSeconds(600)
        await tried(second.CreateSubscription, pb.CreateSubscriptionRequest(subscription=ordered))
        asked = pb.PublishRequest(topic=work, messages=messages(*map(str, range(30)), ordering_key="k"))
        confirmed = list((await tried(second.Publish, asked)).message_ids)
        pull = pb.PullRequest(subscription=name, max_messages=1)
        pull.wait.FromSeconds(30)
        (held,) = (await tried(first.Pull, pull)).deliveries
        assert held.message_id == confirmed[0]
        lab.first.kill()
        assert await consumed(second, name, set(confirmed)) == confirmed
        await lab.revive()


async def test_killed_while_it_redrives(lab: Lab, work: str) -> None:
    async with lab.stubs() as (first, second):
        count = 800
        texts = [str(number) for number in range(count)]
        confirmed: set[str] = set()
        for start in range(0, count, 400):
            request = pb.PublishRequest(topic=work, messages=messages(*texts[start : start + 400]))
            confirmed |= set((await tried(second.Publish, request)).message_ids)
        dead = 0
        pull = pb.PullRequest(subscription=work, max_messages=400)
        pull.wait.FromSeconds(30)
        async with asyncio.timeout(PATIENCE_S):
            while dead < count:
                deliveries = (await tried(second.Pull, pull)).deliveries
                refusals = [pb.Refusal(ack_id=d.ack_id, reason="bad", dead=True) for d in deliveries]
                if refusals:
                    await second.Nack(pb.NackRequest(subscription=work, refusals=refusals))
                dead += len(refusals)
        redrive = pb.RedriveDeadLettersRequest(subscription=work)
        call = asyncio.ensure_future(tried(first.RedriveDeadLetters, redrive))
        letters = f"queues_dead_letters WHERE subscription = '{work}'"

        async def fewer() -> bool:
            return await lab.count(letters) < count

        await until(fewer)
        lab.first.kill()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await tried(second.RedriveDeadLetters, redrive)
        await consumed(second, work, confirmed)
        assert await lab.count(letters) == 0
        await lab.revive()


async def test_postgresql_restarted_under_load_loses_nothing(lab: Lab, work: str) -> None:
    async with lab.stubs() as stubs:
        confirmed: dict[str, str] = {}
        stop = asyncio.Event()

        async def publish(stub: Stub, who: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                one = messages(f"{who}-{number}", dedup_id=f"{who}-{number}")
                if number % 3 == 0:
                    one[0].delay.FromMilliseconds(100)
                request = pb.PublishRequest(topic=work, messages=one)
                # The same id again, as a client does that had no answer.
                (message_id,) = (await tried(stub.Publish, request)).message_ids
                confirmed[f"{who}-{number}"] = message_id

        publishers = [asyncio.ensure_future(publish(stub, who)) for who, stub in enumerate(stubs)]

        async def more() -> None:
            wanted = len(confirmed) + 30

            async def enough() -> bool:
                return len(confirmed) >= wanted

            await until(enough)

        await more()
        lab.postgres.kill()
        await asyncio.to_thread(lab.postgres.start)
        await more()
        stop.set()
        await asyncio.gather(*publishers)
        seen = await consumed(stubs[1], work, set(confirmed.values()))
        assert len(set(confirmed.values())) == len(confirmed)
        assert set(seen) == set(confirmed.values())
