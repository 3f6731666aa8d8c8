"""Intentions kept in Consul: followed for one destination, shown and changed for all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml
from pydantic import ValidationError

from services.mesh.consul.answers import listing, mapping
from services.mesh.consul.watch import changes
from services.mesh.intention_store import KIND, Kept, plain, rendered
from services.mesh.intentions import UNJUDGED, WILDCARD, IntentionTable, ServiceIntentions
from services.runtime.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.mesh.consul.answers import Answer
    from services.mesh.consul.client import ConsulClient
    from services.mesh.policy.domain import Document

_MATCH = "/v1/connect/intentions/match"
_ALL = f"/v1/config/{KIND}"
PROTOCOL = "grpc"
"""Of every service: Consul takes rules on paths only for services that speak HTTP."""
_WITH_PATHS = ("grpc", "http", "http2")
_LOCAL_NAMESPACES = {"", "default"}
_DENY = "deny"
_KNOWN = {"PathExact", "PathPrefix", "PathRegex", "Methods", "Header"}


def table_of(answer: Answer, destination: str) -> IntentionTable:
    """The intentions for one destination in a match answer.

    Raises:
        DataLossError: The answer has not Consul's shape.
    """
    found = listing(mapping(answer.json(), "intentions").get(destination), "intentions")
    table: dict[str, dict[str, Any]] = {}
    for item in found:
        rule = mapping(item, "intention")
        if rule.get("SourcePeer") or rule.get("SourceSamenessGroup"):
            continue  # another cluster's services do not present identities of this trust domain
        if rule.get("SourceNS", "") not in _LOCAL_NAMESPACES:
            continue
        try:
            to, by = rule["DestinationName"], rule["SourceName"]
            if to not in {destination, WILDCARD}:
                raise ValueError(f"an intention for {to}")
            table.setdefault(to, {})[by] = _source(by, rule)
        except (KeyError, TypeError, ValueError) as error:
            raise DataLossError("Consul's intention is malformed", reason="CONSUL_ANSWER_INVALID") from error
    return _table(table)


def _table(sources: Mapping[str, Mapping[str, Any]]) -> IntentionTable:
    """The table of sources by destination and name."""
    entries = [{"Kind": KIND, "Name": to, "Sources": list(by.values())} for to, by in sources.items() if by]
    try:
        return IntentionTable.of(ServiceIntentions.model_validate(entry) for entry in entries)
    except (ValidationError, InvalidArgumentError) as error:
        raise DataLossError("Consul's intention is malformed", reason="CONSUL_ANSWER_INVALID") from error


def table_of_entries(answer: Answer) -> IntentionTable:
    """All intentions in a list of configuration entries.

    Raises:
        DataLossError: The answer has not Consul's shape.
    """
    table: dict[str, dict[str, Any]] = {}
    for item in listing(answer.json(), "intentions"):
        entry = mapping(item, "intentions")
        try:
            table[entry["Name"]] = {
                source["Name"]: _source(source["Name"], source)
                for source in entry["Sources"]
                if not source.get("Peer") and not source.get("SamenessGroup")
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataLossError("Consul's intention is malformed", reason="CONSUL_ANSWER_INVALID") from error
    return _table(table)


def _source(name: str, rule: Any) -> dict[str, Any]:
    permissions = rule.get("Permissions") or ()
    source: dict[str, Any] = {"Name": name}
    if not permissions and not rule.get("JWT"):
        return source | {"Action": rule["Action"]}
    if rule.get("JWT"):
        # A demand for an end user's token is not judged here; so this rule allows nothing.
        return source | {"Action": _DENY, "Description": UNJUDGED}
    return source | {"Permissions": [_permission(permission) for permission in permissions]}


def _permission(permission: Any) -> dict[str, Any]:
    http = permission.get("HTTP") or {}
    kept = {key: http[key] for key in _KNOWN if http.get(key)}
    if permission.get("JWT") or http.keys() - _KNOWN or not _compiles(kept.get("PathRegex", "")):
        # A condition that is not understood here: kept as one that is never judged, and so never opens.
        kept.pop("PathRegex", None)
        kept["Header"] = [{"Name": "unknown"}]
    return {"Action": permission["Action"], "HTTP": kept}


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False  # Consul's expressions are not quite Python's
    return True


async def watch_intentions(client: ConsulClient, destination: str) -> AsyncIterator[IntentionTable]:
    """The intentions for a service, now and after each change.

    Consul refuses this read to a token without the right, so an empty answer means that there are none. While
    Consul does not answer, or with an answer that cannot be understood, nothing is told: the rules hold.
    """

    async def believe(answer: Answer) -> bool:
        table_of(answer, destination)
        return True

    query = (("by", "destination"), ("name", destination))
    async for answer in changes(client, _MATCH, *query, believe=believe):
        yield table_of(answer, destination)


class ConsulIntentions:
    """The intentions of all services, in Consul's configuration: to be shown and changed, not obeyed."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._table = IntentionTable()
        self._kept: list[Kept] = []

    def table(self) -> IntentionTable:
        """See IntentionStore."""
        return self._table

    def kept(self) -> list[Kept]:
        """See IntentionStore; what Consul has is valid."""
        return self._kept

    async def watch(self) -> AsyncIterator[IntentionTable]:
        """See IntentionStore; while Consul does not answer nothing is told, and the rules hold."""

        async def believe(answer: Answer) -> bool:
            table_of_entries(answer)
            return not answer.filtered

        async for answer in changes(self._client, _ALL, believe=believe):
            self._take(answer)
            yield self._table

    def _take(self, answer: Answer) -> None:
        self._table = table_of_entries(answer)
        self._kept = [
            Kept(destination=name, origin=f"{KIND}/{name}", text=rendered(entry))
            for name, entry in sorted(_entries(answer).items())
        ]

    async def write(self, documents: Mapping[str, Document], *, remove: frozenset[str] = frozenset()) -> None:
        """See IntentionStore; each entry is compared and set, one after the other."""
        present = _entries(await self._read())
        done: list[str] = []
        try:
            for name, document in sorted(documents.items()):
                wanted = plain(yaml.safe_load(document.text))
                index = 0
                if name in present:
                    index = int(present[name]["ModifyIndex"])
                    if plain(present[name]) == wanted:
                        continue
                await self._set(name, wanted, index)
                done.append(name)
            for name in sorted(remove & present.keys()):
                index = int(present[name]["ModifyIndex"])
                _taken(name, await self._client.api.config.delete(KIND, name, cas=index))
                done.append(name)
        except PermissionDeniedError as error:
            raise PermissionDeniedError(
                f'the control plane\'s token may not write intentions (intentions = "write"){_after(done)}',
                reason=error.reason,
            ) from error
        except AbortedError as error:
            raise AbortedError(f"{error.message}{_after(done)}", reason=error.reason) from error
        finally:
            # Not left to the watch: whoever changed a rule finds it changed.
            self._take(await self._read())

    async def _read(self) -> Answer:
        return await self._client.request("GET", _ALL, [("consistent", "true")])

    async def _set(self, name: str, entry: Mapping[str, Any], index: int) -> None:
        config = self._client.api.config
        if name != WILDCARD:  # which is no service
            protocol = await self._protocol(name)
            if any("Permissions" in source for source in entry["Sources"]) and protocol not in _WITH_PATHS:
                raise FailedPreconditionError(
                    f"{name} speaks {protocol}, says Consul, and rules on paths are for "
                    f"{', '.join(_WITH_PATHS)}: change Protocol in its service-defaults",
                    reason="CONSUL_PROTOCOL",
                )
        _taken(name, await config.set(KIND, name, {"Sources": entry["Sources"]}, cas=index))

    async def _protocol(self, name: str) -> str:
        """What Consul takes a service to speak; the mesh's, if it knows nothing of it yet."""
        try:
            known = await self._client.get(f"/v1/config/service-defaults/{quote(name, safe='')}")
        except NotFoundError:
            await self._client.api.config.set("service-defaults", name, {"Protocol": PROTOCOL}, cas=0)
            return PROTOCOL
        return str(mapping(known, "service-defaults").get("Protocol") or "tcp")


def _taken(name: str, answer: object) -> None:
    if answer is not True:
        raise AbortedError(
            f"the intentions of {name!r} were changed meanwhile: look at `plexus mesh diff` and try again",
            reason="INTENTIONS_CHANGED",
        )


def _after(done: list[str]) -> str:
    return f"; done before that: {', '.join(done)}" if done else ""


def _entries(answer: Answer) -> dict[str, dict[str, Any]]:
    """The configuration entries, by destination."""
    found = (dict(mapping(item, "intentions")) for item in listing(answer.json(), "intentions"))
    return {str(entry["Name"]): entry for entry in found if entry.get("Name")}
