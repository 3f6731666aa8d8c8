"""The embedded vector store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.vectors.backends.qdrant_edge import QdrantEdgeStore
from tests.contracts.vectors import VectorStoreContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.vectors.domain import VectorStore


class TestQdrantEdgeStore(VectorStoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[VectorStore]:
        async with QdrantEdgeStore.open(tmp_path) as store:
            yield store
