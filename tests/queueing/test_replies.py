"""Attributes of requests and replies."""

from __future__ import annotations

import pytest

from services.queueing.replies import Kind, Reply, Request, reply_of, request_of
from services.runtime.errors import NotFoundError, PlexusError, UnavailableError


def test_a_request_and_its_replies_come_back_as_they_were() -> None:
    request = Request("plexus-reply.a", "7", deadline=1234.5)
    assert request_of(request.attributes()) == request
    for reply in (
        Reply("7", Kind.PROGRESS, b"half"),
        Reply("7", Kind.RESULT, b"all"),
        Reply("7", Kind.ERROR, b"gone", "NOT_FOUND", "FILE_NOT_FOUND"),
    ):
        message = reply.message(correlation_id="order 1")
        assert reply_of(message.attributes, message.data) == reply
        assert message.correlation_id == "order 1"


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"plexus-call-id": "7"},
        {"plexus-call-id": "7", "plexus-reply": "later"},
        {"plexus-reply": "result"},
    ],
)
def test_what_is_no_reply_is_none(attributes: dict[str, str]) -> None:
    assert reply_of(attributes, b"") is None
    assert request_of(attributes) is None


def test_a_deadline_that_is_no_number_is_none() -> None:
    hostile = Request("replies", "7").attributes() | {"plexus-deadline": "-1e999"}
    assert request_of(hostile) == Request("replies", "7")


def test_an_errors_code_becomes_the_domains_error() -> None:
    gone = Reply("7", Kind.ERROR, b"gone", "NOT_FOUND", "FILE_NOT_FOUND").error({"topic": "files"})
    assert isinstance(gone, NotFoundError)
    assert (gone.message, gone.reason, gone.metadata) == ("gone", "FILE_NOT_FOUND", {"topic": "files"})
    assert isinstance(Reply("7", Kind.ERROR, b"", "UNAVAILABLE").error(), UnavailableError)
    unknown = Reply("7", Kind.ERROR, b"\xff", "NO_SUCH_CODE").error()
    assert type(unknown) is PlexusError
