"""`make servers`: provides every server that tests run, and says where it is."""

from __future__ import annotations

import sys
import time

from tests.polyglot.programs import POLYGLOT, PUBSUB
from tests.servers.programs import PROGRAMS, UnavailableServerError


def main() -> int:
    """Provide all; a server that cannot be had is told and does not keep the others from being made."""
    for program in (*PROGRAMS.values(), *POLYGLOT.values(), PUBSUB):
        began = time.monotonic()
        try:
            path = program.provide()
        except UnavailableServerError as error:
            print(f"{program.name}: {error}; its tests are skipped")  # noqa: T201 - a program that reports
            continue
        seconds = time.monotonic() - began
        built = f" (built in {seconds:.0f} s)" if seconds > 1 else ""
        print(f"{program.name} {program.version}: {path}{built}")  # noqa: T201 - as above
    return 0


if __name__ == "__main__":
    sys.exit(main())
