"""Intentions in a folder: taken over live, and refused with the line."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from services.mesh.intention_files import IntentionDocuments, IntentionFiles
from services.mesh.policy.domain import Document
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from services.mesh.intentions import IntentionTable

DEADLINE_S = 60
ALLOW = "Kind: service-intentions\nName: vectors\nSources:\n  - {Name: edge, Action: allow}\n"
DENY = ALLOW.replace("allow", "deny")


def put(folder: Path, text: str, name: str = "vectors") -> None:
    temporary = folder / f".{name}"
    temporary.write_text(text)
    temporary.replace(folder / f"{name}.yaml")


async def following(rules: AsyncIterator[IntentionTable]) -> IntentionTable:
    return await asyncio.wait_for(anext(rules), DEADLINE_S)


def allowed(table: IntentionTable, source: str = "edge") -> bool:
    return table.decide(source, "vectors", "/a.B/C").allowed


async def test_a_change_applies_and_so_does_a_removal(tmp_path: Path) -> None:
    put(tmp_path, ALLOW)
    rules = IntentionFiles(tmp_path).watch()
    assert allowed(await following(rules))
    put(tmp_path, DENY)
    assert not allowed(await following(rules))
    put(tmp_path, ALLOW)
    assert allowed(await following(rules))
    (tmp_path / "vectors.yaml").unlink()
    assert (await following(rules)).by_destination == {}


async def test_a_file_at_fault_changes_nothing_and_holds_nothing_up(tmp_path: Path) -> None:
    put(tmp_path, ALLOW)
    rules = IntentionFiles(tmp_path).watch()
    assert allowed(await following(rules))
    put(tmp_path, DENY.replace("deny", "maybe"))
    put(tmp_path, ALLOW.replace("vectors", "storage"), "storage")
    table = await following(rules)
    assert allowed(table)
    assert table.decide("edge", "storage", "/a.B/C").allowed


REFUSED = {
    "no rule": ("- {Name: b}", r"here:4: Sources\[0\]: needs either Action or Permissions"),
    "no such action": ("- {Name: b, Action: maybe}", r"here:4: Sources\[0\]\.Action: .*'allow' or 'deny'"),
    "no such key": ("- {Name: b, Action: allow, Colour: red}", r"here:4: Sources\[0\]\.Colour: no such key"),
    "twice": ("- {Name: b, Action: allow}\n  - {Name: b, Action: deny}", "here:3: .*name a source twice"),
    "a condition on headers": (
        "- {Name: b, Permissions: [{Action: allow, HTTP: {PathPrefix: /, Header: [{Name: x}]}}]}",
        "here:3: conditions on headers are not judged: b -> a",
    ),
    "no YAML": ("- {Name: b", "here:5: "),
}


@pytest.mark.parametrize(("source", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_the_refusal_names_file_line_and_reason(source: str, reason: str) -> None:
    documents = IntentionDocuments()
    assert documents.replace({"a": Document("here", ALLOW)})
    text = f"Kind: service-intentions\nName: a\nSources:\n  {source}\n"
    assert not documents.replace({"a": Document("here", text)})
    assert re.match(reason, documents.refusals["a"]), documents.refusals
    assert not documents.replace({"a": Document("here", ALLOW)})
    assert documents.refusals == {}


@pytest.mark.parametrize("text", ["", "[]", "Kind: service-defaults\nName: a\nSources: []\n"])
async def test_at_the_start_a_file_at_fault_is_an_error(tmp_path: Path, text: str) -> None:
    put(tmp_path, text, "bad")
    with pytest.raises(InvalidArgumentError, match=r"bad\.yaml:1: "):
        await IntentionFiles(tmp_path).read()
    with pytest.raises(InvalidArgumentError, match=r"bad\.yaml:1: "):
        await anext(IntentionFiles(tmp_path).watch())


def test_a_second_file_for_a_destination_is_refused() -> None:
    documents = IntentionDocuments()
    both = {"a": Document("a.yaml", ALLOW), "b": Document("b.yaml", DENY)}
    assert documents.replace(both)
    assert documents.refusals == {"b": "b.yaml:1: a.yaml speaks for 'vectors' already"}
    assert documents.replace({"b": both["b"]})  # it may once the other is gone
    assert documents.entries()[0].Sources[0].Action == "deny"
