"""Many sagas changed in one transaction: read under a lock, changed in memory, written together.

Every function works within its caller's transaction. Rows are locked in order of ids, so that no two
transactions wait for each other in a circle.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, bindparam, delete, func, select, update

from services.queueing.sagas import catalogue, machine
from services.queueing.sagas.codec import definition_of, json_text, record_text, saga_of, saga_text
from services.queueing.sagas.contract import Made
from services.queueing.sagas.definitions import Definition
from services.queueing.sagas.domain import MAX_EVENTS, State, no_definition, no_saga
from services.queueing.sagas.tables import DEFINITIONS, EVENTS, SAGAS
from services.runtime.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    PlexusError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from services.queueing.sagas.contract import Change, Lease, Order
    from services.queueing.sagas.domain import Record, Saga
    from services.queueing.state import Database

WHOLE = (SAGAS.c.document, SAGAS.c.input, SAGAS.c.results)
UNENDED = tuple(state.value for state in State if not state.ended)
_RUNS = and_(DEFINITIONS.c.name == SAGAS.c.definition, DEFINITIONS.c.version == SAGAS.c.version)
_ROWS = (
    select(SAGAS.c.id, SAGAS.c.owner, SAGAS.c.leased_until, *WHOLE, DEFINITIONS.c.document.label("defined"))
    .select_from(SAGAS.outerjoin(DEFINITIONS, _RUNS))
    .order_by(SAGAS.c.id)
    .with_for_update(of=SAGAS)
)
_CHANGED = (
    update(SAGAS)
    .where(SAGAS.c.id == bindparam("of"))
    .values(
        {name: bindparam(name) for name in ("state", "ended", "due", "document", "owner", "leased_until")}
    )
)
_CHANGED_WITH_RESULTS = _CHANGED.values(results=bindparam("results"))


class Room:
    """How many sagas more somebody may take, and for whom; without a lease none."""

    def __init__(self, lease: Lease | None, now: float) -> None:
        self.now = now
        self.owner = lease.owner if lease else ""
        self.until = now + lease.seconds if lease else 0.0
        self._left = lease.room if lease else 0

    def take(self) -> bool:
        """Take one, if there is room."""
        self._left -= 1
        return self._left >= 0


class _Row:
    """A saga under a lock."""

    def __init__(self, row: Any) -> None:
        self.saga: Saga = saga_of(row)
        self._defined: str | None = row.defined
        self.owner: str = row.owner
        self.leased_until: float = row.leased_until
        self.records: list[Record] = []
        self._before = (self.saga, self.owner, self.leased_until)

    def apply(self, event: machine.Event, room: Room) -> Made:
        """Apply an event, and settle who has the saga then."""
        saga = self.saga
        if self._defined is None:
            raise no_definition(saga.definition, saga.version)
        definition = definition_of(self._defined)
        made = machine.apply(definition, saga, event, room.now)
        self.saga = made.saga
        self.records += made.records
        answered = isinstance(event, machine.Succeeded | machine.Failed) and made.saga.attempt != saga.attempt
        sender_is_done = answered and bool(saga.action_of(definition).topic)
        return Made(made.saga, definition, made.records, held=self._settled(room, sender_is_done))

    def _settled(self, room: Room, sender_is_done: bool) -> bool:
        """Take it or give it back; whether one has it, with something to do at once."""
        at_once = self.saga.due == 0.0
        mine = bool(room.owner) and self.owner == room.owner
        free = sender_is_done or self.leased_until <= room.now
        if room.owner and at_once and (mine or (free and room.take())):
            self.owner, self.leased_until = room.owner, room.until
            return True
        if sender_is_done or (mine and not at_once):
            self.owner, self.leased_until = "", 0.0
        return False

    @property
    def changed(self) -> bool:
        before, owner, until = self._before
        return self.saga is not before or (self.owner, self.leased_until) != (owner, until)

    def columns(self) -> dict[str, Any]:
        """What is written of it, with results if there are others."""
        columns = {"of": self.saga.id, "owner": self.owner, "leased_until": self.leased_until}
        results = self.saga.results
        if results != self._before[0].results:
            columns["results"] = json_text(results)
        return columns | _columns(self.saga)


async def changed(
    connection: AsyncConnection, changes: Sequence[Change], room: Room
) -> list[Made | PlexusError]:
    """Apply events; see `SagaStore.write`."""
    wanted = {change.saga_id for change in changes}
    found = await connection.execute(_ROWS.where(SAGAS.c.id.in_(wanted)))
    rows = {row.id: _Row(row) for row in found}
    results: list[Made | PlexusError] = []
    for change in changes:
        row = rows.get(change.saga_id)
        if row is None:
            results.append(no_saga(change.saga_id))
            continue
        try:
            results.append(row.apply(change.event, room))
        except PlexusError as error:
            results.append(error)
    if len(wanted) < len(changes):
        _only_the_last_holds(results)
    await _write(connection, rows.values())
    return results


def _only_the_last_holds(results: list[Made | PlexusError]) -> None:
    """Of several events of a saga the last one says what is to be done."""
    later: set[str] = set()
    for position in range(len(results) - 1, -1, -1):
        made = results[position]
        if isinstance(made, PlexusError):
            continue
        if made.held and made.saga.id in later:
            results[position] = replace(made, held=False)
        later.add(made.saga.id)


async def claimed(connection: AsyncConnection, ids: Sequence[str], room: Room) -> list[Made]:
    """Take these, which are due and free and locked, and let time pass for them."""
    rows = [_Row(row) for row in await connection.execute(_ROWS.where(SAGAS.c.id.in_(ids)))]
    made: list[Made] = []
    for row in rows:
        try:
            made.append(row.apply(machine.Tick(), room))
        except PlexusError:  # its definition is gone: nothing can be done but leave it for a while
            row.leased_until = room.until
    await _write(connection, rows)
    return made


async def _write(connection: AsyncConnection, rows: Iterable[_Row]) -> None:
    touched = [row for row in rows if row.changed]
    columns = [row.columns() for row in touched]
    if plain := [each for each in columns if "results" not in each]:
        await connection.execute(_CHANGED, plain)
    if more := [each for each in columns if "results" in each]:
        await connection.execute(_CHANGED_WITH_RESULTS, more)
    await _remember(connection, {row.saga.id: row.records for row in touched if row.records})


async def _remember(connection: AsyncConnection, histories: dict[str, Sequence[Record]]) -> None:
    """Add to histories, and forget the oldest beyond the bound."""
    rows = [
        {"saga": saga_id, "revision": record.revision, "document": record_text(record)}
        for saga_id, records in histories.items()
        for record in records
    ]
    if rows:
        await connection.execute(EVENTS.insert(), rows)
    for saga_id, records in histories.items():
        oldest = records[-1].revision - MAX_EVENTS
        if oldest > 0:
            old = EVENTS.c.revision <= oldest
            await connection.execute(delete(EVENTS).where(EVENTS.c.saga == saga_id, old))


async def started(
    database: Database, connection: AsyncConnection, orders: Sequence[Order], room: Room
) -> list[Made | PlexusError]:
    """Start sagas, of which no two have the same id or request; see `SagaStore.write`."""
    present = await _of_requests(connection, orders)
    new = [order for order in orders if order.request not in present]
    # Shared: no definition can be deleted before its saga is there to be seen.
    definitions = await catalogue.newest_of(connection, {order.definition for order in new})
    running = await _running(connection, max((order.max_running for order in new), default=0))
    made: dict[int, Made | PlexusError] = {}
    rows = []
    for position, order in enumerate(orders):
        definition = definitions.get(order.definition)
        if order.request in present:
            made[position] = _repeated(order, present[order.request])
        elif definition is None:
            made[position] = no_definition(order.definition)
        elif running >= order.max_running:
            made[position] = _too_many(order.max_running)
        else:
            running += 1
            one = made[position] = _begun(order, definition, room)
            rows.append(_row(order, one, room))
    if rows:
        insert = database.insert(SAGAS).on_conflict_do_nothing().returning(SAGAS.c.id)
        inserted = set((await connection.execute(insert, rows)).scalars())
        histories: dict[str, Sequence[Record]] = {}
        for position, each in made.items():
            if isinstance(each, PlexusError) or not each.records:
                continue
            if each.saga.id in inserted:
                histories[each.saga.id] = each.records
            else:
                made[position] = await _taken(connection, orders[position], each.saga.id)
        await _remember(connection, histories)
    return [made[position] for position in range(len(orders))]


def _begun(order: Order, definition: Definition, room: Room) -> Made:
    saga_id = order.id or secrets.token_hex(12)
    secret = secrets.token_hex(6)
    begun = machine.begin(definition, saga_id, order.input, secret, room.now, order.trace)
    return Made(begun.saga, definition, begun.records, held=room.take())


def _row(order: Order, made: Made, room: Room) -> dict[str, Any]:
    return {
        "id": made.saga.id,
        "definition": made.saga.definition,
        "version": made.saga.version,
        "created": room.now,
        "owner": room.owner if made.held else "",
        "leased_until": room.until if made.held else 0.0,
        "request": order.request or None,
        "digest": order.digest,
        "input": json_text(order.input),
        "results": "{}",
        **_columns(made.saga),
    }


async def _taken(connection: AsyncConnection, order: Order, saga_id: str) -> Made | PlexusError:
    """Of an order that another replica was faster with: its saga, or that the id is another's."""
    present = await _of_requests(connection, [order])
    if order.request in present:
        return _repeated(order, present[order.request])
    return AlreadyExistsError(f"saga {saga_id!r} exists", reason="SAGA_EXISTS", metadata={"saga": saga_id})


