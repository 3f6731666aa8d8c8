"""The xDS bootstrap file that any gRPC client of the mesh starts from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CERTIFICATE_PROVIDER = "plexus"
"""Name of the certificate provider that the control plane's clusters refer to."""
REFRESH_INTERVAL = "1s"


def write_bootstrap(
    identity_dir: Path, servers: Sequence[str], node_id: str, zone: str = "local", slot: str = ""
) -> Path:
    """Write `bootstrap.json` beside the identity's files.

    One file serves C-core, Go, Java and Node: each takes the first channel credential type it knows.

    Args:
        identity_dir: Folder with ca.pem, cert.pem and key.pem.
        servers: `host:port` of the control planes; each host is a DNS name of its certificate. A name with
            several addresses is the better way to have several: clients go from one that ends to another at
            once, while to the next name of a list they go only for what they do not know yet.
        node_id: Unique name of this process.
        zone: Where it runs; its calls stay there if a service's policy prefers that.
        slot: Which of the identity's programs; each has a file of its own.

    Returns:
        The file's path, for GRPC_XDS_BOOTSTRAP.
    """
    files = {
        "ca_certificate_file": str(identity_dir / "ca.pem"),
        "certificate_file": str(identity_dir / "cert.pem"),
        "private_key_file": str(identity_dir / "key.pem"),
    }
    watched = {**files, "refresh_interval": REFRESH_INTERVAL}
    content = {
        "xds_servers": [
            {
                "server_uri": server,
                # A control plane that forgets must not take its clients down.
                "server_features": ["xds_v3", "ignore_resource_deletion"],
                "channel_creds": [
                    {"type": "plexus_tls", "config": watched},
                    {"type": "tls", "config": watched},
                    {"type": "google_default"},
                ],
            }
            for server in servers
        ],
        "node": {"id": node_id, "cluster": "plexus", "locality": {"region": "local", "zone": zone}},
        "certificate_providers": {CERTIFICATE_PROVIDER: {"plugin_name": "file_watcher", "config": watched}},
    }
    path = identity_dir / (f"bootstrap-{slot}.json" if slot else "bootstrap.json")
    temporary = path.with_suffix(f".{node_id}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
    return path
