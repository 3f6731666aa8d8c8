"""A program in another language, started through `plexus join`, that calls when it is told to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from tests.polyglot.programs import Caller

PLEXUS = [sys.executable, "-c", "from services.cli.main import main; main()"]
ANSWER_S = 90.0
ASK = "/test.Who/Ask"


def environment(**variables: str) -> dict[str, str]:
    """What `plexus` is started with: nothing of the machine's own Plexus."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLEXUS_", "GRPC_"))}
    return kept | variables


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call got.

    Attributes:
        code: Status of gRPC, in the one spelling.
        peer: Address of who answered, where the library tells.
        body: The response.
        text: Message of an error.
    """

    code: str
    peer: str
    body: bytes
    text: str

    @property
    def failed(self) -> bool:
        """Whether it is an error."""
        return self.code != "OK"

    @property
    def port(self) -> int:
        """Of who answered."""
        return int(self.peer.rpartition(":")[2])


def answer_of(line: bytes) -> Answer:
    """Read a line of a program."""
    fields: dict[str, Any] = json.loads(line)
    # Go says PermissionDenied where the others say PERMISSION_DENIED.
    code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", fields["code"]).upper()
    return Answer(code, fields["peer"] or "", base64.b64decode(fields["body"] or ""), fields["text"] or "")


class Calling:
    """A running program."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Path) -> None:
        self.process = process
        self._errors = errors

    async def calls(self, count: int = 1, method: str = ASK, *, at_once: int = 1) -> list[Answer]:
        """Make calls.

        Args:
            count: How many.
            method: Of what.
            at_once: How many of them are under way at a time.
        """
        answers = []
        for _ in range(min(at_once, count)):
            self._call(method)
        for number in range(count):
            answers.append(await self._answer())
            if number + at_once < count:
                self._call(method)
        return answers

    async def call(self, method: str = ASK) -> Answer:
        """Make one call."""
        (answer,) = await self.calls(1, method)
        return answer

    async def until(
        self, done: Callable[[list[Answer]], bool], count: int = 12, method: str = ASK
    ) -> list[Answer]:
        """Make rows of calls until one is as wanted."""
        deadline = time.monotonic() + ANSWER_S
        while not done(answers := await self.calls(count, method)):
            assert time.monotonic() < deadline, (answers, self.log_tail())
        return answers

    @contextlib.asynccontextmanager
    async def meanwhile(self, method: str = ASK, *, at_once: int = 4) -> AsyncIterator[list[Answer]]:
        """Keep calling while the context lasts; gives the list that the answers go to."""
        answers: list[Answer] = []
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                answers.extend(await self.calls(20, method, at_once=at_once))

        working = asyncio.create_task(work())
        try:
            yield answers
        finally:
            stop.set()
            await working

    def log_tail(self) -> str:
        """The last it wrote to stderr."""
        return self._errors.read_text(errors="replace")[-3000:]

    def _call(self, method: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{method}\n".encode())

    async def _answer(self) -> Answer:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        except TimeoutError:
            line = b""
        assert line, f"no answer; its errors: {self.log_tail()}"
        return answer_of(line)


@contextlib.asynccontextmanager
async def joined(
    service: str,
    command: Sequence[str | Path],
    env: dict[str, str],
    folder: Path,
    *options: str,
    cwd: Path | None = None,
) -> AsyncIterator[Calling]:
    """Start a program through `plexus join`; it ends with the context.

    Args:
        service: Name to join under.
        command: The program.
        env: Environment of `plexus`.
        folder: For what it writes to stderr.
        options: More of the command's.
        cwd: Where it runs.
    """
    errors = folder / f"{service}-{time.monotonic_ns()}.log"
    with errors.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *(*PLEXUS, "join", "--service", service, *options, "--", *map(str, command)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env=env,
            cwd=cwd,
        )
    try:
        yield Calling(process, errors)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), ANSWER_S)
        finally:
            # Closes the pipes; without it they would be closed by the garbage collector, with a warning.
            process._transport.close()  # type: ignore[attr-defined]


def joined_caller(
    caller: Caller, service: str, target: str, env: dict[str, str], folder: Path
) -> contextlib.AbstractAsyncContextManager[Calling]:
    """Start a caller."""
    return joined(
        service,
        caller.command(target),
        env,
        folder,
        *("--language", caller.name.removeprefix("polyglot-")),
        cwd=caller.cached,
    )


def ports(answers: Sequence[Answer]) -> Counter[int]:
    """Who answered."""
    return Counter(answer.port for answer in answers if not answer.failed)
