"""Blocking queries: what is at a path now, and again whenever it has changed.

The rules, each from what Consul was seen to do (tests/mesh/consul/):

* An index counts only if the answer was 200 (or a 404 that means "nothing there"); errors carry one, too.
* An index that falls, or is no number, starts the watch anew; after any error it starts anew as well.
* Bodies are compared. A restored or wiped server can come back with another body at the same index.
* `wait` is the bound on staleness: an index from before a restore hides every change until it ends.
* The request has a deadline of its own, since a stopped agent takes connections and never answers.
* A watch begins with a consistent read: a server that has just restarted answers others from what it knew
  before it has replayed its log, so that a rule that was taken back would hold again for a moment.
* Requests are paced and failures back off with jitter, whatever the server says.
* An error changes nothing for who watches: the last good answer stands.
* Where emptiness could also mean lost rights, `believe` decides before anyone hears of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import structlog

from services.runtime.errors import PlexusError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from services.mesh.consul.answers import Answer
    from services.mesh.consul.client import ConsulClient

log = structlog.get_logger(__name__)

BURST = 10
"""Requests of a watch that may follow each other at once."""
RATE_PER_S = 5.0
"""Requests a second after that. Changes that come quicker are seen as one."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
"""Pauses after failures; no longer, so that a Consul that is back is seen within seconds."""
MARGIN_S = 10.0
"""Consul may add a sixteenth to the wait; beyond that and this it is taken for dead."""


class Pace:
    """A token bucket on one watch's requests."""

    def __init__(self, *, burst: int = BURST, rate_per_s: float = RATE_PER_S) -> None:
        self._burst = burst
        self._rate = rate_per_s
        self._tokens = float(burst)
        self._at = time.monotonic()

    async def turn(self) -> None:
        """Wait until another request may go out."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


async def changes(
    client: ConsulClient,
    path: str,
    *params: tuple[str, Any],
    believe: Callable[[Answer], Awaitable[bool]] | None = None,
) -> AsyncIterator[Answer]:
    """Yield the answer now and after each change of its body, for ever.

    Args:
        client: An open client.
        path: From `/v1/` on; it must support blocking.
        params: The query.
        believe: Asked about each changed answer; what it does not believe is asked for again after a pause.
            It may raise: an answer whose content cannot be used is not believed, either.
    """
    index, failures = 0, 0
    last: bytes | None = None
    pace = Pace()
    while True:
        await pace.turn()
        try:
            answer = await _ask(client, path, params, index)
            changed = answer.body != last
            if changed and believe is not None and not await believe(answer):
                failures, index = failures + 1, 0
                _tell(path, "CONSUL_NOT_BELIEVED", failures)
                await _pause(failures)
                continue
        except PlexusError as error:
            failures, index = failures + 1, 0
            _tell(path, error.reason, failures)
            await _pause(failures)
            continue
        if failures:
            log.info("consul_watch_recovered", path=path, after_failures=failures)
            failures = 0
        if changed:
            last = answer.body
            yield answer
        index = answer.index if answer.index >= index else 0


async def _ask(client: ConsulClient, path: str, params: tuple[tuple[str, Any], ...], index: int) -> Answer:
    if not index:
        return await client.request("GET", path, [*params, ("consistent", "true")])
    wait_s = client.config.wait_s * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load only
    query = [*params, ("index", index), ("wait", f"{round(wait_s * 1000)}ms")]
    return await client.request("GET", path, query, timeout_s=wait_s * 17 / 16 + MARGIN_S)


async def _pause(failures: int) -> None:
    longest = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(failures, 16))
    await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only


def _tell(path: str, reason: str, failures: int) -> None:
    if failures == 1:
        log.warning("consul_watch_failed", path=path, reason=reason)
