"""up, down, status, logs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from importlib import metadata
from typing import TYPE_CHECKING, Any

from services.cli import observe, settings
from services.cli.supervisor import backend, control, rundir
from services.mesh.registry.domain import WAITS_META
from services.runtime.errors import DeadlineExceededError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from services.cli.settings import EdgeAddress

LOCK_WAIT_S = 20.0
"""How long `up` waits for processes of a killed supervisor to end."""
START_WAIT_S = 60.0
DOWN_WAIT_S = 60.0
_FOLLOW_POLL_S = 0.2


def version() -> str:
    """The installed version."""
    return metadata.version("plexus-mesh")


def up(
    state_dir: Path,
    edge: EdgeAddress,
    *,
    detach: bool,
    scale: Sequence[str] = (),
    prepare: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Start everything; in the foreground until a signal or `plexus down`, detached until all serve.

    Args:
        state_dir: The state folder.
        edge: Where the edge will listen.
        detach: Return when everything serves.
        scale: `service=count`, for services with more than one instance.
        prepare: Called once nothing speaks against a start, before anything is started.
        progress: Detached, told of each process that serves.

    Raises:
        PlexusError: Already running, the port is taken, a service cannot be scaled, or (detached) the start
            failed.
    """
    counts = backend.scale(scale)
    run_dir = rundir.RunDir(state_dir.resolve())
    run_dir.create()
    if rundir.is_locked(run_dir):
        if _answers(run_dir):
            os.close(rundir.acquire_lock(run_dir, 0))  # raises, naming who holds it
    else:
        rundir.check_http_port(edge.host, edge.port)
    prepare()

    def supervise(tell: Callable[[dict[str, Any]], None], console: Any) -> None:
        lock = rundir.acquire_lock(run_dir, LOCK_WAIT_S)
        rundir.check_http_port(edge.host, edge.port)  # now that an edge of an earlier run is gone
        _supervise(run_dir, lock, edge, counts, tell, console)

    if not detach:
        supervise(lambda _: None, sys.stdout)
        return None
    from services.cli.supervisor.detach import run_detached  # noqa: PLC0415 - only here

    try:
        return run_detached(
            lambda tell: supervise(tell, None), run_dir.log_file("supervisor"), START_WAIT_S, progress
        )
    except DeadlineExceededError as error:
        rows = status(run_dir.state_dir)["services"]
        late = [
            f"{row['service']} ({row['waits_for'] or row['state']})"
            for row in rows
            if row["state"] != "serving"
        ]
        raise DeadlineExceededError(
            f"not serving after {START_WAIT_S:g} s: {', '.join(late)}; the rest runs on: "
            f"see `plexus logs {late[0].split()[0] if late else 'supervisor'}`, or `plexus down`"
        ) from error


def _answers(run_dir: rundir.RunDir) -> bool:
    try:
        control.ask(run_dir.socket, "status")
    except UnavailableError:
        return False
    return True


def _supervise(
    run_dir: rundir.RunDir,
    lock: int,  # noqa: ARG001 - held open by its number; children inherit it on purpose
    edge: EdgeAddress,
    counts: dict[str, int],
    tell: Callable[[dict[str, Any]], None],
    console: Any,
) -> None:
    from services.cli.supervisor.supervisor import Supervisor  # noqa: PLC0415 - `status` does not need it

    began = time.monotonic()
    control_port = settings.control_port(run_dir)
    for problem in backend.preload():
        print(problem, file=sys.stderr)  # noqa: T201 - the supervisor's own log or terminal
    if (threads := backend.thread_count()) > 1:
        print(f"{threads} threads before the fork: an import started them", file=sys.stderr)  # noqa: T201 - as above

    def started(name: str, complete: bool) -> None:
        tell({"progress": f"{name} serves"})
        if complete:
            tell({"edge": edge.url})

    facts = {"state_dir": str(run_dir.state_dir), "edge": edge.url, "version": version()}
    Supervisor(
        backend.specs(run_dir.state_dir, edge.port, control_port, counts),
        run_dir,
        console=console,
        on_serving=started,
        facts=facts,
        began=began,
    ).run()


def down(state_dir: Path, progress: Callable[[str], None]) -> None:
    """Stop everything in order and wait until the last process has ended.

    Raises:
        UnavailableError: Nothing runs.
        DeadlineExceededError: Processes are left after the bound.
    """
    run_dir = rundir.RunDir(state_dir.resolve())
    for answer in control.call(run_dir.socket, {"command": "down"}, timeout_s=DOWN_WAIT_S):
        if "service" in answer:
            progress(f"{answer['service']} stopped")
    deadline = time.monotonic() + DOWN_WAIT_S
    while rundir.is_locked(run_dir):
        if time.monotonic() > deadline:
            raise DeadlineExceededError("some processes do not end: see `plexus logs supervisor`")
        time.sleep(_FOLLOW_POLL_S / 4)


def status(state_dir: Path) -> dict[str, Any]:
    """Everything `plexus status --json` prints.

    Raises:
        UnavailableError: Nothing runs.
    """
    answer = control.ask(rundir.RunDir(state_dir.resolve()).socket, "status")
    by_session = observe.sessions()
    registered = _registered(state_dir)
    for row in answer["services"]:
        pid = row["pid"]
        row["version"] = answer["version"]
        row["pss_bytes"] = None if pid is None else observe.session_pss_bytes(pid, by_session)
        address, waits_for = registered.get(pid, (None, ""))
        row["address"] = row["address"] or address
        row["waits_for"] = waits_for
    supervisor = {"pid": answer.pop("pid"), "uptime_s": answer.pop("uptime_s")}
    supervisor["pss_bytes"] = observe.pss_bytes(supervisor["pid"])
    answer["supervisor"] = supervisor
    answer["pss_bytes"] = sum(row["pss_bytes"] or 0 for row in [*answer["services"], supervisor])
    answer["ready"] = all(row["state"] == "serving" for row in answer["services"])
    return answer


def _registered(state_dir: Path) -> dict[int | None, tuple[str | None, str]]:
    """Address, and what is waited for, by pid, from the catalogue that the control plane keeps on disk."""
    try:
        instances = json.loads((state_dir / "data" / "control" / "catalogue.json").read_text())["instances"]
        return {
            int(each["meta"]["pid"]): (
                f"{each['address']}:{each['port']}",
                str(each["meta"].get(WAITS_META, "")),
            )
            for each in instances
            if "pid" in each["meta"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not written yet


def logs(state_dir: Path, name: str | None, lines: int, *, follow: bool) -> Iterator[tuple[str, str]]:
    """The last lines of one log or of all, and with `follow` what is added, as (name, line).

    Raises:
        NotFoundError: No such log.
    """
    run_dir = rundir.RunDir(state_dir.resolve())
    known = sorted(path.stem for path in run_dir.logs.glob("*.log"))
    if name is not None and name not in known:
        raise NotFoundError(
            f"no log of {name!r}; there are: {', '.join(known) or 'none yet, start with `plexus up`'}"
        )
    tails = {each: _Tail(run_dir.log_file(each)) for each in ([name] if name else known)}
    for each, tail in tails.items():
        for line in deque(tail.read(), maxlen=lines):
            yield each, line
    while follow:
        quiet = True
        for each, tail in tails.items():
            for line in tail.read():
                quiet = False
                yield each, line
        if quiet:
            time.sleep(_FOLLOW_POLL_S)


class _Tail:
    """Reads what was added to a file, across its rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._inode = 0
        self._rest = b""

    def read(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                if inode != self._inode:
                    self._inode, self._position = inode, 0
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]
