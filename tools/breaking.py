"""Check protos/ against the last release with `buf breaking`; before the first release nothing can break."""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    """Compare with the newest v* tag, if there is one."""
    tags = subprocess.run(
        ["git", "tag", "--list", "v*", "--sort=-version:refname"], check=True, capture_output=True, text=True
    ).stdout.split()
    if not tags:
        print("no release yet: nothing to compare protos with")
        return 0
    command = ["buf", "breaking", "protos", "--against", f".git#tag={tags[0]},subdir=protos"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
