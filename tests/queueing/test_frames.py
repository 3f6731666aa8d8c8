"""What is written to RabbitMQ is what pamqp reads."""

from __future__ import annotations

import pytest
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.frame import unmarshal
from pamqp.header import ContentHeader

from services.queueing.backends.rabbit.frames import frames
from services.queueing.backends.rabbit.wire import AGAIN, HEADER, Packet

_CHANNEL, _MAX_CONTENT = 7, 10


def _read(written: bytes) -> list[object]:
    found: list[object] = []
    while written:
        size, channel, frame = unmarshal(written)
        assert channel == _CHANNEL
        found.append(frame)
        written = written[size:]
    return found


@pytest.mark.parametrize("data", [b"", b"x", b"y" * _MAX_CONTENT, b"z" * (2 * _MAX_CONTENT + 1)])
def test_a_message_is_a_publish_its_properties_and_its_content_in_frames(data: bytes) -> None:
    headers: dict[str, str | int] = {HEADER: '{"topic":"häuser"}', AGAIN: 1}
    packets = [("1.häuser", Packet(data, headers, f"id-{number}")) for number in range(2)]
    found = _read(frames("plexus.topics", packets, _CHANNEL, _MAX_CONTENT))
    for number in range(2):
        publish, header, *rest = found
        assert isinstance(publish, Basic.Publish)
        assert (publish.exchange, publish.routing_key, publish.mandatory) == (
            "plexus.topics",
            "1.häuser",
            True,
        )
        assert isinstance(header, ContentHeader)
        assert header.body_size == len(data)
        assert dict(header.properties) == dict(
            Basic.Properties(headers={**headers}, delivery_mode=2, message_id=f"id-{number}")
        )
        bodies = rest[: -(-len(data) // _MAX_CONTENT)]
        assert b"".join(body.value for body in bodies if isinstance(body, ContentBody) and body.value) == data
        found = rest[len(bodies) :]
    assert not found
