"""What a program needs to be told, by language."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from services.mesh.trust.domain import Identity


class Language(StrEnum):
    """Languages whose gRPC library speaks xDS; env for the variables alone."""

    ENV = "env"
    GO = "go"
    JAVA = "java"
    NODE = "node"
    CPP = "cpp"
    PYTHON = "python"


@dataclass(frozen=True, slots=True)
class Joined:
    """A program's way into the mesh.

    Attributes:
        service: Its name there.
        identity: Its certificate files.
        bootstrap: Its xDS bootstrap.
    """

    service: str
    identity: Identity
    bootstrap: Path

    def environment(self) -> dict[str, str]:
        """Variables of the program. Every gRPC library reads the first; a server reads the other three."""
        return {
            "GRPC_XDS_BOOTSTRAP": str(self.bootstrap),
            "PLEXUS_CA_PATH": str(self.identity.ca_path),
            "PLEXUS_CERTIFICATE_PATH": str(self.identity.cert_path),
            "PLEXUS_KEY_PATH": str(self.identity.key_path),
        }

    def exports(self) -> list[str]:
        """The variables as lines for a shell."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environment().items()]


_SERVER = (
    "A server: read the three files at each handshake, since they are replaced; demand a client certificate; "
    "the caller's name is in its URI SAN."
)

_HOW: dict[Language, tuple[str, ...]] = {
    Language.ENV: (),
    Language.PYTHON: (
        "pip install grpcio",
        "import grpc, grpc.experimental",
        "credentials = grpc.xds_channel_credentials(grpc.experimental.insecure_channel_credentials())",
        'channel = grpc.secure_channel("xds:///inference", credentials)',
    ),
    Language.CPP: (
        "link grpc++ with xDS (grpc_cli and distribution packages have it)",
        "auto credentials = grpc::XdsCredentials(grpc::InsecureChannelCredentials());",
        'auto channel = grpc::CreateChannel("xds:///inference", credentials);',
    ),
    Language.GO: (
        "go get google.golang.org/grpc",
        'import xdscreds "google.golang.org/grpc/credentials/xds"',
        'import _ "google.golang.org/grpc/xds"',
        "options := xdscreds.ClientOptions{FallbackCreds: insecure.NewCredentials()}",
        "creds, err := xdscreds.NewClientCredentials(options)",
        'conn, err := grpc.NewClient("xds:///inference", grpc.WithTransportCredentials(creds))',
    ),
    Language.JAVA: (
        "io.grpc:grpc-xds and clients/java on the class path",
        "(clients/java gives the channel to the control plane its certificate; the bootstrap cannot)",
        "XdsChannelCredentials.create(InsecureChannelCredentials.create())",
        'Grpc.newChannelBuilder("xds:///inference", credentials).build()',
    ),
    Language.NODE: (
        "npm install @grpc/grpc-js @grpc/grpc-js-xds",
        "node --require plexus-mesh-preload",
        "(clients/node gives the channel to the control plane its certificate; the bootstrap cannot)",
        'require("@grpc/grpc-js-xds").register()',
        "const credentials = new xds.XdsChannelCredentials(grpc.credentials.createInsecure())",
        'new Client("xds:///inference", credentials)',
    ),
}


def how(language: Language) -> tuple[str, ...]:
    """What to write in a program, a line each; empty for the variables alone."""
    lines = _HOW[language]
    return (*lines, _SERVER) if lines else ()
