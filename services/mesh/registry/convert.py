"""Between registry messages and the domain."""

from __future__ import annotations

from plexus.registry.v1 import registry_pb2
from services.mesh.registry.domain import Health, Instance

_TO_PROTO = {
    Health.SERVING: registry_pb2.HEALTH_SERVING,
    Health.NOT_SERVING: registry_pb2.HEALTH_NOT_SERVING,
    Health.DRAINING: registry_pb2.HEALTH_DRAINING,
}
_FROM_PROTO = {number: health for health, number in _TO_PROTO.items()}


def health_from(number: registry_pb2.Health.ValueType) -> Health:
    """The domain's health; unspecified counts as serving."""
    return _FROM_PROTO.get(number, Health.SERVING)


def health_to(health: Health) -> registry_pb2.Health.ValueType:
    """The proto's health."""
    return _TO_PROTO[health]


def instance_from(message: registry_pb2.Instance) -> Instance:
    """The domain's instance, with the proto's defaults applied.

    Raises:
        InvalidArgumentError: A field is malformed.
    """
    return Instance(
        id=message.id,
        service=message.service,
        address=message.address,
        port=message.port,
        version=message.version,
        zone=message.zone or "local",
        weight=message.weight or 1,
        tags=tuple(message.tags),
        meta=dict(message.meta),
        health=health_from(message.health),
    )


def instance_to(instance: Instance) -> registry_pb2.Instance:
    """The proto's instance."""
    return registry_pb2.Instance(
        id=instance.id,
        service=instance.service,
        address=instance.address,
        port=instance.port,
        version=instance.version,
        zone=instance.zone,
        weight=instance.weight,
        tags=instance.tags,
        meta=instance.meta,
        health=health_to(instance.health),
    )
