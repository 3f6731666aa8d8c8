"""Policies: what is refused and how, what stays, and where they are kept."""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

import pytest
from google.protobuf import descriptor_pool
from pydantic import BaseModel

from services.mesh.policy import domain
from services.mesh.policy.domain import Document, Policy, PolicyError, span
from services.mesh.policy.folder import FolderPolicyStore
from services.mesh.policy.parse import parse
from services.mesh.policy.table import PolicyTable
from services.runtime.config import project_file
from services.runtime.errors import FailedPreconditionError
from tests.contracts.policies import PolicyStoreContract
from tests.mesh.policies import EVERYTHING, EVERYTHING_TEXT

if TYPE_CHECKING:
    from pathlib import Path

    from services.mesh.policy.domain import PolicyStore


@pytest.mark.parametrize("path", sorted(project_file("consul/policies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_policies_are_valid_and_named_after_their_service(path: Path) -> None:
    policy = parse(Document(path.name, path.read_text()), service=path.stem)
    importlib.import_module(f"plexus.{path.stem}.v1.{path.stem}_pb2")
    for route in policy.routes:
        if route.match.method is not None:
            name = route.match.method.removeprefix("/").replace("/", ".")
            assert descriptor_pool.Default().FindMethodByName(name)


def test_the_test_policy_uses_every_key_of_the_schema() -> None:
    def unused(model: BaseModel, path: str) -> list[str]:
        missing = [
            f"{path}.{name}" for name in type(model).model_fields if name not in model.model_fields_set
        ]
        for name in model.model_fields_set:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                missing += unused(value, f"{path}.{name}")
        return missing

    assert unused(EVERYTHING, "policy") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("service: v\ntimeuot: 3s", "v.yaml:2: timeuot: no such key"),
        ("service: v\nretry:\n  attempts: 3\n  atempts: 3", "v.yaml:4: retry.atempts: no such key"),
        (
            "service: v\nretry:\n  attempts: 9",
            "v.yaml:3: retry.attempts: Input should be less than or equal to 5",
        ),
        (
            "service: v\nretry:\n  codes: [unavailable,\n    sometimes]",
            "v.yaml:4: retry.codes[1]: Input should be",
        ),
        ("service: v\n\ntimeout: 30", "v.yaml:3: timeout: needs a length of time with its unit"),
        ("service: v\ntimeout: 0s", "v.yaml:2: timeout: needs a length of time"),
        ("service: v\nlb:\n  policy: ring_hash", "v.yaml:2: lb: ring_hash needs a header"),
        (
            "service: v\nlb: {policy: random}",
            "v.yaml:2: lb.policy: Input should be 'round_robin' or 'ring_hash'",
        ),
        ("service: v\nretry:\n  backoff: {base: 1ms}", "v.yaml:3: retry.backoff: base is shorter than 5ms"),
        ("service: v\nfault: {}", "v.yaml:2: fault: needs delay, abort or both"),
        ("service: v\nfault:\n  delay: {percent: 3}", "v.yaml:3: fault.delay.duration: Field required"),
        ("service: v\nsubsets:\n  a: {version: '1'}", "v.yaml:2: subsets: no subset has a weight"),
        (
            "service: v\nsubsets: {a: {tag: t, weight: 1}}\nroutes:\n- {match: {prefix: /a},subsets: {b: 1}}",
            "v.yaml:3: routes[0].subsets: no subset is named 'b'",
        ),
        (
            "service: v\nroutes:\n  - match: {}",
            "v.yaml:3: routes[0].match: needs a method, a prefix or headers",
        ),
        ("timeout: 3s", "v.yaml:1: service: Field required"),
        ("service: w", "v.yaml:1: service: must be 'v', which the file is named after"),
        ("service: v\nservice: v", "v.yaml:2: line 2: 'service' is given twice"),
        ("- a", "v.yaml:1: must be a mapping"),
        ("", "v.yaml:1: must be a mapping"),
        ("service: v\nretry: {codes: [a", "v.yaml:2: "),
        ("service: v\n#" + "x" * domain.MAX_BYTES, "v.yaml:1: longer than"),
    ],
)
def test_a_mistake_is_refused_with_file_line_and_reason(text: str, problem: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse(Document("v.yaml", text), service="v")
    assert refused.value.message.startswith(problem)


def test_every_mistake_is_told_not_only_the_first() -> None:
    with pytest.raises(PolicyError) as refused:
        parse(Document("v.yaml", "service: v\na: 1\nb: 2"))
    assert refused.value.message.splitlines() == ["v.yaml:2: a: no such key", "v.yaml:3: b: no such key"]


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("2s", 2), ("1.5m", 90), ("1h", 3600)])
def test_a_span_has_its_unit(text: str, seconds: float) -> None:
    assert span(text).total_seconds() == seconds


def documents(**texts: str) -> dict[str, Document]:
    return {service: Document(f"{service}.yaml", text) for service, text in texts.items()}


def test_a_bad_policy_is_refused_and_the_old_one_stays_until_it_is_mended() -> None:
    table = PolicyTable()
    assert table.replace(documents(v="service: v\ntimeout: 3s", w="service: w")) == {"v", "w"}
    before = table.of("v")
    assert table.replace(documents(v="service: v\ntimeout: three", w="service: w\ntimeout: 1s")) == {"w"}
    assert table.of("v") == before
    assert table.refusals["v"].startswith("v.yaml:2: timeout: ")
    assert table.replace(documents(v="service: v\ntimeout: 4s", w="service: w\ntimeout: 1s")) == {"v"}
    assert table.refusals == {}


def test_a_removed_policy_gives_the_default_one_back() -> None:
    table = PolicyTable()
    table.replace(documents(v="service: v\ntimeout: 3s"))
    assert table.replace({}) == {"v"}
    assert table.of("v") == Policy(service="v")
    assert table.services() == []


def test_equal_documents_change_nothing() -> None:
    table = PolicyTable()
    table.replace(documents(vectors=EVERYTHING_TEXT))
    assert table.replace(documents(vectors=EVERYTHING_TEXT)) == set()
    assert table.replace(documents(vectors="# a comment\n" + EVERYTHING_TEXT)) == set()


class TestFolderPolicyStore(PolicyStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> PolicyStore:
        return FolderPolicyStore(tmp_path / "base", tmp_path / "written", interval_s=0.02)


async def test_a_written_policy_hides_the_one_of_the_user_until_it_is_removed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "v.yaml").write_text("service: v")
    store = FolderPolicyStore(base, tmp_path / "written")
    await store.write({"v": "service: v\ntimeout: 1s"})
    assert (await store.read())["v"].text == "service: v\ntimeout: 1s"
    await store.write({}, remove=frozenset({"v"}))
    assert (await store.read())["v"] == Document(str(base / "v.yaml"), "service: v")


async def test_an_edited_file_is_seen(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    file = base / "v.yaml"
    file.write_text("service: v")
    watch = FolderPolicyStore(base, tmp_path / "written", interval_s=0.02).watch()
    async with asyncio.timeout(30):
        assert (await anext(watch))["v"].text == "service: v"
        file.write_text("service: v\ntimeout: 1s")
        while (await anext(watch))["v"].text != "service: v\ntimeout: 1s":
            pass


async def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "written").write_text("a file, not a folder")
    with pytest.raises(FailedPreconditionError):
        await FolderPolicyStore(tmp_path, tmp_path / "written").write({"v": "service: v"})
