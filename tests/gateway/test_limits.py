"""Kong's fixed windows, by the clock that the test holds."""

from __future__ import annotations

from services.gateway import kong
from services.gateway.limits import Limiter

_FILE = """
_format_version: "3.0"
plugins:
- {name: rate-limiting, config: {second: 2, minute: 3}}
consumers:
- {username: vip, plugins: [{name: rate-limiting, config: {minute: 5}}]}
services:
- name: vectors
  url: https://edge:8443
  plugins: [{name: rate-limiting, config: {minute: 1, limit_by: service, hide_client_headers: true}}]
"""
START = 1_800_000_000.0  # the start of a minute


class _Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def _limiter(**options: int) -> tuple[Limiter, _Clock]:
    clock = _Clock()
    return Limiter(kong.parse(_FILE), now=clock, **options), clock


def _facts(consumer: str | None = "demo", scope: str = "global", address: str = "10.0.0.1") -> dict[str, str]:
    facts = {"scope": scope, "service": "vectors", "remote_address": address}
    return {**facts, "consumer": consumer} if consumer else facts


def test_refusal_of_the_second_leaves_the_minute_untouched() -> None:
    limiter, clock = _limiter()
    assert [limiter.decide(_facts()).allowed for _ in range(4)] == [True, True, False, False]
    refused = dict(limiter.decide(_facts()).headers)
    assert refused["X-RateLimit-Remaining-Minute"] == "1"
    assert refused["X-RateLimit-Remaining-Second"] == "0"
    assert refused["Retry-After"] == refused["RateLimit-Reset"] == "1"
    clock.now += 1
    assert [limiter.decide(_facts()).allowed for _ in range(2)] == [True, False]
    tight = dict(limiter.decide(_facts()).headers)
    assert tight["RateLimit-Limit"] == "3"
    assert tight["Retry-After"] == "59"


def test_windows_start_at_the_minute_of_the_clock() -> None:
    limiter, clock = _limiter()
    clock.now = START + 59.5
    for _ in range(2):
        assert limiter.decide(_facts()).allowed
    clock.now = START + 60
    for _ in range(2):
        assert limiter.decide(_facts()).allowed


def test_consumers_are_counted_apart_and_strangers_by_address() -> None:
    limiter, _ = _limiter()
    for facts in (_facts("a"), _facts("b"), _facts(None), _facts(None, address="10.0.0.2")):
        assert [limiter.decide(facts).allowed for _ in range(3)] == [True, True, False]


def test_consumers_own_limit_replaces_the_routes_and_spans_all() -> None:
    limiter, _ = _limiter()
    allowed = [limiter.decide(_facts("vip", scope)).allowed for scope in ("global", "service:vectors") * 3]
    assert allowed == [True] * 5 + [False]


def test_service_limit_is_shared_and_can_hide_its_headers() -> None:
    limiter, _ = _limiter()
    first = limiter.decide(_facts("a", "service:vectors"))
    second = limiter.decide(_facts("b", "service:vectors"))
    assert (first.allowed, second.allowed) == (True, False)
    assert first.headers == second.headers == ()


def test_counters_stay_over_a_reload_and_are_bounded() -> None:
    limiter, _ = _limiter(max_identities=2)
    for _ in range(2):
        limiter.decide(_facts("a"))
    limiter.reconfigure(kong.parse(_FILE))
    assert not limiter.decide(_facts("a")).allowed
    for name in ("b", "c"):
        limiter.decide(_facts(name))
    assert limiter.decide(_facts("a")).allowed  # forgotten: two others came since


def test_unknown_scope_is_not_limited() -> None:
    limiter, _ = _limiter()
    assert limiter.decide(_facts(scope="route:none")).headers == ()
