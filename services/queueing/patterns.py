"""Which topics a subscription follows: a name, or a pattern of words as AMQP's topic exchanges have it."""

from __future__ import annotations

import re
from functools import lru_cache

from services.runtime.errors import InvalidArgumentError

_WORD = r"(?:[A-Za-z0-9_-]+|\*|\#)"
_PATTERN = re.compile(rf"{_WORD}(?:\.{_WORD})*")
_MAX_LENGTH = 128


def is_pattern(topic: str) -> bool:
    """Whether this names several topics: it has a word `*` (any one) or `#` (any number of words)."""
    return "*" in topic or "#" in topic


def check_pattern(topic: str, field: str) -> str:
    """Return a valid pattern.

    Raises:
        InvalidArgumentError: It is not one.
    """
    if len(topic) > _MAX_LENGTH or not _PATTERN.fullmatch(topic):
        raise InvalidArgumentError(
            "a pattern is words between dots, each a word of a name, * for any one or # for any number",
            field=field,
        )
    return topic


@lru_cache(maxsize=4096)
def follows(pattern: str, topic: str) -> bool:
    """Whether a subscription to `pattern` gets what is published to `topic`."""
    if not is_pattern(pattern):
        return pattern == topic
    return _match(tuple(pattern.split(".")), tuple(topic.split(".")))


def _match(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    # The patterns' prefixes that match the words read so far, as in a regular expression's automaton.
    reached = {0}
    for word in (*words, None):
        for position in sorted(reached):
            at = position
            while at < len(pattern) and pattern[at] == "#":
                at += 1
                reached.add(at)
        if word is None:
            break
        reached = {
            position if pattern[position] == "#" else position + 1
            for position in reached
            if position < len(pattern) and pattern[position] in {"#", "*", word}
        }
    return len(pattern) in reached
