"""Optimise a shard in a process of its own: `python -m services.vectors.backends.qdrant_optimize FOLDER`.

The engine holds the interpreter's lock while it builds a graph index: seconds for tens of thousands of
points. In the service's process that would stop health, leases and every other call, so the work is done on a
copy, here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import qdrant_edge as engine

from services.vectors.backends.qdrant_files import sync_tree

_NICENESS = 10


def main() -> None:
    """Optimise the shard in the folder named on the command line."""
    os.nice(_NICENESS)
    shard = engine.EdgeShard.load(sys.argv[1])
    shard.optimize()
    shard.flush()
    shard.close()
    sync_tree(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
