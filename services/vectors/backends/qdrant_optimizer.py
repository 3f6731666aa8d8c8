"""Keeps collections fast: copies a shard that changed much, has the copy optimised apart, and swaps it in.

Writes go on meanwhile; those that came after the copy was made are applied to it before the swap. A crash at
any point leaves either the old shard or the new one as the current, both complete.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

import structlog

from services.runtime.errors import PlexusError
from services.vectors.backends.qdrant_files import CollectionFiles, copy_sparse, size_of, sync_log
from services.vectors.backends.qdrant_shards import Journal, Shard, Write, load

if TYPE_CHECKING:
    from pathlib import Path

    from services.vectors.backends.qdrant_edge import QdrantEdgeStore

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 5.0
TIMEOUT_S = 3600.0


class Optimizer:
    """Optimises the collections of a store, one at a time."""

    def __init__(self, store: QdrantEdgeStore) -> None:
        self._store = store
        self._threshold = store.config.optimize_after_points

    async def run(self) -> None:
        """Look for work until cancelled."""
        while self._threshold:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self.optimize_changed()

    async def optimize_changed(self) -> None:
        """Optimise every collection that changed enough."""
        for shard in self._store.open_shards():
            if shard.changed >= self._threshold and not shard.deleted:
                await self.optimize(shard)

    async def optimize(self, shard: Shard) -> bool:
        """Optimise one collection; return whether the optimised copy is now the current one."""
        name = shard.stored.spec.name
        submit = self._store.writer.submit
        copy: Path | None = None
        swapped = False
        changed = shard.changed
        try:
            copy = await submit(Write(None, partial(self._copy, shard)))
            if copy is not None and await self._run_apart(copy):
                swapped = await submit(Write(None, partial(self._swap, shard, copy)))
        except (PlexusError, OSError) as error:
            log.warning("optimization_failed", collection=name, error=str(error))
        finally:
            if not swapped:
                shard.journal = None
                # Not again at once: after as many changes as led here.
                shard.changed = 0
                if copy is not None:
                    shutil.rmtree(copy, ignore_errors=True)
        log.info("optimized", collection=name, changed=changed, swapped=swapped)
        return swapped

    def _copy(self, shard: Shard) -> Path | None:
        """Copy the files at a moment without writes. Runs in the writer thread."""
        if shard.deleted:
            return None
        shard.engine.flush()
        shard.unflushed = 0
        # Room for the copy and for what the optimised one will be.
        self._store.check_disk(2 * size_of(shard.stored.shard_folder))
        target = shard.stored.folder / f"shard-{shard.stored.shard + 1}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(shard.stored.shard_folder, target, copy_function=copy_sparse)
        shard.journal = Journal()
        return target

    @staticmethod
    async def _run_apart(folder: Path) -> bool:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.vectors.backends.qdrant_optimize",
            str(folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await process.wait() == 0
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    @staticmethod
    def _swap(shard: Shard, copy: Path) -> bool:
        """Bring the copy up to date and make it the current shard. Runs in the writer thread."""
        journal, shard.journal = shard.journal, None
        if shard.deleted or journal is None or journal.overflowed:
            return False
        fresh = load(copy)
        for operation in journal.operations:
            fresh.update(operation)
        sync_log(copy)
        previous = shard.stored.shard_folder
        shard.stored = CollectionFiles.use_shard(shard.stored, shard.stored.shard + 1)
        # The old engine goes with the last read that uses it; its files can go at once, they stay mapped.
        shard.engine = fresh
        shard.changed = 0
        shutil.rmtree(previous, ignore_errors=True)
        return True
