"""Traffic policies in a real Consul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.mesh.consul.kv import MAX_OPERATIONS, KeyValues
from services.mesh.policy.consul import PREFIX, ConsulPolicyStore
from services.runtime.errors import InvalidArgumentError
from tests.contracts.policies import PolicyStoreContract, texts

if TYPE_CHECKING:
    from services.mesh.consul.client import ConsulClient
    from services.mesh.policy.domain import PolicyStore


class TestConsulPolicyStore(PolicyStoreContract):
    @pytest.fixture
    def store(self, client: ConsulClient) -> PolicyStore:
        return ConsulPolicyStore(KeyValues(client))

    async def test_too_many_at_once_are_refused_before_any_is_written(self, store: PolicyStore) -> None:
        with pytest.raises(InvalidArgumentError):
            await store.write({f"s{number}": "" for number in range(MAX_OPERATIONS + 1)})
        assert await store.read() == {}

    async def test_a_folder_made_by_hand_is_no_policy(self, store: PolicyStore, client: ConsulClient) -> None:
        await KeyValues(client).put(PREFIX, b"")
        await store.write({"a": "1"})
        assert texts(await store.read()) == {"a": "1"}
