"""The names in a leaf: who it is, and where it may be dialled."""

from __future__ import annotations

import ipaddress

from cryptography import x509

LOOPBACK = "127.0.0.1"


def alternative_names(spiffe_id: str, service: str, address: str) -> x509.SubjectAlternativeName:
    """The subject alternative names of an identity.

    Args:
        spiffe_id: The identity, which the mesh's callers check.
        service: Its name; Kong checks only host names, hence one made of it.
        address: IP address of this host, for clients of the control plane, which dial it by that.
    """
    addresses = dict.fromkeys(map(ipaddress.ip_address, (LOOPBACK, address)))
    return x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(spiffe_id),
            x509.DNSName(f"{service}.plexus.local"),
            x509.DNSName("localhost"),
            *map(x509.IPAddress, addresses),
        ]
    )


def covers(certificate: x509.Certificate, address: str) -> bool:
    """Whether a leaf is valid for an IP address."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return ipaddress.ip_address(address) in names.get_values_for_type(x509.IPAddress)