async def _of_requests(connection: AsyncConnection, orders: Sequence[Order]) -> dict[str, Any]:
    """The rows that requests of this name have made."""
    names = {order.request for order in orders if order.request}
    if not names:
        return {}
    query = (
        select(SAGAS.c.request, SAGAS.c.digest, *WHOLE, DEFINITIONS.c.document.label("defined"))
        .select_from(SAGAS.outerjoin(DEFINITIONS, _RUNS))
        .where(SAGAS.c.request.in_(names))
    )
    return {row.request: row for row in await connection.execute(query)}


def _repeated(order: Order, row: Any) -> Made | PlexusError:
    if row.digest != order.digest:
        return InvalidArgumentError(
            "was used with another request", field="request_id", reason="REQUEST_ID_REUSED"
        )
    saga = saga_of(row)
    if row.defined is None:  # it ended, and its definition was deleted
        return Made(saga, Definition(saga.definition, ()))
    return Made(saga, definition_of(row.defined))


async def _running(connection: AsyncConnection, most: int) -> int:
    """How many sagas have not ended, counted up to a bound."""
    if not most:
        return 0
    some = select(SAGAS.c.id).where(SAGAS.c.state.in_(UNENDED)).limit(most).subquery()
    count: int = (await connection.execute(select(func.count()).select_from(some))).scalar_one()
    return count


def _too_many(most: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"{most} sagas have not ended", reason="TOO_MANY_SAGAS", metadata={"limit": str(most)}
    )


def _columns(saga: Saga) -> dict[str, Any]:
    """What changes of a row with its saga."""
    return {"state": saga.state.value, "ended": saga.ended, "due": saga.due, "document": saga_text(saga)}
