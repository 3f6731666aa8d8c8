"""docs/pubsub.md names every method of the google-cloud-pubsub package, and tells what the server does."""

from __future__ import annotations

import asyncio
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio

from services.queueing.faces.pubsub_access import GROUPS, PACKAGE
from tests.queueing.pubsub_clients import WAIT_S

if TYPE_CHECKING:
    from tests.queueing.pubsub_clients import Clients

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "pubsub.md"
_ROW = re.compile(r"^\| (\w+) \| (full|partial|UNIMPLEMENTED) \| (.*?) ?\|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, str]]:
    """Support and difference by the path of a method."""
    found = {}
    for section in _PAGE.read_text().split("\n## ")[1:]:
        service = section.partition("\n")[0]
        for method, support, difference in _ROW.findall(section):
            found[f"/{PACKAGE}.{service}/{method}"] = (support, difference)
    return found


def there() -> set[str]:
    """The methods of Google's own clients."""
    metadata = json.loads((resources.files("google.pubsub_v1") / "gapic_metadata.json").read_text())
    return {
        f"/{PACKAGE}.{service}/{method}"
        for service, clients in metadata["services"].items()
        for method in clients["clients"]["grpc"]["rpcs"]
    }


def test_the_page_and_the_rules_of_access_name_every_method() -> None:
    assert set(documented()) == there() == set(GROUPS)


def test_a_partial_method_says_in_what_it_differs() -> None:
    assert all(difference for support, difference in documented().values() if support == "partial")


async def answer(channel: Any, path: str) -> grpc.StatusCode:
    """The status of an empty request, which names nothing."""
    if path.endswith("/StreamingPull"):
        call = channel.stream_stream(path)(iter([b""]))
    else:
        call = channel.unary_unary(path)(b"")
    code: grpc.StatusCode = await asyncio.wait_for(call.code(), WAIT_S)
    assert await call.details()
    return code


async def test_the_server_answers_as_the_page_says(sqlite_clients: Clients) -> None:
    async with grpc.aio.insecure_channel(sqlite_clients.address) as channel:
        answers = {path: await answer(channel, path) for path in there()}
    assert answers == {
        path: grpc.StatusCode.UNIMPLEMENTED
        if support == "UNIMPLEMENTED"
        else grpc.StatusCode.INVALID_ARGUMENT
        for path, (support, _) in documented().items()
    }
