"""Intentions: which service may call which, in Consul's shape and precedence; default deny."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WILDCARD = "*"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpMatch(_Model):
    """Condition on the RPC path `/package.Service/Method`; exactly one of the three."""

    PathExact: str | None = None
    PathPrefix: str | None = None
    PathRegex: str | None = None

    @model_validator(mode="after")
    def _one(self) -> HttpMatch:
        if sum(value is not None for value in (self.PathExact, self.PathPrefix, self.PathRegex)) != 1:
            raise ValueError("needs exactly one of PathExact, PathPrefix, PathRegex")
        return self

    def matches(self, path: str) -> bool:
        """Tell whether the path meets the condition; a regex must match the whole path, as in Consul."""
        if self.PathExact is not None:
            return path == self.PathExact
        if self.PathPrefix is not None:
            return path.startswith(self.PathPrefix)
        return re.fullmatch(self.PathRegex or "", path) is not None


class Permission(_Model):
    """One L7 rule; the first that matches decides."""

    Action: Literal["allow", "deny"]
    HTTP: HttpMatch


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
class Decision:
    """The answer for one call and the rule it came from, for the audit log."""

    allowed: bool
    rule: str


@dataclass(frozen=True, slots=True)
class IntentionTable:
    """All intentions, ready to be asked."""

    by_destination: dict[str, dict[str, Source]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[ServiceIntentions]) -> IntentionTable:
        """Index entries.

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
        return cls(table)

    def decide(self, source: str, destination: str, path: str) -> Decision:
        """Apply Consul's precedence: exact pair, any source, any destination, any pair; then deny."""
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
                if permission.HTTP.matches(path):
                    return Decision(permission.Action == "allow", f"{name} [{number}]")
            return Decision(allowed=False, rule=f"{name} (no permission matches)")
        return Decision(allowed=False, rule="default deny")


def load(folder: Path) -> IntentionTable:
    """Read every *.yaml of a folder.

    Raises:
        InvalidArgumentError: A file is not a valid service-intentions entry; the text names file and field.
    """
    entries = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            entries.append(ServiceIntentions.model_validate(yaml.safe_load(path.read_text())))
        except (ValidationError, yaml.YAMLError) as error:
            raise InvalidArgumentError(f"{path}: {error}", reason="INTENTIONS_INVALID") from error
    return IntentionTable.of(entries)


class IntentionAuthorizer:
    """Answers for one destination, from a table that is read once; answers are remembered."""

    _REMEMBERED = 4096

    def __init__(self, folder: Path, *, destination: str) -> None:
        """Load the intentions.

        Args:
            folder: Folder of service-intentions files.
            destination: The service that asks.
        """
        self._table = load(folder)
        self._destination = destination
        self._answers: dict[tuple[str, str], bool] = {}

    def allows(self, source: str, path: str) -> bool:
        """Tell whether `source` may call `path` of this service."""
        answer = self._answers.get((source, path))
        if answer is None:
            answer = self._table.decide(source, self._destination, path).allowed
            # Paths are the server's own methods or refused before; the bound guards against surprises.
            if len(self._answers) < self._REMEMBERED:
                self._answers[(source, path)] = answer
        return answer
