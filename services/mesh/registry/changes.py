"""Any registry as the control plane's catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.mesh.registry.domain import Instance, Registry


class WatchedCatalogue:
    """Compares what a registry's watch tells with what it told before."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def changes(self) -> AsyncIterator[dict[str, list[Instance]]]:
        """See Catalogue."""
        before: dict[str, list[Instance]] = {}
        async for instances in self._registry.watch():
            now: dict[str, list[Instance]] = {}
            for instance in instances:
                now.setdefault(instance.service, []).append(instance)
            changed = {
                service: now.get(service, [])
                for service in sorted(now.keys() | before.keys())
                if now.get(service) != before.get(service)
            }
            before = now
            if changed:
                yield changed
