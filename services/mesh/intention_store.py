"""Where intentions are kept, and their text: what is compared, shown and written, wherever that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from services.mesh.intentions import WILDCARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from services.mesh.intentions import IntentionTable
    from services.mesh.policy.domain import Document

KIND = "service-intentions"
_FIRST = ("Kind", "Name", "Action", "Permissions", "HTTP")
_KEPT_BY_CONSUL = frozenset(
    {
        *("CreateIndex", "ModifyIndex", "Hash", "Precedence", "Type", "Namespace", "Partition"),
        *("LegacyID", "LegacyMeta", "LegacyCreateTime", "LegacyUpdateTime"),
    }
)


@dataclass(frozen=True, slots=True)
class Kept:
    """The intentions of one destination, as they are kept.

    Attributes:
        destination: Whose callers they are about; `*` for any, empty if only a refused text could say.
        origin: A file, or a key of Consul's configuration.
        text: YAML in force; empty if there never was one that is valid.
        refusal: Why a newer text is not in force, a problem a line.
        removable: Whether the store can remove it; what the user's own folder holds is the user's.
    """

    destination: str
    origin: str
    text: str
    refusal: str = ""
    removable: bool = True


class IntentionStore(Protocol):
    """Intentions of all services, for those who show and change them."""

    def table(self) -> IntentionTable:
        """The rules, as `watch` last saw them."""
        ...

    def kept(self) -> list[Kept]:
        """The texts, as `watch` last saw them, by destination and origin."""
        ...

    def watch(self) -> AsyncIterator[IntentionTable]:
        """The rules now and after each change."""
        ...

    async def write(self, documents: Mapping[str, Document], *, remove: frozenset[str] = frozenset()) -> None:
        """Put valid texts in force, and take others out of it.

        Args:
            documents: By destination.
            remove: Destinations; one that has none is no error.

        Raises:
            AbortedError: Somebody else changed one of them at the same time.
            FailedPreconditionError: The store cannot be written, or the destination takes no such rules.
            PermissionDeniedError: Consul gives the control plane no right to write.
        """
        ...


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without what means nothing: empty values, order of keys and of sources, Consul's own notes."""
    entry: dict[str, Any] = _plain(dict(data))
    entry["Sources"] = sorted(entry.get("Sources", []), key=_by_name)
    return entry


def _by_name(source: Mapping[str, Any]) -> tuple[bool, str]:
    name = str(source.get("Name", ""))
    return name == WILDCARD, name


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    order = [*(key for key in _FIRST if key in value), *sorted(value.keys() - set(_FIRST))]
    kept = {key: _plain(value[key]) for key in order if key not in _KEPT_BY_CONSUL}
    return {key: content for key, content in kept.items() if content not in ("", None, [], {}, False)}


def rendered(data: Mapping[str, Any]) -> str:
    """An entry as YAML, always the same for the same rules."""
    text: str = yaml.safe_dump(plain(data), sort_keys=False, width=100)
    return text


def compared(text: str) -> str:
    """A text in the form in which two are compared: what is valid as `rendered`, else as it is."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return rendered(data) if isinstance(data, dict) and isinstance(data.get("Sources", []), list) else text
