"""The embedded broker: its contract, restarts and kills."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.backends.sqlite.migrations import MIGRATIONS
from services.queueing.domain import Message, Refusal
from services.queueing.kept import Events, Position, Redrive, Where
from services.queueing.resources import Subscription, Topic
from services.runtime.errors import FailedPreconditionError
from tests.contracts.broker import BrokerContract
from tests.contracts.broker_snapshots import SnapshotContract
from tests.contracts.broker_steps import bodies, publish, pull, subscribe
from tests.killed import killed_writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class TestSqliteBroker(BrokerContract, SnapshotContract):
    @pytest.fixture
    async def broker(self, tmp_path: Path) -> AsyncIterator[SqliteBroker]:
        async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
            await broker.create_topic(Topic("jobs"))
            yield broker


async def test_messages_leases_delays_and_dead_letters_survive_a_restart(tmp_path: Path) -> None:
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker)
        await publish(broker, "leased", "waiting")
        (delivery,) = await pull(broker, count=1)
        await publish(broker, "delayed", delay_s=3600)
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        assert (await broker.stats("work")).delayed == 1
        assert bodies(await pull(broker)) == ["waiting"]
        assert await broker.acknowledge("work", [delivery.ack_id]) == []


async def test_others_publish_while_much_is_redriven_and_replayed(tmp_path: Path) -> None:
    every = [str(number) for number in range(900)]
    async with SqliteBroker(tmp_path / "queue.sqlite") as broker:
        await broker.create_topic(Topic("jobs", log=True))
        await broker.create_topic(Topic("other"))
        await subscribe(broker)
        await publish(broker, *every)
        refusals = [Refusal(delivery.ack_id, dead=True) for delivery in await pull(broker, count=1000)]
        await broker.nack("work", refusals)
        for again in (broker.redrive("work", Where(), Redrive()), broker.replay("jobs", Events(), "work")):
            task = asyncio.create_task(again)
            while not task.done() and (await broker.stats("work")).ready == 0:  # noqa: ASYNC110 - asks a server
                await asyncio.sleep(0)
            await broker.publish("other", [Message(b"meanwhile")])
            assert not task.done()
            assert await task == len(every)
            deliveries = await pull(broker, count=1000)
            assert bodies(deliveries) == every
            await broker.acknowledge("work", [delivery.ack_id for delivery in deliveries])
        assert (await broker.stats("work")).dead == 0


_PRODUCER = """
import asyncio, sys
from pathlib import Path
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Message

async def main():
    async with SqliteBroker(Path(sys.argv[1])) as broker:
        async def produce(lane):
            number = 0
            while True:
                body = f"{lane}-{number}"
                await broker.publish("jobs", [Message(body.encode())])
                print(body, flush=True)
                number += 1
        await asyncio.gather(*(produce(lane) for lane in range(8)))

asyncio.run(main())
"""


async def test_no_acknowledged_message_is_lost_by_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    async with SqliteBroker(file) as broker:
        await broker.create_topic(Topic("jobs"))
        await broker.create_subscription(Subscription("work", "jobs"))
    confirmed = await asyncio.to_thread(killed_writer, _PRODUCER, file, 300)
    async with SqliteBroker(file) as broker:
        stored: list[str] = []
        while found := await pull(broker, count=1000):
            stored += bodies(found)
    assert set(confirmed) <= set(stored)
    assert len(stored) == len(set(stored))


async def test_what_is_retained_for_long_enough_is_forgotten_with_its_content(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    async with SqliteBroker(file) as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker, retain_acked=True, ttl_s=3600)
        await publish(broker, *map(str, range(300)))
        deliveries = await pull(broker, count=300)
        await broker.acknowledge("work", [delivery.ack_id for delivery in deliveries[:100]])
        with sqlite3.connect(file) as db:  # all of it has grown old
            db.execute("UPDATE messages SET published = published - 7200")
        db.close()
        await publish(broker, "young")
        (young,) = await pull(broker)
        left = [delivery.ack_id for delivery in deliveries[100:]]
        await broker.acknowledge("work", [young.ack_id, *left])
        with sqlite3.connect(file) as db:
            ((before,),) = db.execute("SELECT count(*) FROM messages")
        db.close()
        assert before < 100  # what came after the last look at them
        await broker.seek("work", Position(time=0))
        assert bodies(await pull(broker)) == ["young"]
        with sqlite3.connect(file) as db:
            assert db.execute("SELECT count(*) FROM messages").fetchone() == (1,)
            assert db.execute("SELECT count(*) FROM shares").fetchone() == (0,)
        db.close()


_BATCHES = """
import asyncio, sys
from pathlib import Path
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.domain import Message

