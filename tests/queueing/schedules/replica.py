"""A replica that fires schedules in a process of its own, and may die or be frozen at a chosen moment.

    python replica.py STATE_URL BROKER PHASE [SIGNAL]

BROKER is a file of the SQLite broker, or the URL of a RabbitMQ. PHASE is one of PHASES, or `never`. SIGNAL
is what comes then, SIGKILL or SIGSTOP. It prints `up` when it begins, and `on` when it has published after it
was frozen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from services.queueing.backends.rabbit import RabbitBroker
from services.queueing.backends.sqlite import SqliteBroker
from services.queueing.schedules.runner import Runner
from services.queueing.state import Database

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.queueing.domain import Message

PHASES = ("before-decided", "before-published", "after-published", "before-marked", "after-marked")
DEDUP_WINDOW_S = 8.0
"""Of the runner: a lease is a quarter of it. The broker remembers for longer."""
POLL_S = 0.5


def broker_of(text: str, database: Database) -> RabbitBroker | SqliteBroker:
    """The broker of an argument."""
    return RabbitBroker(text, database) if text.startswith("amqp:") else SqliteBroker(Path(text))


def runner_of(broker: Any, database: Database) -> Runner:
    """A replica's runner."""
    return Runner(broker, database, dedup_window_s=DEDUP_WINDOW_S, poll_s=POLL_S)


def _die() -> None:
    os.kill(os.getpid(), signal.Signals[sys.argv[4]] if len(sys.argv) > 4 else signal.SIGKILL)


class _Dying:
    """A broker in front of which the process dies, or is frozen once."""

    def __init__(self, broker: RabbitBroker | SqliteBroker, phase: str) -> None:
        self._broker = broker
        self._phase = phase

    async def publish(self, topic: str, messages: Sequence[Message]) -> list[str]:
        phase, self._phase = self._phase, "never"
        if phase == "before-published":
            _die()
        try:
            ids = await self._broker.publish(topic, messages)
            if phase == "after-published":
                _die()
            return ids
        finally:
            print("on", flush=True)  # noqa: T201 - a program's answer


def _die_at_commits(database: Database, phase: str) -> None:
    """Die around the commit of the transaction that writes runs down, or marks them."""
    moment, _, what = phase.partition("-")
    wanted = {"decided": "INSERT INTO schedules_runs", "marked": "UPDATE schedules_runs"}.get(what)
    if wanted is None:
        return
    engine = database._engine.sync_engine
    seen = False

    @event.listens_for(engine, "after_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal seen
        if seen and moment == "after" and wanted not in statement:
            _die()  # the transaction after it
        seen = seen or wanted in statement

    @event.listens_for(engine, "commit")
    def commit(_: Any) -> None:
        if seen and moment == "before":
            _die()


async def main() -> None:
    """Fire schedules until killed."""
    state_url, broker_text, phase, *_ = sys.argv[1:]
    async with Database(state_url) as database, broker_of(broker_text, database) as broker:
        _die_at_commits(database, phase)
        runner = runner_of(broker if phase == "never" else _Dying(broker, phase), database)
        print("up", flush=True)  # noqa: T201 - a program's answer
        await runner.run()


if __name__ == "__main__":
    asyncio.run(main())
