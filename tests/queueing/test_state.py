"""The state's database: transactions, migrations, and a server that dies or falls silent."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, func, insert, select, text
from structlog.testing import capture_logs

from services.queueing.state import Database, Schema
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from tests.servers.postgres import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alembic.operations import Operations

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("postgres")]
RECOVERY_S = 120.0
_ROOT = Path(__file__).resolve().parents[2]

METADATA = MetaData()
NOTES = Table(
    "notes",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("body", Text, nullable=False, unique=True),
)


def _first(operations: Operations) -> None:
    operations.create_table(
        "notes",
        Column("id", Integer, primary_key=True),
        Column("body", Text, nullable=False, unique=True),
    )


def _second(operations: Operations) -> None:
    operations.execute(insert(NOTES).values(body="made by a step"))


FIRST = Schema("notes", METADATA, (_first,))
BOTH = Schema("notes", METADATA, (_first, _second))


async def bodies(database: Database) -> list[str]:
    async with database.reading() as connection:
        rows = await connection.execute(select(NOTES.c.body).order_by(NOTES.c.id))
        return list(rows.scalars())


async def write(database: Database, body: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(insert(NOTES).values(body=body))


async def test_a_block_that_raises_leaves_nothing(state: Database) -> None:
    await state.migrate(FIRST)
    await write(state, "kept")

    async def fail() -> None:
        async with state.transaction() as connection:
            await connection.execute(insert(NOTES).values(body="taken back"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert await bodies(state) == ["kept"]


async def test_transactions_that_read_and_then_write_lose_no_update(state: Database) -> None:
    await state.migrate(FIRST)
    await write(state, "0")

    async def add() -> None:
        async with state.transaction() as connection:
            query = select(NOTES.c.body).with_for_update()
            count = int((await connection.execute(query)).scalar_one())
            await connection.execute(NOTES.update().values(body=str(count + 1)))

    await asyncio.gather(*(add() for _ in range(40)))
    assert await bodies(state) == ["40"]


async def test_an_insert_that_conflicts_may_do_nothing(state: Database) -> None:
    await state.migrate(FIRST)
    for _ in range(2):
        async with state.transaction() as connection:
            await connection.execute(state.insert(NOTES).values(body="once").on_conflict_do_nothing())
    assert await bodies(state) == ["once"]


async def test_a_caller_cancelled_within_a_statement_keeps_nobody_from_writing(tmp_path: Path) -> None:
    loop, held = asyncio.get_running_loop(), []

    async def interrupted(database: Database) -> None:
        this, cancelled = asyncio.current_task(), threading.Event()
        assert this is not None

        def cancel() -> None:
            this.cancel()
            loop.call_soon(loop.call_soon, cancelled.set)  # when it has been told

        def within() -> int:  # called by the statement, which has a second row to give
            loop.call_soon_threadsafe(cancel)
            assert cancelled.wait(RECOVERY_S)
            return 1

        async with database.transaction() as connection:
            await connection.execute(insert(NOTES).values(body="taken back"))
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            await raw.create_function("within", 0, within)
            try:
                await connection.execute(text("SELECT within() UNION ALL SELECT 2"))
            except asyncio.CancelledError as error:
                held.append(error)  # its frames hold the statement
                raise

    async with Database(f"sqlite:///{tmp_path}/state.sqlite") as database:
        await database.migrate(FIRST)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(interrupted(database))
        assert held
        await write(database, "kept")
        assert await bodies(database) == ["kept"]


async def test_the_clock_is_near_ours(state: Database) -> None:
    async with state.reading() as connection:
        assert await state.now(connection) > 1.7e9


async def test_steps_run_once_and_later_ones_are_added(state: Database) -> None:
    await state.migrate(FIRST)
    await write(state, "before")
    for _ in range(2):
        await state.migrate(BOTH)
    assert await bodies(state) == ["before", "made by a step"]


async def test_tables_of_a_newer_version_are_refused(state: Database) -> None:
    await state.migrate(BOTH)
    with pytest.raises(FailedPreconditionError) as caught:
        await state.migrate(FIRST)
    assert caught.value.reason == "STATE_TOO_NEW"


_REPLICA = """
import asyncio, sys
from sqlalchemy import Column, MetaData, Text
from services.queueing.state import Database, Schema

def step(operations):
    operations.create_table("notes", Column("id", Text), Column("body", Text))
    operations.execute("INSERT INTO notes (id, body) VALUES ('1', 'made by a step')")

async def main():
    async with Database(sys.argv[1]) as database:
        print("up", flush=True)
        sys.stdin.readline()
        await database.migrate(Schema("notes", MetaData(), (step,)))

