"""DBOS Transact's durable workflows of three steps, in one process with a SQLite file.

    python benchmarks/_sagas_dbos.py FOLDER COUNT AT_ONCE

Says one JSON line. Its connections are made to wait for the disk at each commit, as ours do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from dbos import DBOS, DBOSConfig, SetWorkflowID
from sqlalchemy import event
from sqlalchemy.engine import Engine

STEPS = ("reserve", "charge", "ship")


@event.listens_for(Engine, "connect")
def _durable(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


@DBOS.step()  # type: ignore[untyped-decorator]
async def step(name: str, order: dict[str, Any]) -> dict[str, Any]:
    """Do nothing."""
    return {"of": name, "order": order["order"]}


@DBOS.workflow()  # type: ignore[untyped-decorator]
async def saga(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Three steps, each durable before the next."""
    return [await step(name, order) for name in STEPS]


async def _measure(count: int, at_once: int) -> dict[str, float]:
    slots = asyncio.Semaphore(at_once)
    order = {"order": "17", "items": ["book", "pen"], "note": "x" * 200}

    async def one(name: str) -> None:
        async with slots:
            with SetWorkflowID(name):
                handle = await DBOS.start_workflow_async(saga, order)
            assert len(await handle.get_result(polling_interval_sec=0.01)) == len(STEPS)

    await asyncio.gather(*(one(f"warm{number}") for number in range(at_once)))
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one(f"w{number}") for number in range(count)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"dbos_per_s": round(count / seconds, 1), "dbos_cpu_ms": round(cpu / count * 1000, 2)}


def main() -> None:
    """Measure once."""
    folder, count, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config: DBOSConfig = {
        "name": "sagas",
        "system_database_url": f"sqlite:///{folder}/dbos.sqlite",
        "log_level": "ERROR",
        "run_admin_server": False,
    }
    DBOS(config=config)
    DBOS.launch()
    logging.getLogger("dbos").setLevel(logging.ERROR)
    print(json.dumps(asyncio.run(_measure(count, at_once))), flush=True)
    DBOS.destroy()


if __name__ == "__main__":
    main()
