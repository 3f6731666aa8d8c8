"""What keeps definitions and sagas, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.sagas.definitions import Definition
    from services.queueing.sagas.domain import Record, Saga, State
    from services.queueing.sagas.machine import Event
    from services.runtime.errors import PlexusError


@dataclass(frozen=True, slots=True)
class Order:
    """A request to start a saga.

    Attributes:
        definition: Name of the definition.
        input: What every step gets.
        id: Wanted; empty for a random one.
        request: The caller's name for this request, unique over callers; empty if it will not repeat it.
        digest: Of what is asked for.
        trace: W3C trace context.
        max_running: It is refused when so many sagas have not ended.
    """

    definition: str
    input: dict[str, Any]
    id: str = ""
    request: str = ""
    digest: str = ""
    trace: str = ""
    max_running: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """An event of a saga."""

    saga_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Lease:
    """Who wants sagas for himself, for how long, and at most how many more than he has."""

    owner: str
    seconds: float
    room: int


@dataclass(frozen=True, slots=True)
class Made:
    """A saga as it is stored now, and what a write did to it.

    Attributes:
        saga: As it is.
        definition: What it runs.
        records: What was added to its history.
        held: Whether something is to be done at once, and who wrote has the saga to do it.
    """

    saga: Saga
    definition: Definition
    records: tuple[Record, ...] = ()
    held: bool = False


@dataclass(frozen=True, slots=True)
class Which:
    """Which sagas: all whose every given property holds."""

    definition: str = ""
    state: State | None = None


class SagaStore(Protocol):
    """Keeps definitions and sagas; every change is durable when its call returns.

    Several replicas may use one store at a time. Calls for a saga or definition that does not exist raise
    NotFoundError.
    """

    async def create_definition(self, definition: Definition) -> Definition:
        """Keep version 1.

        Raises:
            AlreadyExistsError: There is one of this name.
        """
        ...

    async def get_definition(self, name: str, version: int = 0) -> Definition:
        """Get a version; 0 is the newest."""
        ...

    async def list_definitions(self, *, limit: int, after: str = "") -> list[Definition]:
        """The newest versions, in order of names."""
        ...

    async def update_definition(self, definition: Definition) -> Definition:
        """Keep the next version, or return the newest one if it is the same."""
        ...

    async def delete_definition(self, name: str) -> None:
        """Forget all versions.

        Raises:
            FailedPreconditionError: A saga of it has not ended.
        """
        ...

    async def write(
        self, jobs: Sequence[Order | Change], lease: Lease | None = None
    ) -> list[Made | PlexusError]:
        """Start sagas of their newest versions and apply events, all in one transaction.

        The events of a saga are applied to it as it is now, in their order. A saga that asks for something
        to be done at once goes to who writes: if he has it, if nobody has, or if the event was a worker's
        answer, with which whoever had sent the request is done. One that does not is given back.

        Args:
            jobs: What to do; one that fails does not touch the others.
            lease: Who writes; None leaves alone who has which saga.

        Returns:
            For each job what became of its saga; of an order that repeats a request, the saga that it
            started; or why nothing was done: NotFoundError of an unknown definition or saga,
            AlreadyExistsError of an id that is taken, InvalidArgumentError of a request's name that was used
            for another, ResourceExhaustedError of too many sagas, FailedPreconditionError as
            `machine.apply`.

        Raises:
            UnavailableError: The store cannot be reached; all may be done, or nothing.
        """
        ...

    async def get(self, saga_id: str) -> Saga:
        """Get a saga."""
        ...

    async def list_sagas(
        self, which: Which, *, limit: int, before: tuple[float, str] | None = None
    ) -> list[Saga]:
        """Sagas, the newest first, after a creation time and id; without input and results."""
        ...

    async def events(self, saga_id: str, *, limit: int, after: int = 0) -> list[Record]:
        """The history after a revision, the oldest first."""
        ...

    async def revisions(self, saga_ids: Sequence[str]) -> dict[str, int]:
        """The newest revision of each of these that there is."""
        ...

    async def claim(self, lease: Lease) -> list[Made]:
        """Take sagas that are due and that nobody has, let time pass for them, and give back as `write`."""
        ...

    async def renew(self, owner: str, saga_ids: Sequence[str], *, lease_s: float) -> None:
        """Have these for longer, as far as one still has them."""
        ...

    async def release(self, saga_ids: Sequence[str], owner: str, *, retry_s: float) -> None:
        """Give sagas back, as far as one still has them; nobody can take them for `retry_s` seconds."""
        ...

    async def release_all(self, owner: str) -> None:
        """Give back all that one has."""
        ...

    async def next_due_s(self, *, most: float) -> float:
        """Seconds until a saga can be claimed, at most `most`."""
        ...

    async def counts(self) -> dict[State, int]:
        """How many sagas have not ended, by state."""
        ...

    async def purge(self, *, ended_before: float, limit: int) -> int:
        """Forget sagas that ended before, seconds since 1970; how many."""
        ...
