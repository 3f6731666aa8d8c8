"""Messages in the bytes of AMQP 0-9-1.

pamqp makes objects for each frame, and copies the content for each of them; here what all our messages have
in common is written once, and the content is copied into one piece with all the rest.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pamqp import encode
from pamqp.commands import Basic
from pamqp.constants import FRAME_BODY, FRAME_END_CHAR, FRAME_HEADER
from pamqp.frame import marshal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.queueing.backends.rabbit.wire import Packet

_FRAME = struct.Struct(">BHI")
_CONTENT = struct.Struct(">HxxQH")
"""Class, content's length, and which properties follow, in the order of their flags."""
_FLAGS = sum(Basic.Properties.flags[name] for name in ("headers", "delivery_mode", "message_id"))
_PERSISTENT = b"\x02"


def frames(exchange: str, packets: Iterable[tuple[str, Packet]], channel: int, max_content: int) -> bytes:
    """Publish messages, each with its routing key; persistent, and returned if no queue has them.

    Args:
        exchange: Where to.
        packets: What.
        channel: Number of the channel.
        max_content: Bytes of content in one frame.
    """
    pieces: list[bytes] = []
    publishes: dict[str, bytes] = {}  # most go the same way
    for key, packet in packets:
        if key not in publishes:
            publish = Basic.Publish(exchange=exchange, routing_key=key, mandatory=True)
            publishes[key] = marshal(publish, channel)
        headers, message_id = encode.field_table({**packet.headers}), encode.short_string(packet.message_id)
        properties = headers + _PERSISTENT + message_id
        content = _CONTENT.pack(Basic.frame_id, len(packet.data), _FLAGS)
        size = len(content) + len(properties)
        header = _FRAME.pack(FRAME_HEADER, channel, size)
        pieces += (publishes[key], header, content, properties, FRAME_END_CHAR)
        for start in range(0, len(packet.data), max_content):
            body = packet.data[start : start + max_content]
            pieces += (_FRAME.pack(FRAME_BODY, channel, len(body)), body, FRAME_END_CHAR)
    return b"".join(pieces)
