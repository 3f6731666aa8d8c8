"""Intentions kept in Consul: read for one destination and followed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from services.mesh.consul.answers import listing, mapping
from services.mesh.consul.watch import changes
from services.mesh.intentions import UNJUDGED, WILDCARD, IntentionTable, ServiceIntentions
from services.runtime.errors import DataLossError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.mesh.consul.answers import Answer
    from services.mesh.consul.client import ConsulClient

KIND = "service-intentions"
_MATCH = "/v1/connect/intentions/match"
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


async def watch_all_intentions(client: ConsulClient) -> AsyncIterator[IntentionTable]:
    """The intentions of all services, now and after each change; for showing them, not for obeying them."""

    async def believe(answer: Answer) -> bool:
        table_of_entries(answer)
        return not answer.filtered

    async for answer in changes(client, f"/v1/config/{KIND}", believe=believe):
        yield table_of_entries(answer)
