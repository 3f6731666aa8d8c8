"""Topics, subscriptions, messages and dead letters, over the REST API of the queueing service."""

from __future__ import annotations

import base64
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from services.runtime.errors import InvalidArgumentError, PlexusError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from services.cli.api import Api

_PAGE = 1000
_WAIT_S = 10
HIDDEN = "plexus-reply."
"""Of the topics and subscriptions that carry replies: of no interest to people."""


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def pairs(given: Sequence[str], what: str) -> dict[str, str]:
    """Read KEY=VALUE options.

    Raises:
        InvalidArgumentError: One of them is none.
    """
    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise InvalidArgumentError(f"{each!r} is not KEY=VALUE, for {what}")
        found[key] = value
    return found


def span(seconds: float) -> str:
    """A duration in proto's JSON."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def readable(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the API with its content as text; content that is none stays base64, as `dataBase64`."""
    shown = dict(message)
    data = base64.b64decode(shown.pop("data", ""))
    try:
        shown["data"] = data.decode()
    except UnicodeDecodeError:
        shown["dataBase64"] = base64.b64encode(data).decode()
    return shown


class Queues:
    """The service. All names of the wire are in this module."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def _pages(
        self, path: str, field: str, query: dict[str, str], limit: int = 0
    ) -> Iterator[dict[str, Any]]:
        token, found = "", 0
        while True:
            asked = {**query, "pageSize": str(min(limit - found, _PAGE) if limit else _PAGE)}
            asked |= {"pageToken": token} if token else {}
            text = "&".join(f"{key}={quote(value, safe='')}" for key, value in asked.items())
            answer = self._api.call("GET", f"{path}?{text}")
            page = answer.get(field, [])
            yield from page
            found += len(page)
            token = answer.get("nextPageToken", "")
            if not token or (limit and found >= limit):
                return

    # Topics and subscriptions.

    def topics(self) -> list[dict[str, Any]]:
        """Topics by name."""
        return [each for each in self._pages(_path("topics"), "topics", {}) if not _hidden(each)]

    def create_topic(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Make a topic."""
        return self._api.call("POST", _path("topics"), {"topic": name, "settings": settings})

    def delete_topic(self, name: str) -> None:
        """Delete a topic."""
        self._api.call("DELETE", _path("topics", name))

    def subscriptions(self, topic: str = "") -> list[dict[str, Any]]:
        """Subscriptions by name, of one topic if given."""
        query = {"topic": topic} if topic else {}
        found = self._pages(_path("subscriptions"), "subscriptions", query)
        return [each for each in found if not _hidden(each)]

    def create_subscription(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Make a subscription."""
        return self._api.call("POST", _path("subscriptions"), settings)

    def delete_subscription(self, name: str) -> None:
        """Delete a subscription with what it holds."""
        self._api.call("DELETE", _path("subscriptions", name))

    def seek(self, subscription: str, target: dict[str, str]) -> None:
        """Set it to a time, a sequence number or a snapshot."""
        self._api.call("POST", _path("subscriptions", subscription) + ":seek", target)

    def stats(self, subscription: str) -> dict[str, Any]:
        """Counts as numbers, and when the oldest message was published."""
        answer = self._api.call("GET", _path("subscriptions", subscription, "stats"))
        counts = {name: int(answer.get(name, 0)) for name in ("ready", "leased", "delayed", "dead")}
        if int(answer.get("unexamined", 0)):
            counts["unexamined"] = int(answer["unexamined"])
        if unexamined := int(answer.get("unexamined", 0)):
            counts["unexamined"] = unexamined
        return counts | {key: answer[key] for key in ("oldestTime",) if key in answer}

    # Messages.

    def publish(self, topic: str, messages: Sequence[dict[str, Any]]) -> list[str]:
        """Publish messages; their ids."""
        answer = self._api.call("POST", _path("topics", topic) + ":publish", {"messages": list(messages)})
        return list(answer.get("messageIds", []))

    def pull(self, subscription: str, count: int, wait_s: float = 0) -> list[dict[str, Any]]:
        """Lease messages."""
        body = {"maxMessages": count, "wait": span(wait_s)}
        answer = self._api.call("POST", _path("subscriptions", subscription) + ":pull", body)
        return list(answer.get("deliveries", []))

    def acknowledge(self, subscription: str, deliveries: Sequence[dict[str, Any]]) -> None:
        """Be done with messages."""
        if deliveries:
            body = {"ackIds": [each["ackId"] for each in deliveries]}
            self._api.call("POST", _path("subscriptions", subscription) + ":acknowledge", body)

    def give_back(self, subscription: str, deliveries: Sequence[dict[str, Any]]) -> None:
        """Return messages at once, without a failed attempt."""
        if deliveries:
            body = {"extensions": [{"ackId": each["ackId"], "deadline": "0s"} for each in deliveries]}
            self._api.call("POST", _path("subscriptions", subscription) + ":modifyAckDeadline", body)

    @contextmanager
    def leased(self, subscription: str, count: int, wait_s: float = 0) -> Iterator[list[dict[str, Any]]]:
        """Messages that are given back at the end, whatever happens."""
        deliveries = self.pull(subscription, count, wait_s)
        try:
            yield deliveries
        finally:
            self.give_back(subscription, deliveries)

    def tail(self, topic: str, condition: str = "") -> Generator[dict[str, Any]]:
        """What is published from now on, through a subscription that is deleted at the end.

        The first is empty: it says that the subscription is there.
        """
        name = f"tail-{secrets.token_hex(6)}"
        settings = {"name": name, "topic": topic, "filter": condition, "ttl": "600s"}
        self.create_subscription(settings | {"labels": {"plexus-temporary": "tail"}})
        try:
            yield {}
            while True:
                deliveries = self.pull(name, 100, _WAIT_S)
                self.acknowledge(name, deliveries)
                yield from deliveries
        finally:
            self.delete_subscription(name)

    # Dead letters.

    def dead_letters(self, subscription: str, limit: int, where: dict[str, str]) -> list[dict[str, Any]]:
        """Dead letters, oldest first."""
        query = {f"filter.{key}": value for key, value in where.items()}
        path = _path("subscriptions", subscription, "deadLetters")
        return list(self._pages(path, "deadLetters", query, limit))

    def dead_letter(self, subscription: str, identifier: str) -> dict[str, Any]:
        """One dead letter."""
        return self._api.call("GET", _path("subscriptions", subscription, "deadLetters", identifier))

    def dead_letter_stats(self, subscription: str) -> dict[str, Any]:
        """How many there are, when the first and the last died, and how many have which reason."""
        answer = self._api.call("GET", _path("subscriptions", subscription, "deadLetterStats"))
        reasons = {reason: int(count) for reason, count in answer.get("reasons", {}).items()}
        times: dict[str, Any] = {key: answer[key] for key in ("oldestTime", "newestTime") if key in answer}
        return {"total": int(answer.get("total", 0)), **times, "reasons": reasons}

    def redrive(self, subscription: str, chosen: dict[str, Any], topic: str, per_second: float) -> int:
        """Deliver dead letters again; how many."""
        body = chosen | {"topic": topic, "maxPerSecond": per_second}
        path = _path("subscriptions", subscription, "deadLetters") + ":redrive"
        return int(self._api.call("POST", path, body).get("redriven", 0))

    def purge(self, subscription: str, chosen: dict[str, Any]) -> int:
        """Delete dead letters; how many."""
        path = _path("subscriptions", subscription, "deadLetters") + ":purge"
        return int(self._api.call("POST", path, chosen).get("purged", 0))


def _hidden(each: dict[str, Any]) -> bool:
    return str(each.get("name", "")).startswith(HIDDEN)


def overview(queues: Queues, topic: str = "") -> list[dict[str, Any]]:
    """Subscriptions with their counts."""
    rows = []
    for each in queues.subscriptions(topic):
        try:
            rows.append({"subscription": each["name"], "topic": each["topic"], **queues.stats(each["name"])})
        except PlexusError as error:
            if error.reason != "SUBSCRIPTION_NOT_FOUND":  # deleted meanwhile
                raise
    return rows
