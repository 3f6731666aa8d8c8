"""Between storage messages and the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2

from plexus.storage.v1 import storage_pb2

if TYPE_CHECKING:
    from datetime import datetime

    from services.storage.domain import Bucket, StoredObject


def _timestamp(value: datetime) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromDatetime(value)
    return timestamp


def bucket_to(bucket: Bucket) -> storage_pb2.Bucket:
    """The proto's bucket."""
    return storage_pb2.Bucket(name=bucket.name, create_time=_timestamp(bucket.created))


def object_to(stored: StoredObject) -> storage_pb2.Object:
    """The proto's object."""
    return storage_pb2.Object(
        bucket=stored.bucket,
        key=stored.key,
        size=stored.size,
        content_type=stored.content_type,
        metadata=stored.metadata,
        sha256=stored.sha256,
        etag=stored.etag,
        update_time=_timestamp(stored.updated),
    )
