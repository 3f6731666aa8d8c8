"""How an IP address is written and read."""

from __future__ import annotations

import ipaddress


def bracketed(host: str) -> str:
    """A host as it stands before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def netloc(host: str, port: int) -> str:
    """`host:port` as URLs and gRPC have it."""
    return f"{bracketed(host)}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an IP address is reached from its own machine alone."""
    return ipaddress.ip_address(host).is_loopback
