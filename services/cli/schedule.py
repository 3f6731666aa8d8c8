"""Schedules over the REST API."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from services.cli.durations import seconds
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.cli.api import Api

STATES = ("active", "paused", "completed")
MISSED = ("skip", "once", "all")
PRIORITIES = ("low", "normal", "high", "critical")
_PREFIXES = ("SCHEDULE_STATE_", "MISSED_RUNS_", "RUN_STATE_")
_PAGE = 100


@dataclass(frozen=True, slots=True)
class When:
    """When to fire, as a person writes it; spans as `90s`, times as RFC 3339 or `+10m` from now."""

    cron: str = ""
    zone: str = ""
    at: str = ""
    every: str = ""
    anchor: str = ""
    jitter: str = ""
    start: str = ""
    end: str = ""
    max_firings: int = 0

    def fields(self) -> dict[str, Any]:
        """Fields of a schedule.

        Raises:
            InvalidArgumentError: Not one of cron, at and every, or a span or time that is none.
        """
        if sum(map(bool, (self.cron, self.at, self.every))) != 1:
            raise InvalidArgumentError("say when: one of --cron, --at and --every")
        given: dict[str, Any] = {}
        if self.cron:
            given["cron"] = {"expression": self.cron, "timeZone": self.zone}
        if self.at:
            given["at"] = moment(self.at)
        if self.every:
            given["every"] = {"interval": span(self.every)}
            if self.anchor:
                given["every"]["anchor"] = moment(self.anchor)
        if self.jitter:
            given["jitter"] = span(self.jitter)
        if self.start:
            given["startTime"] = moment(self.start)
        if self.end:
            given["endTime"] = moment(self.end)
        if self.max_firings:
            given["maxFirings"] = self.max_firings
        return given


def span(text: str) -> str:
    """A span as JSON has it: `900s` for `15m`."""
    return f"{seconds(text):.6f}".rstrip("0").rstrip(".") + "s"


def moment(text: str) -> str:
    """A time as JSON has it: RFC 3339 as it is, `+10m` from now.

    Raises:
        InvalidArgumentError: It is neither, or says no zone.
    """
    if text.startswith("+"):
        found = datetime.now(UTC) + timedelta(seconds=seconds(text[1:]))
    else:
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            found = datetime.min  # noqa: DTZ901 - refused below, having no zone
        if found.tzinfo is None:
            raise InvalidArgumentError(
                f"{text!r} is no time with a zone: write 2026-12-24T18:00:00+01:00, …Z, or +10m from now"
            )
    return found.astimezone(UTC).isoformat().replace("+00:00", "Z")


def message(
    data: str, attributes: Sequence[str], *, key: str, priority: str, ttl: str, correlation_id: str
) -> dict[str, Any]:
    """A message to publish; attributes are `key=value`.

    Raises:
        InvalidArgumentError: An attribute or the priority is none.
    """
    pairs = [attribute.partition("=") for attribute in attributes]
    if wrong := [attribute for attribute, pair in zip(attributes, pairs, strict=True) if not pair[1]]:
        raise InvalidArgumentError(f"--attribute {wrong[0]}: write KEY=VALUE")
    made: dict[str, Any] = {
        "data": base64.b64encode(data.encode()).decode(),
        "attributes": {name: value for name, _, value in pairs},
        "orderingKey": key,
        "correlationId": correlation_id,
    }
    if priority:
        made["priority"] = f"PRIORITY_{_one_of('priority', priority, PRIORITIES)}"
    if ttl:
        made["ttl"] = span(ttl)
    return made


def _one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise InvalidArgumentError(f"--{option}: must be one of {', '.join(allowed)}")
    return value.upper()


def short(value: str) -> str:
    """`paused` for `SCHEDULE_STATE_PAUSED`: enum values as people say them."""
    for prefix in _PREFIXES:
        if value.startswith(prefix):
            return value.removeprefix(prefix).lower()
    return value


class Schedules:
    """Calls of ScheduleService."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(self, schedule: dict[str, Any], missed: str, request_id: str) -> dict[str, Any]:
        """Create a schedule."""
        if missed:
            schedule = schedule | {"missedRuns": f"MISSED_RUNS_{_one_of('missed', missed, MISSED)}"}
        query = f"?{urlencode({'requestId': request_id})}" if request_id else ""
        return self._api.call("POST", f"/v1/schedules{query}", schedule)

    def get(self, name: str) -> dict[str, Any]:
        """A schedule."""
        return self._api.call("GET", _path(name))

    def listed(self, topic: str, only: str, limit: int) -> list[dict[str, Any]]:
        """The first schedules by name."""
        query: dict[str, Any] = {"topic": topic}
        if only:
            query["state"] = f"SCHEDULE_STATE_{_one_of('only', only, STATES)}"
        return self._pages("/v1/schedules", "schedules", query, limit)

    def runs(self, name: str, limit: int) -> list[dict[str, Any]]:
        """The newest runs of a schedule."""
        return self._pages(f"{_path(name)}/runs", "runs", {}, limit)

    def act(self, name: str, what: str) -> dict[str, Any]:
        """Pause, resume or run a schedule."""
        return self._api.call("POST", f"{_path(name)}:{what}", {})

    def delete(self, name: str) -> None:
        """Delete a schedule."""
        self._api.call("DELETE", _path(name))

    def preview(self, schedule: dict[str, Any], count: int) -> list[str]:
        """The next times of a definition."""
        answer = self._api.call("POST", "/v1/schedules:preview", {"schedule": schedule, "count": count})
        times: list[str] = answer.get("fireTimes", [])
        return times

    def _pages(self, path: str, items: str, query: dict[str, Any], limit: int) -> list[dict[str, Any]]:
        found = zip(self._all(path, items, query, min(limit, _PAGE)), range(limit), strict=False)
        return [each for each, _ in found]

    def _all(self, path: str, items: str, query: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            asked = urlencode(query | {"pageSize": size, "pageToken": token})
            answer = self._api.call("GET", f"{path}?{asked}")
            yield from answer.get(items, [])
            token = answer.get("nextPageToken", "")
            if not token:
                return


def _path(name: str) -> str:
    return f"/v1/schedules/{quote(name, safe='')}"
