"""Intentions in a folder: taken over live, and refused with the line."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from services.mesh.intention_files import IntentionDocuments, IntentionFiles
from services.mesh.policy.domain import Document
from services.runtime.access import Decision

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


ANY = "Kind: service-intentions\nName: '*'\nSources:\n  - {Name: '*', Action: allow}\n"
AT_FAULT = {
    "a mistake": ALLOW.replace("allow", "maybe"),
    "no YAML": ALLOW + "  - {",
    "twice": ALLOW + "  - {Name: edge, Action: deny}\n",
}


@pytest.mark.parametrize("text", AT_FAULT.values(), ids=AT_FAULT.keys())
async def test_a_file_at_fault_from_the_start_closes_its_destination_until_it_is_mended(
    tmp_path: Path, text: str
) -> None:
    put(tmp_path, ANY, "any")
    put(tmp_path, text, "other-name")
    rules = IntentionFiles(tmp_path).watch()
    table = await following(rules)
    assert table.decide("edge", "storage", "/a.B/C").allowed
    # What the file forbids is not known, so what others allow does not count.
    assert table.decide("edge", "vectors", "/a.B/C") == Decision(allowed=False, rule="intentions at fault")
    assert re.search(r"other-name\.yaml:\d: ", table.fault("vectors"))
    assert table.fault("storage") == ""
    put(tmp_path, DENY, "other-name")
    table = await following(rules)
    assert (table.fault("vectors"), allowed(table)) == ("", False)
    put(tmp_path, text, "other-name")
    put(tmp_path, ANY.replace("allow", "deny"), "any")
    table = await following(rules)
    assert table.fault("vectors") == ""  # now the last good content is known
    (tmp_path / "any.yaml").unlink()
    put(tmp_path, ALLOW, "other-name")
    while not allowed(await following(rules)):
        pass


@pytest.mark.parametrize("text", ["", "[]", "Kind: service-intentions\nSources: []\n", "Name:\n"])
async def test_a_file_that_does_not_say_for_whom_it_speaks_closes_everything(
    tmp_path: Path, text: str
) -> None:
    put(tmp_path, ALLOW)
    put(tmp_path, text, "bad")
    rules = IntentionFiles(tmp_path).watch()
    table = await following(rules)
    assert not allowed(table)
    assert "bad.yaml:1: " in table.fault("vectors")
    (tmp_path / "bad.yaml").unlink()
    assert allowed(await following(rules))


async def test_the_first_good_state_is_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "", "bad")
    waiting = asyncio.create_task(IntentionFiles(tmp_path).good())
    await asyncio.sleep(0)
    put(tmp_path, ALLOW, "bad")
    (entry,) = await asyncio.wait_for(waiting, DEADLINE_S)
    assert entry.Name == "vectors"


async def test_what_was_written_hides_the_users_file_for_the_destination_whatever_its_name(
    tmp_path: Path,
) -> None:
    folder, written = tmp_path / "own", tmp_path / "written"
    folder.mkdir()
    put(folder, ALLOW, "rules")
    put(folder, ALLOW.replace("Name: vectors", "Name: storage"), "vectors")
    files = IntentionFiles(folder, written)
    rules = files.watch()
    assert allowed(await following(rules))
    await files.write({"vectors": Document("here", DENY)})
    assert not allowed(files.table())
    assert files.table().decide("edge", "storage", "/a.B/C").allowed
    other = await following(IntentionFiles(folder, written).watch())
    assert other == files.table()
    await files.write({}, remove=frozenset({"vectors", "unknown"}))
    assert allowed(files.table())


def test_a_second_file_for_a_destination_is_refused() -> None:
    documents = IntentionDocuments()
    both = {"a": Document("a.yaml", ALLOW), "b": Document("b.yaml", DENY)}
    assert documents.replace(both)
    assert documents.refusals == {"b": "b.yaml:1: a.yaml speaks for 'vectors' already"}
    assert documents.replace({"b": both["b"]})  # it may once the other is gone
    assert documents.entries()[0].Sources[0].Action == "deny"
