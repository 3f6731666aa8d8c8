"""The embedded search engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.search.backends.tantivy import TantivyIndex
from tests.contracts.search import SearchIndexContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.search.domain import SearchIndex


class TestTantivyIndex(SearchIndexContract):
    @pytest.fixture
    async def index(self, tmp_path: Path) -> AsyncIterator[SearchIndex]:
        async with TantivyIndex.open(tmp_path) as index:
            yield index
