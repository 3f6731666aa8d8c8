"""Which methods google.pubsub.v1 has, and who may call each through the edge.

The edge's end users need the same groups as for the queueing service's own methods.
"""

from __future__ import annotations

from typing import Final

PACKAGE: Final = "google.pubsub.v1"
_READ = ("readers", "writers", "admins")
_WRITE = ("writers", "admins")
_DELETE = ("admins",)

_PUBLISHER = {
    "CreateTopic": _WRITE,
    "UpdateTopic": _WRITE,
    "Publish": _WRITE,
    "GetTopic": _READ,
    "ListTopics": _READ,
    "ListTopicSubscriptions": _READ,
    "ListTopicSnapshots": _READ,
    "DeleteTopic": _DELETE,
    "DetachSubscription": _WRITE,
}
_SUBSCRIBER = {
    "CreateSubscription": _WRITE,
    "GetSubscription": _READ,
    "UpdateSubscription": _WRITE,
    "ListSubscriptions": _READ,
    "DeleteSubscription": _DELETE,
    "ModifyAckDeadline": _WRITE,
    "Acknowledge": _WRITE,
    "Pull": _WRITE,
    "StreamingPull": _WRITE,
    "ModifyPushConfig": _WRITE,
    "GetSnapshot": _READ,
    "ListSnapshots": _READ,
    "CreateSnapshot": _WRITE,
    "UpdateSnapshot": _WRITE,
    "DeleteSnapshot": _DELETE,
    "Seek": _WRITE,
}
_SCHEMAS = {
    "CreateSchema": _WRITE,
    "GetSchema": _READ,
    "ListSchemas": _READ,
    "ListSchemaRevisions": _READ,
    "CommitSchema": _WRITE,
    "RollbackSchema": _WRITE,
    "DeleteSchemaRevision": _DELETE,
    "DeleteSchema": _DELETE,
    "ValidateSchema": _READ,
    "ValidateMessage": _READ,
}
SERVICES = {"Publisher": _PUBLISHER, "Subscriber": _SUBSCRIBER, "SchemaService": _SCHEMAS}
GROUPS = {
    f"/{PACKAGE}.{service}/{method}": groups
    for service, methods in SERVICES.items()
    for method, groups in methods.items()
}
"""Path of a method and its groups."""
