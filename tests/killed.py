"""Programs that write until they are killed with -9."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def killed_writer(program: str, target: Path, lines: int) -> list[str]:
    """Run a Python program that prints a line for each acknowledged write, and kill it.

    Args:
        program: Its text; `sys.argv[1]` is the target.
        target: What it writes to.
        lines: Acknowledgements to wait for.

    Returns:
        All lines it printed, those of the moment of its death included.
    """
    command = [sys.executable, "-c", program, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        printed += process.stdout.readlines()
    assert all(printed), "the program ended by itself"
    return [line.strip() for line in printed if line.endswith("\n")]
