"""The embedded registry: leases in memory, the catalogue in a file so that a restart forgets nobody."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Self

import structlog

from services.mesh.registry.domain import MAX_INSTANCES, Health, Instance
from services.runtime.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger(__name__)

MIN_LEASE_S, MAX_LEASE_S = 0.1, 600.0
_STALL_S = 1.0
"""Expiry that comes this late was held up, and so were the renewals: everyone gets the time back."""


class LocalRegistry:
    """Registry for one machine; open it with `async with`, which runs the expiry of leases."""

    def __init__(self, file: Path) -> None:
        """Load the catalogue.

        Args:
            file: JSON file of the catalogue. Instances in it get one lease of grace: clients keep their
                endpoints over a restart of the control plane, and who died meanwhile is gone a lease later.
        """
        self._file = file
        self._instances: dict[str, Instance] = {}
        self._leases: dict[str, float] = {}
        self._expiry: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._shorter = asyncio.Event()  # a lease ends earlier than the expiry waits for
        self._next_end = float("inf")
        self._saved = True
        self._task: asyncio.Task[None] | None = None
        self._load()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._expire(), name="lease-expiry")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def register(self, instance: Instance, *, lease_s: float) -> None:
        """See Registry."""
        if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
            raise InvalidArgumentError(f"must be {MIN_LEASE_S:g} to {MAX_LEASE_S:g} s", field="lease")
        if instance.id not in self._instances and len(self._instances) >= MAX_INSTANCES:
            raise ResourceExhaustedError(
                f"the registry holds {MAX_INSTANCES} instances", reason="REGISTRY_FULL"
            )
        changed = self._instances.get(instance.id) != instance or self._leases.get(instance.id) != lease_s
        self._instances[instance.id] = instance
        self._leases[instance.id] = lease_s
        self._renew(instance.id)
        if changed:
            self._publish()
            log.info("registered", instance=instance.id, address=f"{instance.address}:{instance.port}")

    async def keep_alive(self, instance_id: str, health: Health) -> None:
        """See Registry."""
        instance = self._instances.get(instance_id)
        if instance is None:
            raise NotFoundError(f"no lease for {instance_id!r}", reason="LEASE_NOT_FOUND")
        self._renew(instance_id)
        if instance.health is not health:
            self._instances[instance_id] = replace(instance, health=health)
            self._publish()
            log.info("health_changed", instance=instance_id, health=health.value)

    async def deregister(self, instance_id: str) -> None:
        """See Registry."""
        if self._remove(instance_id):
            self._publish()
            log.info("deregistered", instance=instance_id)

    async def instances(self, service: str = "") -> list[Instance]:
        """See Registry."""
        return self._sorted(service)

    async def watch(self, service: str = "") -> AsyncIterator[list[Instance]]:
        """See Registry."""
        last: list[Instance] | None = None
        while True:
            changed = self._changed  # taken before the list: a change in between wakes the wait at once
            now = self._sorted(service)
            if now != last:
                last = now
                yield now
            await changed.wait()

    def _sorted(self, service: str) -> list[Instance]:
        found = (entry for entry in self._instances.values() if service in ("", entry.service))
        return sorted(found, key=lambda entry: (entry.service, entry.id))

    def _renew(self, instance_id: str) -> None:
        end = time.monotonic() + self._leases[instance_id]
        self._expiry[instance_id] = end
        if end < self._next_end:
            self._shorter.set()

    def _remove(self, instance_id: str) -> bool:
        self._leases.pop(instance_id, None)
        self._expiry.pop(instance_id, None)
        return self._instances.pop(instance_id, None) is not None

    def _publish(self) -> None:
        self._save()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _expire(self) -> None:
        while True:
            self._shorter.clear()
            self._next_end = min(self._expiry.values(), default=float("inf"))
            wait_s = None if not self._expiry else max(0.01, self._next_end - time.monotonic())
            try:
                await asyncio.wait_for(self._shorter.wait(), wait_s)
                continue
            except TimeoutError:
                self._end_leases()

    def _end_leases(self) -> None:
        now = time.monotonic()
        held_up_s = now - self._next_end
        if held_up_s > _STALL_S:
            # This process was stopped or starved, and the renewals of all wait in its sockets.
            log.warning("expiry_held_up", seconds=round(held_up_s, 1))
            for instance_id in self._expiry:
                self._renew(instance_id)
            return
        late = [instance_id for instance_id, end in self._expiry.items() if end <= now]
        for instance_id in late:
            self._remove(instance_id)
            log.warning("lease_expired", instance=instance_id)
        if late:
            self._publish()

    def _load(self) -> None:
        try:
            content = json.loads(self._file.read_text())
            for entry in content["instances"]:
                lease_s = float(entry.pop("lease_s"))
                entry["tags"] = tuple(entry["tags"])
                entry["health"] = Health(entry["health"])
                instance = Instance(**entry)
                self._instances[instance.id] = instance
                self._leases[instance.id] = lease_s
                self._renew(instance.id)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, InvalidArgumentError) as error:
            # The file is a cache of what the services will say again within a lease.
            log.warning("catalogue_unreadable", error=type(error).__name__)

    def _save(self) -> None:
        content = [
            {**asdict(instance), "lease_s": self._leases[instance.id]} for instance in self._sorted("")
        ]
        temporary = self._file.with_suffix(".tmp")
        # Not synced: after a loss of power nobody in it runs, and a damaged file is read as an empty one.
        try:
            temporary.write_text(json.dumps({"instances": content}))
            temporary.replace(self._file)
        except OSError as error:
            # A full disk must not take the mesh down: services register again after a restart in any case.
            if self._saved:
                log.exception("catalogue_not_saved", error=type(error).__name__)
            self._saved = False
            return
        self._saved = True