asyncio.run(main())
"""


async def test_replicas_that_start_at_once_migrate_exactly_once(state: Database, state_url: str) -> None:
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", _REPLICA, state_url],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert replica.stdout.readline() == b"up\n"
    for replica in replicas:
        assert replica.stdin is not None
        replica.stdin.write(b"go\n")
        replica.stdin.flush()
    for replica in replicas:
        replica.communicate(timeout=RECOVERY_S)
        assert replica.returncode == 0
    assert await bodies(state) == ["made by a step"]


@pytest.mark.parametrize("url", ["", "sqlite://", "mysql://u:hidden@h/d", "hidden"])
def test_what_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Database(url)
    assert "hidden" not in str(caught.value)


# A server that is harmed.


@pytest.fixture(scope="module")
def server(postgres_program: Path) -> Iterator[PostgresServer]:
    with PostgresServer(postgres_program) as server:
        yield server


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    with server.database() as url:
        yield url


async def test_a_server_that_dies_is_told_and_used_again_when_it_is_back(
    server: PostgresServer, url: str
) -> None:
    async with Database(url, connect_s=20) as database:
        await database.migrate(FIRST)
        await asyncio.gather(*(write(database, f"a{number}") for number in range(20)))
        server.kill()
        with pytest.raises(UnavailableError) as caught:
            await write(database, "refused")
        assert caught.value.metadata == {"dependency": "state"}
        await asyncio.to_thread(server.start)
        await asyncio.gather(*(write(database, f"b{number}") for number in range(20)))
        async with database.reading() as connection:
            assert (await connection.execute(select(func.count()).select_from(NOTES))).scalar_one() == 40


async def test_a_server_that_dies_in_a_transaction_keeps_nothing_of_it(
    server: PostgresServer, url: str
) -> None:
    async with Database(url, connect_s=20) as database:
        await database.migrate(FIRST)

        async def interrupted() -> None:
            async with database.transaction() as connection:
                await connection.execute(insert(NOTES).values(body="a"))
                await asyncio.to_thread(server.kill)
                await connection.execute(insert(NOTES).values(body="b"))

        with pytest.raises(UnavailableError):
            await interrupted()
        await asyncio.to_thread(server.start)
        assert await bodies(database) == []


async def test_a_server_that_falls_silent_is_told_in_time(server: PostgresServer, url: str) -> None:
    async with Database(url, statement_s=0.5, wait_s=2, connect_s=20) as database:
        await database.migrate(FIRST)
        await write(database, "a")
        server.pause()
        try:
            with pytest.raises(UnavailableError):
                await write(database, "b")
        finally:
            server.resume()
        async with asyncio.timeout(RECOVERY_S):
            while True:
                try:
                    await write(database, "c")
                    break
                except UnavailableError:
                    continue
        assert {"a", "c"} <= set(await bodies(database))


async def test_a_statement_that_takes_too_long_ends(url: str) -> None:
    async with Database(url, statement_s=0.2) as database:
        with pytest.raises(UnavailableError):
            async with database.reading() as connection:
                await connection.execute(select(func.pg_sleep(60)))


async def test_a_text_with_nul_is_the_callers_mistake(url: str) -> None:
    async with Database(url) as database:
        await database.migrate(FIRST)
        with pytest.raises(InvalidArgumentError, match="NUL") as caught:
            await write(database, "a\0b")
        assert caught.value.reason == "INVALID_TEXT"
        await write(database, "ab")
        assert await bodies(database) == ["ab"]


async def test_callers_beyond_the_pool_wait_and_then_are_told(url: str) -> None:
    async with Database(url, pool_size=1, wait_s=0.2) as database, database.reading() as connection:
        await connection.execute(select(1))
        with pytest.raises(UnavailableError):
            async with database.reading():
                pass


async def test_the_password_is_never_told(url: str) -> None:
    wrong = url.replace("@", "hidden@", 1)
    with capture_logs() as logs:
        async with Database(wrong, start_s=0) as database:
            with pytest.raises(UnavailableError) as caught:
                await database.migrate(FIRST)
            assert caught.value.message == "the state's database refuses our credentials"
    assert "hidden" not in f"{logs}{caught.value}{caught.value.metadata}{caught.value.__cause__!r}"


async def test_a_server_without_tls_is_refused_if_the_url_wants_it(url: str) -> None:
    async with Database(f"{url}?sslmode=verify-full&sslrootcert=/nowhere", start_s=0) as database:
        with pytest.raises((UnavailableError, InvalidArgumentError)):
            await database.migrate(FIRST)
    async with Database(f"{url}?sslmode=require", start_s=0) as database:
        with pytest.raises(UnavailableError):
            await database.migrate(FIRST)


async def test_a_caller_that_goes_away_at_any_moment_leaves_nothing_behind(
    state: Database, state_url: str
) -> None:
    await state.migrate(FIRST)

    async def use(database: Database, number: int) -> None:
        async with database.transaction() as connection:
            await connection.execute(insert(NOTES).values(body=str(number)))

    for number in range(40):
        async with Database(state_url) as database:
            task = asyncio.create_task(use(database, number))
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await write(state, "last")
    assert "last" in await bodies(state)
    gc.collect()  # what was left behind would warn now
