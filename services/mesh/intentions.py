"""Intentions: which service may call which, in Consul's shape and precedence; default deny."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from services.runtime.access import Decision
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["UNJUDGED", "Decision", "IntentionAuthorizer", "IntentionTable", "ServiceIntentions", "Source"]

WILDCARD = "*"
UNJUDGED = "has a condition that is not judged here"
"""Description of a source whose condition was not understood; it denies."""
AT_FAULT = "intentions at fault"
"""What a denial names when it is not known which rules hold."""
RPC_METHOD = "POST"
"""The HTTP method of every gRPC call."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpMatch(_Model):
    """Condition on a call: at most one on its path `/package.Service/Method`, and on the HTTP method.

    Conditions on headers are known and not judged here: with them a permission that allows never matches, and
    one that denies matches whatever the headers are.
    """

    PathExact: str | None = None
    PathPrefix: str | None = None
    PathRegex: str | None = None
    Methods: tuple[str, ...] = ()
    Header: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _some(self) -> HttpMatch:
        paths = sum(value is not None for value in (self.PathExact, self.PathPrefix, self.PathRegex))
        if paths > 1 or not (paths or self.Methods or self.Header):
            raise ValueError("needs one of PathExact, PathPrefix, PathRegex, or Methods")
        if self.PathRegex is not None:
            try:
                re.compile(self.PathRegex)
            except re.error as error:
                raise ValueError(f"PathRegex: {error}") from error
        return self

    def matches(self, path: str) -> bool:
        """Tell whether path and method meet the conditions; a regex must match all of it, as in Consul."""
        if self.Methods and RPC_METHOD not in self.Methods:
            return False
        if self.PathExact is not None:
            return path == self.PathExact
        if self.PathPrefix is not None:
            return path.startswith(self.PathPrefix)
        return self.PathRegex is None or re.fullmatch(self.PathRegex, path) is not None


class Permission(_Model):
    """One L7 rule; the first that matches decides."""

    Action: Literal["allow", "deny"]
    HTTP: HttpMatch

    def decides(self, path: str) -> bool:
        """Tell whether this permission is the one for a call; what cannot be judged never opens."""
        if self.HTTP.Header and self.Action == "allow":
            return False
        return self.HTTP.matches(path)


class Source(_Model):
    """A caller (`*` for any) and what it may do: everything by Action, or the first matching Permission."""

    Name: str
    Action: Literal["allow", "deny"] | None = None
    Permissions: tuple[Permission, ...] = ()
    Description: str = ""

    @model_validator(mode="after")
    def _either(self) -> Source:
        if (self.Action is None) == (not self.Permissions):
            raise ValueError("needs either Action or Permissions")
        return self


class ServiceIntentions(_Model):
    """All intentions of one destination (`*` for any)."""

    Kind: Literal["service-intentions"]
    Name: str
    Sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class IntentionTable:
    """All intentions, ready to be asked.

    Attributes:
        by_destination: The rule for each source.
        closed: Why it is not known what holds for a destination, of which everything is denied then; under
            `*` for all of them.
    """

    by_destination: dict[str, dict[str, Source]] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, entries: Iterable[ServiceIntentions], *, closed: Mapping[str, str] | None = None
    ) -> IntentionTable:
        """Index entries.

        Args:
            entries: One for each destination.
            closed: As the attribute.

        Raises:
            InvalidArgumentError: Two entries for one destination, or two rules for one source.
        """
        table: dict[str, dict[str, Source]] = {}
        for entry in entries:
            if entry.Name in table:
                raise InvalidArgumentError(f"two service-intentions for {entry.Name!r}")
            sources = {source.Name: source for source in entry.Sources}
            if len(sources) != len(entry.Sources):
                raise InvalidArgumentError(f"service-intentions for {entry.Name!r} name a source twice")
            table[entry.Name] = sources
        return cls(table, dict(closed or {}))

    def fault(self, destination: str) -> str:
        """Why everything is denied to a service's callers, a problem a line; empty if it is not."""
        return "\n".join(self.closed[to] for to in (destination, WILDCARD) if to in self.closed)

    def unjudged(self) -> list[str]:
        """The rules with a condition that is not judged here, on headers or tokens; these never open."""
        return [
            f"{by} -> {to}"
            for to, sources in sorted(self.by_destination.items())
            for by, rule in sorted(sources.items())
            if rule.Description == UNJUDGED or any(permission.HTTP.Header for permission in rule.Permissions)
        ]

    def decide(self, source: str, destination: str, path: str) -> Decision:
        """Apply Consul's precedence: exact pair, any source, any destination, any pair; then deny."""
        if self.fault(destination):
            return Decision(allowed=False, rule=AT_FAULT)
        for to, by in (
            (destination, source),
            (destination, WILDCARD),
            (WILDCARD, source),
            (WILDCARD, WILDCARD),
        ):
            rule = self.by_destination.get(to, {}).get(by)
            if rule is None:
                continue
            name = f"{by} -> {to}"
            if rule.Action is not None:
                return Decision(rule.Action == "allow", name)
            for number, permission in enumerate(rule.Permissions):
                if permission.decides(path):
                    return Decision(permission.Action == "allow", f"{name} [{number}]")
            return Decision(allowed=False, rule=f"{name} (no permission matches)")
        return Decision(allowed=False, rule="default deny")


class IntentionAuthorizer:
    """Answers for one destination, from a table that can be replaced at any time; answers are remembered."""

    _REMEMBERED = 4096

    def __init__(self, table: IntentionTable, *, destination: str) -> None:
        """Answer from a table.

        Args:
            table: The intentions; an empty one denies everything.
            destination: The service that asks.
        """
        self._table = table
        self._destination = destination
        self._answers: dict[tuple[str, str], Decision] = {}

    def replace(self, table: IntentionTable) -> None:
        """Answer from another table from now on."""
        self._table = table
        self._answers = {}

    def decide(self, source: str, path: str) -> Decision:
        """Tell whether `source` may call `path` of this service, and by which rule."""
        answer = self._answers.get((source, path))
        if answer is None:
            answer = self._table.decide(source, self._destination, path)
            # Paths are the server's own methods or refused before; the bound guards against surprises.
            if len(self._answers) < self._REMEMBERED:
                self._answers[(source, path)] = answer
        return answer
