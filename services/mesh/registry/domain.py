"""The Registry: instances with leases, and watches of their changes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol

from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_LABELS = 32
MAX_LABEL_LENGTH = 512
MAX_INSTANCES = 10_000
WAITS_META = "waits"
"""Meta key of what an instance waits for before it serves, and why."""
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def is_service_name(text: str) -> bool:
    """Whether a service can be called so."""
    return _NAME.fullmatch(text) is not None


class Health(StrEnum):
    """Whether an instance takes calls."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Instance:
    """One running server of a service.

    Attributes:
        id: Unique among all instances; stable across restarts of the same slot.
        service: Name, as in `xds:///<service>`.
        address: IP address that clients dial.
        port: TCP port.
        version: Version of the software.
        zone: Failure domain.
        weight: Share of traffic relative to the others, 1 to 1000.
        tags: Labels without a value.
        meta: Labels with a value.
        health: Whether it takes calls.
    """

    id: str
    service: str
    address: str
    port: int
    version: str = ""
    zone: str = "local"
    weight: int = 1
    tags: tuple[str, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)
    health: Health = Health.SERVING

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise InvalidArgumentError("must be 1 to 128 letters, digits, . _ : -", field="instance.id")
        if not _NAME.fullmatch(self.service):
            raise InvalidArgumentError("must be a DNS label of lower case", field="instance.service")
        try:
            ip_address(self.address)
        except ValueError as error:
            raise InvalidArgumentError("must be an IP address", field="instance.address") from error
        if not 1 <= self.port <= 65535:  # noqa: PLR2004 - TCP
            raise InvalidArgumentError("must be 1 to 65535", field="instance.port")
        if not 1 <= self.weight <= 1000:  # noqa: PLR2004 - stated in the proto
            raise InvalidArgumentError("must be 1 to 1000", field="instance.weight")
        if len(self.tags) > MAX_LABELS or len(self.meta) > MAX_LABELS:
            raise InvalidArgumentError(f"at most {MAX_LABELS} tags and meta entries", field="instance.meta")
        if any(len(text) > MAX_LABEL_LENGTH for text in (*self.tags, *self.meta, *self.meta.values())):
            raise InvalidArgumentError(f"at most {MAX_LABEL_LENGTH} characters each", field="instance.meta")


class Registry(Protocol):
    """Where services say that they run and learn where others do."""

    async def register(self, instance: Instance, *, lease_s: float) -> None:
        """Add an instance, or replace the one of the same id.

        Raises:
            ResourceExhaustedError: The registry is full.
        """
        ...

    async def keep_alive(self, instance_id: str, health: Health) -> None:
        """Renew the lease.

        Raises:
            NotFoundError: The lease ran out or was never taken.
        """
        ...

    async def deregister(self, instance_id: str) -> None:
        """Remove an instance; an unknown id is no error."""
        ...

    async def instances(self, service: str = "") -> list[Instance]:
        """The instances of a service, or all, sorted by service and id."""
        ...

    def watch(self, service: str = "") -> AsyncIterator[list[Instance]]:
        """The instances now and again after each change; changes in quick succession may be told as one."""
        ...


class Catalogue(Protocol):
    """All instances as the control plane follows them: a change costs what it changes, not what there is."""

    def changes(self) -> AsyncIterator[dict[str, list[Instance]]]:
        """The instances of every service, then again and again those of services that changed.

        An empty list: the service has none any more. Changes in quick succession may be told as one.
        """
        ...
