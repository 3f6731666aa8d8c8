"""The embedded registry: leases in memory, the catalogue in a file so that a restart forgets nobody."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import replace
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
_SAVING_SHARE = 0.05
"""Share of the time that may go into writing the catalogue: a large one is written less often."""


class _Watch:
    """What one watcher has not been told yet."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.dirty: set[str] = set()
        self.changed = asyncio.Event()

    def tell(self, service: str) -> None:
        if self.service in ("", service):
            self.dirty.add(service)
            self.changed.set()


class LocalRegistry:
    """Registry for one machine; open it with `async with`, which runs the expiry of leases."""

    def __init__(self, file: Path, *, max_instances: int = MAX_INSTANCES) -> None:
        """Load the catalogue.

        Args:
            file: JSON file of the catalogue. Instances in it get one lease of grace: clients keep their
                endpoints over a restart of the control plane, and who died meanwhile is gone a lease later.
            max_instances: Bound on the registry.
        """
        self._file = file
        self._max_instances = max_instances
        self._instances: dict[str, Instance] = {}
        self._by_service: defaultdict[str, dict[str, Instance]] = defaultdict(dict)
        self._watches: set[_Watch] = set()
        self._leases: dict[str, float] = {}
        self._encoded: dict[str, str] = {}
        self._expiry: dict[str, float] = {}
        self._shorter = asyncio.Event()  # a lease ends earlier than the expiry waits for
        self._next_end = float("inf")
        self._saved = True
        self._save_due: asyncio.TimerHandle | None = None
        self._save_after = 0.0
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
        if self._save_due is not None:
            self._save_due.cancel()
            self._save()

    async def register(self, instance: Instance, *, lease_s: float) -> None:
        """See Registry."""
        if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
            raise InvalidArgumentError(f"must be {MIN_LEASE_S:g} to {MAX_LEASE_S:g} s", field="lease")
        known = self._instances.get(instance.id)
        if known is None and len(self._instances) >= self._max_instances:
            raise ResourceExhaustedError(
                f"the registry holds {self._max_instances} instances", reason="REGISTRY_FULL"
            )
        changed = known != instance or self._leases.get(instance.id) != lease_s
        if changed:
            if known is not None and known.service != instance.service:
                del self._by_service[known.service][known.id]
                self._publish(known.service)
            self._put(instance, lease_s)
        self._renew(instance.id)
        if changed:
            self._publish(instance.service)
            log.info("registered", instance=instance.id, address=f"{instance.address}:{instance.port}")

    async def keep_alive(self, instance_id: str, health: Health) -> None:
        """See Registry."""
        instance = self._instances.get(instance_id)
        if instance is None:
            raise NotFoundError(f"no lease for {instance_id!r}", reason="LEASE_NOT_FOUND")
        self._renew(instance_id)
        if instance.health is not health:
            self._put(replace(instance, health=health), self._leases[instance_id])
            self._publish(instance.service)
            log.info("health_changed", instance=instance_id, health=health.value)

    async def deregister(self, instance_id: str) -> None:
        """See Registry."""
        removed = self._remove(instance_id)
        if removed is not None:
            self._publish(removed.service)
            log.info("deregistered", instance=instance_id)

    async def instances(self, service: str = "") -> list[Instance]:
        """See Registry."""
        return self._sorted(service)

    async def watch(self, service: str = "") -> AsyncIterator[list[Instance]]:
        """See Registry."""
        watch = _Watch(service)
        self._watches.add(watch)
        try:
            last: list[Instance] | None = None
            while True:
                watch.changed.clear()
                now = self._sorted(service)
                if now != last:
                    last = now
                    yield now
                await watch.changed.wait()
        finally:
            self._watches.discard(watch)

    async def changes(self) -> AsyncIterator[dict[str, list[Instance]]]:
        """See Catalogue."""
        watch = _Watch("")
        watch.dirty.update(self._by_service)
        self._watches.add(watch)
        try:
            while True:
                watch.changed.clear()
                dirty, watch.dirty = watch.dirty, set()
                yield {service: self._of(service) for service in sorted(dirty)}
                await watch.changed.wait()
        finally:
            self._watches.discard(watch)

    def _of(self, service: str) -> list[Instance]:
        return sorted(self._by_service.get(service, {}).values(), key=lambda entry: entry.id)

    def _sorted(self, service: str) -> list[Instance]:
        names = [service] if service else sorted(self._by_service)
        return [instance for name in names for instance in self._of(name)]

    def _put(self, instance: Instance, lease_s: float) -> None:
        self._instances[instance.id] = instance
        self._by_service[instance.service][instance.id] = instance
        self._leases[instance.id] = lease_s
        # Encoded once: the file of a large catalogue is then written as fast as its bytes can be joined.
        fields = {name: getattr(instance, name) for name in instance.__slots__}
        self._encoded[instance.id] = json.dumps({**fields, "lease_s": lease_s})

    def _renew(self, instance_id: str) -> None:
        end = time.monotonic() + self._leases[instance_id]
        self._expiry[instance_id] = end
        if end < self._next_end:
            self._shorter.set()

    def _remove(self, instance_id: str) -> Instance | None:
        self._leases.pop(instance_id, None)
        self._encoded.pop(instance_id, None)
        self._expiry.pop(instance_id, None)
        instance = self._instances.pop(instance_id, None)
        if instance is not None:
            members = self._by_service[instance.service]
            del members[instance_id]
            if not members:
                del self._by_service[instance.service]
        return instance

    def _publish(self, service: str) -> None:
        for watch in self._watches:
            watch.tell(service)
        if self._save_due is None:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._save_after:
                self._save()
            else:
                self._save_due = loop.call_at(self._save_after, self._save)

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
            removed = self._remove(instance_id)
            log.warning("lease_expired", instance=instance_id)
            if removed is not None:
                self._publish(removed.service)

    def _load(self) -> None:
        try:
            content = json.loads(self._file.read_text())
            for entry in content["instances"]:
                lease_s = float(entry.pop("lease_s"))
                entry["tags"] = tuple(entry["tags"])
                entry["health"] = Health(entry["health"])
                instance = Instance(**entry)
                self._put(instance, lease_s)
                self._renew(instance.id)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, InvalidArgumentError) as error:
            # The file is a cache of what the services will say again within a lease.
            log.warning("catalogue_unreadable", error=type(error).__name__)

    def _save(self) -> None:
        self._save_due = None
        started = time.monotonic()
        try:
            self._write()
        finally:
            now = time.monotonic()
            self._save_after = asyncio.get_running_loop().time() + (now - started) / _SAVING_SHARE

    def _write(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        # Not synced: after a loss of power nobody in it runs, and a damaged file is read as an empty one.
        try:
            temporary.write_text(f'{{"instances": [{", ".join(self._encoded.values())}]}}')
            temporary.replace(self._file)
        except OSError as error:
            # A full disk must not take the mesh down: services register again after a restart in any case.
            if self._saved:
                log.exception("catalogue_not_saved", error=type(error).__name__)
            self._saved = False
            return
        self._saved = True
