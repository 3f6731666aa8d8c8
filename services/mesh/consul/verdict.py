"""What the agent on this host says of an instance, as an exit status: the health check of containers.

    python -m services.mesh.consul.verdict [INSTANCE]

INSTANCE is an id such as `vectors-1`; by default that of the `plexus serve` that is the container's first
process. The agent asks the instance over gRPC and watches its lease, so this needs to ask the agent alone. It
runs every few seconds in every container and therefore imports nothing but the standard library.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TIMEOUT_S = 4.0
_OK = 200


def instance_of(command: Sequence[str]) -> str:
    """The id under which a `plexus serve` registers.

    Args:
        command: Its command line, whatever comes before `serve` included.

    Raises:
        ValueError: It is none.
    """
    words = list(command)
    arguments = words[words.index("serve") + 1 :]
    number = "1"
    names = []
    while arguments:
        word = arguments.pop(0)
        option, _, value = word.partition("=")
        if option.startswith("-"):
            value = value or (arguments.pop(0) if arguments else "")
            number = value if option == "--number" else number
        else:
            names.append(word)
    if len(names) != 1:
        raise ValueError(f"{len(names)} names")
    return f"{names[0]}-{number}"


def ask(instance: str, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Ask the agent.

    Args:
        instance: The id.
        environment: With the `PLEXUS_CONSUL__…` variables of the instance.

    Returns:
        Whether every check of the instance passes, and what the agent says.

    Raises:
        OSError: The agent does not answer, or a file cannot be read.
        http.client.HTTPException: It answers nonsense.
        KeyError: No agent is configured.
    """
    address = urlsplit(environment["PLEXUS_CONSUL__ADDRESS"])
    token = environment.get("PLEXUS_CONSUL__TOKEN", "")
    if file := environment.get("PLEXUS_CONSUL__TOKEN_FILE"):
        token = Path(file).read_text().strip()
    host, port = address.hostname or "", address.port
    connection: http.client.HTTPConnection
    if address.scheme == "https":
        context = ssl.create_default_context(cafile=environment.get("PLEXUS_CONSUL__CA"))
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        path = f"/v1/agent/health/service/id/{quote(instance, safe='')}?format=text"
        connection.request("GET", path, headers={"X-Consul-Token": token} if token else {})
        answer = connection.getresponse()
        text = answer.read(200).decode(errors="replace").strip()
    finally:
        connection.close()
    return answer.status == _OK, text


def main() -> int:
    """0 if the instance is healthy, 1 if not or if nobody says."""
    try:
        given = sys.argv[1:2] or [instance_of(Path("/proc/1/cmdline").read_text().split("\0")[:-1])]
        healthy, text = ask(given[0], os.environ)
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        healthy, text = False, f"{type(error).__name__}: {error}"
    print(text)  # noqa: T201 - what `docker inspect` shows
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
