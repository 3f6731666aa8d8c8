"""Runs a program that ends with the one that started it, however that ends.

Without it the program of a killed `plexus join` would go on with certificates that nobody renews and, if it
serves, with calls until its registration has run out. Run as a script, it becomes the program: the arguments
are the process id of the parent and the command. On other systems than Linux nothing ties the two.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
NOT_FOUND = 127
"""Exit code of a command that cannot be run, as a shell gives it."""


def command(program: list[str]) -> list[str]:
    """The command that runs a program tied to this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *program]


def main(arguments: list[str]) -> int:
    """Become the program."""
    parent, *program = arguments
    if sys.platform == "linux":
        # SIGTERM: a server may finish its calls.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):
            return NOT_FOUND  # it ended before it was asked for
    try:
        os.execvp(program[0], program)  # noqa: S606 - what the user asked to be run
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - there is no log here
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
