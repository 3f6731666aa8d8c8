"""Filters and patterns: who gets a message."""

from __future__ import annotations

import pytest

from services.queueing.filters import compiled
from services.queueing.patterns import follows
from services.queueing.resources import Subscription
from services.runtime.errors import InvalidArgumentError

ATTRIBUTES = {"name": "com", "iana.org/language": "en", "lang": "de-AT"}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", True),
        ("attributes:name", True),
        ("attributes:other", False),
        ('attributes.name = "com"', True),
        ('attributes.name = "org"', False),
        ('attributes.name != "org"', True),
        ('attributes."iana.org/language" = "en"', True),
        ('hasPrefix(attributes.lang, "de")', True),
        ('hasPrefix(attributes.lang, "en")', False),
        ('NOT hasPrefix(attributes.lang, "en")', True),
        ("-attributes:name", False),
        ('attributes:name AND attributes.lang = "de-AT"', True),
        ("attributes:x OR attributes:y OR attributes:name", True),
        ("attributes:x AND (attributes:y OR attributes:name)", False),
        ("(attributes:x AND attributes:y) OR attributes:name", True),
        (r'attributes.name = "a\"b"', False),
    ],
)
def test_a_filter_tests_attributes(expression: str, *, expected: bool) -> None:
    assert compiled(expression)(ATTRIBUTES) is expected


@pytest.mark.parametrize(
    "expression",
    [
        "attributes",
        "attributes.name",
        "attributes.name = com",
        "name = 'com'",
        "attributes:a AND attributes:b OR attributes:c",
        "(attributes:a",
        'attributes.a = "unclosed',
        "attributes:a attributes:b",
        "hasPrefix(attributes.a)",
        "(" * 200,
        "attributes:a OR " * 30 + "attributes:a",
        "NOT " * 50 + "attributes:a",
        "; DROP TABLE messages",
    ],
)
def test_what_is_no_filter_is_refused(expression: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Subscription("s", "t", filter=expression)


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("orders", "orders", True),
        ("orders", "orders.eu", False),
        ("orders.*", "orders.eu", True),
        ("orders.*", "orders", False),
        ("orders.*", "orders.eu.created", False),
        ("orders.*.created", "orders.eu.created", True),
        ("orders.#", "orders", True),
        ("orders.#", "orders.eu.created", True),
        ("#.created", "orders.eu.created", True),
        ("#.created", "created", True),
        ("#.eu.#", "orders.eu.created", True),
        ("#.us.#", "orders.eu.created", False),
        ("#.*", "a", True),
        ("#", "anything.at.all", True),
    ],
)
def test_a_pattern_names_topics_as_amqp_does(pattern: str, topic: str, *, expected: bool) -> None:
    assert follows(pattern, topic) is expected


@pytest.mark.parametrize("pattern", ["a.*b", "*..a", ".*", "a b.*", "#" * 129])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Subscription("s", pattern)