async def main():
    async with SqliteBroker(Path(sys.argv[1])) as broker:
        async def produce(lane):
            number = 0
            while True:
                body = f"{lane}-{number}"
                await broker.publish("jobs", [Message(body.encode())] * 40)
                print(body, flush=True)
                number += 1
        await asyncio.gather(*(produce(lane) for lane in range(4)))

asyncio.run(main())
"""


async def test_a_batch_is_stored_whole_or_not_at_all_by_who_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    async with SqliteBroker(file) as broker:
        await broker.create_topic(Topic("jobs"))
        await broker.create_subscription(Subscription("work", "jobs"))
    confirmed = await asyncio.to_thread(killed_writer, _BATCHES, file, 40)
    async with SqliteBroker(file) as broker:
        stored: Counter[str] = Counter()
        while found := await pull(broker, count=1000):
            stored.update(bodies(found))
    assert set(confirmed) <= set(stored)
    assert set(stored.values()) == {40}


async def test_a_file_of_the_first_version_keeps_everything(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    db = sqlite3.connect(file)
    db.executescript(MIGRATIONS[0])
    db.executescript(
        """
        INSERT INTO topics VALUES ('jobs', 1.0);
        INSERT INTO subscriptions VALUES ('work', 'jobs', 12.0, 'fixed', 0.0, 3.0, 7, 1.0);
        INSERT INTO messages VALUES (1, 'm1', 'jobs', x'61', '{"k": "v"}', 5.0, 1);
        INSERT INTO deliveries VALUES ('work', 1, 5.0, 1, 2, NULL, '[]');
        INSERT INTO dead_letters
        VALUES (1, 'work', 'm0', 'jobs', x'62', '{}', 4.0, 6.0, 'bad', '[[6.0, "bad"]]');
        """
    )
    db.close()
    async with SqliteBroker(file) as broker:
        subscription = await broker.get_subscription("work")
        assert (subscription.ack_deadline_s, subscription.retry.max_attempts) == (12.0, 7)
        (delivery,) = await pull(broker)
        assert (delivery.data, delivery.message.attributes, delivery.attempt) == (b"a", {"k": "v"}, 3)
        (letter,) = await broker.list_dead_letters("work", Where(), limit=10)
        assert (letter.message.data, letter.attempts) == (b"b", 1)
        assert await publish(broker, "new")


def _assert_no_message_is_left(file: Path) -> None:
    with sqlite3.connect(file) as db:
        for table in ("messages", "shares", "deliveries"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)  # noqa: S608 - constants
    db.close()


async def test_a_message_of_several_subscriptions_is_kept_until_the_last_is_done(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    db = sqlite3.connect(file)
    for migration in MIGRATIONS[:4]:  # it was stored before holders were counted apart
        db.executescript(migration)
    db.executescript(
        """
        PRAGMA user_version = 4;
        INSERT INTO topics (name, created) VALUES ('jobs', 1.0);
        INSERT INTO subscriptions VALUES ('one', 'jobs', 30.0, 'fixed', 0.0, 3.0, 7, 1.0, '{}');
        INSERT INTO subscriptions VALUES ('two', 'jobs', 30.0, 'fixed', 0.0, 3.0, 7, 1.0, '{}');
        INSERT INTO messages (id, message_id, topic, data, attributes, published, holders)
            VALUES (1, 'm1', 'jobs', x'61', '{}', 5.0, 2);
        INSERT INTO deliveries (subscription, message, due, size)
            VALUES ('one', 1, 5.0, 1), ('two', 1, 5.0, 1);
        """
    )
    db.close()
    async with SqliteBroker(file) as broker:
        await publish(broker, "new")
        done = [delivery.ack_id for delivery in await pull(broker, "one")]
        assert await broker.acknowledge("one", done) == []
        kept = await pull(broker, "two")
        assert bodies(kept) == ["a", "new"]
        await broker.acknowledge("two", [kept[0].ack_id])
        await broker.delete_subscription("two")
    _assert_no_message_is_left(file)


async def test_a_subscription_is_deleted_with_more_than_goes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    async with SqliteBroker(file) as broker:
        await broker.create_topic(Topic("jobs"))
        await subscribe(broker)
        await subscribe(broker, "later")
        for _ in range(12):
            await publish(broker, *["both"] * 500)
        await broker.delete_subscription("later")
        await subscribe(broker, "later")
        assert [(await broker.stats(name)).ready for name in ("work", "later")] == [6000, 0]
        await broker.delete_subscription("work")
    _assert_no_message_is_left(file)


async def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "queue.sqlite"
    db = sqlite3.connect(file)
    db.execute("PRAGMA user_version = 1000")
    db.close()
    with pytest.raises(FailedPreconditionError):
        SqliteBroker(file)
