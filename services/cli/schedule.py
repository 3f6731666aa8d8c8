"""Schedules over the REST API."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from services.cli.durations import seconds
from services.cli.options import PRIORITIES, one_of
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.cli.api import Api

STATES = ("active", "paused", "completed")
MISSED = ("skip", "once", "all")
_PREFIXES = ("SCHEDULE_STATE_", "MISSED_RUNS_", "RUN_STATE_")
NONE = "none"
"""What takes a bound away."""
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
    max_firings: int | None = None

    def fields(self) -> dict[str, Any]:
        """Fields of a schedule.

        Raises:
            InvalidArgumentError: Not one of cron, at and every, or a span or time that is none.
        """
        if sum(map(bool, (self.cron, self.at, self.every))) != 1:
            raise InvalidArgumentError("say when: one of --cron, --at and --every")
        return self.changes()

    def changes(self) -> dict[str, Any]:
        """Fields of a schedule that are given; null for a bound that is taken away.

        Raises:
            InvalidArgumentError: Two of cron, at and every, or a span or time that is none.
        """
        given: dict[str, Any] = {
            "cron": _set(expression=self.cron, timeZone=self.zone),
            "at": moment(self.at) if self.at else "",
            "every": _set(
                interval=span(self.every) if self.every else "",
                anchor=moment(self.anchor) if self.anchor else "",
            ),
        }
        if sum(map(bool, given.values())) > 1:
            raise InvalidArgumentError(
                "say when in one way: --cron, --at or --every, with what belongs to it"
            )
        given |= {"jitter": span(self.jitter) if self.jitter else "", "maxFirings": self.max_firings}
        given = _set(**given)
        for name, text in (("startTime", self.start), ("endTime", self.end)):
            if text:
                given[name] = None if text == NONE else moment(text)
        return given


def _set(**fields: Any) -> dict[str, Any]:
    """The fields that say something."""
    return {name: value for name, value in fields.items() if value not in ("", {}, None)}


def paths(changes: dict[str, Any]) -> list[str]:
    """A field mask that names what changes: parts of a cron expression, an interval and a message alone."""
    found = []
    for name, value in changes.items():
        found += [f"{name}.{part}" for part in value] if isinstance(value, dict) else [name]
    return found


def span(text: str) -> str:
    """A span as JSON has it: `900s` for `15m`."""
    return f"{seconds(text):.6f}".rstrip("0").rstrip(".") + "s"


def moment(text: str) -> str:
    """A time as JSON has it: RFC 3339 as it is, `+10m` or `-10m` from now.

    Raises:
        InvalidArgumentError: It is neither, or says no zone.
    """
    if text[:1] in {"+", "-"}:
        found = datetime.now(UTC) + timedelta(seconds=float(f"{text[0]}{seconds(text[1:])}"))
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
    data: str | None, attributes: Sequence[str], *, key: str, priority: str, ttl: str, correlation_id: str
) -> dict[str, Any]:
    """What is given of a message to publish; attributes are `key=value`.

    Raises:
        InvalidArgumentError: An attribute or the priority is none.
    """
    pairs = [attribute.partition("=") for attribute in attributes]
    if wrong := [attribute for attribute, pair in zip(attributes, pairs, strict=True) if not pair[1]]:
        raise InvalidArgumentError(f"--attribute {wrong[0]}: write KEY=VALUE")
    made = _set(
        attributes={name: value for name, _, value in pairs},
        orderingKey=key,
        correlationId=correlation_id,
        priority=f"PRIORITY_{one_of('priority', priority, PRIORITIES)}" if priority else "",
        ttl=span(ttl) if ttl else "",
    )
    if data is not None:
        made["data"] = base64.b64encode(data.encode()).decode()
    return made


def missed_runs(policy: str) -> str:
    """The policy for missed firings as JSON has it.

    Raises:
        InvalidArgumentError: It is none.
    """
    return f"MISSED_RUNS_{one_of('missed', policy, MISSED)}"


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

    def create(self, schedule: dict[str, Any], request_id: str) -> dict[str, Any]:
        """Create a schedule."""
        query = f"?{urlencode({'requestId': request_id})}" if request_id else ""
        return self._api.call("POST", f"/v1/schedules{query}", schedule)

    def update(self, name: str, changes: dict[str, Any], request_id: str) -> dict[str, Any]:
        """Change what is named, and nothing else.

        Raises:
            InvalidArgumentError: Nothing is named.
        """
        if not changes:
            raise InvalidArgumentError("say what changes: `plexus schedule update --help` lists it")
        query = _set(updateMask=",".join(paths(changes)), requestId=request_id)
        return self._api.call("PATCH", f"{_path(name)}?{urlencode(query)}", changes)

    def get(self, name: str) -> dict[str, Any]:
        """A schedule."""
        return self._api.call("GET", _path(name))

    def listed(self, topic: str, only: str, limit: int) -> list[dict[str, Any]]:
        """The first schedules by name."""
        query: dict[str, Any] = {"topic": topic}
        if only:
            query["state"] = f"SCHEDULE_STATE_{one_of('only', only, STATES)}"
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
