"""What a refused call tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.client.failures import problem

if TYPE_CHECKING:
    import grpc


def details(error: grpc.RpcError) -> tuple[str, dict[str, str], list[str]]:
    """Reason, metadata and field paths of an error."""
    found = problem(error)
    return found.reason, found.metadata, [violation.field for violation in found.violations]
