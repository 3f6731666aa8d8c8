"""A channel to one certain control plane, beside xDS, which chooses among several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import grpc.aio

from services.runtime.addresses import netloc

if TYPE_CHECKING:
    from services.mesh.trust.domain import Identity

CONTROL = "control"


def control_channel(host: str, port: int, identity: Identity) -> grpc.aio.Channel:
    """Open a channel; the caller closes it.

    Args:
        host: Name or address; an IPv6 address without brackets.
        port: Its port.
        identity: Who asks.
    """
    credentials = grpc.ssl_channel_credentials(
        identity.ca_path.read_bytes(), identity.key_path.read_bytes(), identity.cert_path.read_bytes()
    )
    # By the name that only a control plane's certificate has: an address alone proves nobody.
    options = [("grpc.ssl_target_name_override", f"{CONTROL}.plexus.local")]
    return grpc.aio.secure_channel(netloc(host, port), credentials, options)
