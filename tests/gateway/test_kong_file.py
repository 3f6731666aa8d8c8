"""gateway/kong.yml: what is honoured, what is refused, and how the refusal reads."""

# ruff: noqa: E501 - one snippet of kong.yml a line

from __future__ import annotations

import pytest

from services.gateway import kong
from services.gateway.plugins import Acl, Jwt, RateLimiting, RequestSizeLimiting
from services.runtime.config import project_file

HEAD = '_format_version: "3.0"\n'
JWT = "{name: jwt, config: {claims_to_verify: [exp, nbf], uri_param_names: []}}"


def _problems(text: str) -> list[str]:
    with pytest.raises(kong.KongFileError) as caught:
        kong.parse(text)
    return caught.value.problems


def _service(route: str, plugins: str = "") -> str:
    return f"{HEAD}services:\n- name: vectors\n  url: https://edge:8443\n  plugins: [{plugins}]\n  routes:\n  - {route}\n"


@pytest.fixture(scope="module")
def shipped() -> kong.Kong:
    return kong.load(project_file("gateway/kong.yml"))


def test_shipped_file_guards_every_route_but_the_edges_own_pages(shipped: kong.Kong) -> None:
    for effective in shipped.routes():
        guarded = effective.config(Jwt) is not None and effective.config(Acl) is not None
        assert guarded == (effective.service.name != kong.EDGE_SERVICE), effective.route.name


def test_shipped_file_bounds_every_rest_body_and_limits_every_consumer(shipped: kong.Kong) -> None:
    for effective in shipped.routes():
        assert effective.config(RateLimiting) is not None
        if not effective.route.is_grpc and effective.service.name != kong.EDGE_SERVICE:
            assert effective.config(RequestSizeLimiting) is not None, effective.route.name


def test_shipped_file_holds_no_credential() -> None:
    text = project_file("gateway/kong.yml").read_text()
    assert "secret:" not in text
    assert "jwt_secrets" not in text


def test_shipped_consumers_have_the_documented_groups(shipped: kong.Kong) -> None:
    assert {consumer.username: set(consumer.groups) for consumer in shipped.consumers} == {
        "demo": {"readers", "writers"},
        "admin": {"readers", "writers", "admins"},
        "reader": {"readers"},
    }


def test_unknown_field_is_named_with_its_path_and_line() -> None:
    text = f"{HEAD}plugins:\n- name: rate-limiting\n  config:\n    minute: 5\n    redis: {{host: x}}\n"
    assert _problems(text) == ["kong.yml:6: plugins[0].config.redis: not honoured by the embedded edge"]


def test_unknown_plugin_is_named_with_its_path_and_line() -> None:
    text = f"{HEAD}plugins:\n- name: correlation-id\n  config: {{header_name: X-Request-ID, generator: uuid}}\n- name: zipkin\n"
    assert _problems(text) == [
        "kong.yml:5: plugins[1].name: plugin 'zipkin' is not honoured by the embedded edge"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_format_version: 3.0\n", "_format_version: 3.0 is not honoured"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        (f"{HEAD}a: 1\na: 2\n", "given twice"),
        (f"{HEAD}upstreams: []\n", "upstreams: not honoured"),
        (f"{HEAD}consumers:\n- username: a\n  jwt_secrets: []\n", "credentials do not belong in this file"),
        (_service("{name: r, paths: [/v1]}"), "services[0].routes[0].strip_path: Field required"),
        (_service("{name: r, paths: [/v1], strip_path: true}"), "strip_path: True is not honoured"),
        (_service("{name: r, paths: [v1], strip_path: false}"), "must start with / or ~/"),
        (_service("{name: r, paths: [/v1], strip_path: false, hosts: [a]}"), "routes[0].hosts: not honoured"),
        (_service("{name: r, paths: [/v1], strip_path: false, methods: ['*']}"), "methods[0]"),
        (_service("{name: r, paths: [/v1], strip_path: false, protocols: [grpc]}"), "do not fit the url"),
        (
            _service("{name: r, paths: [/v1], strip_path: false}", "{name: acl, config: {allow: [a]}}"),
            "acl without jwt",
        ),
        (
            _service("{name: r, paths: [/v1], strip_path: false}", f"{JWT}, {JWT}"),
            "plugin jwt twice",
        ),
        (f"{HEAD}plugins: [{{name: acl, config: {{}}}}]\n", "exactly one of allow and deny"),
        (f"{HEAD}plugins: [{{name: rate-limiting, config: {{minute: 1, second: 2}}}}]\n", "longer window"),
        (f"{HEAD}plugins: [{{name: rate-limiting, config: {{minute: 0}}}}]\n", "minute"),
        (
            f"{HEAD}plugins: [{{name: rate-limiting, config: {{minute: 1, policy: redis}}}}]\n",
            "'redis' is not honoured",
        ),
        (
            f"{HEAD}plugins: [{{name: jwt, config: {{claims_to_verify: [exp], uri_param_names: []}}}}]\n",
            "must list exp and nbf",
        ),
        (
            f"{HEAD}plugins: [{{name: jwt, config: {{claims_to_verify: [exp, nbf], uri_param_names: [jwt]}}}}]\n",
            "uri_param_names",
        ),
        (
            f"{HEAD}plugins: [{{name: jwt, config: {{claims_to_verify: [exp, nbf], uri_param_names: [], anonymous: x}}}}]\n",
            "config.anonymous: not honoured",
        ),
    ],
)
def test_what_the_edge_cannot_honour_is_refused(text: str, expected: str) -> None:
    assert expected in "\n".join(_problems(text))


def test_narrowest_scope_wins_whole() -> None:
    text = (
        f"{HEAD}plugins: [{{name: rate-limiting, config: {{second: 5, minute: 9}}}}]\n"
        "services:\n- name: vectors\n  url: https://edge:8443\n  routes:\n"
        "  - {name: a, paths: [/a], strip_path: false}\n"
        "  - {name: b, paths: [/b], strip_path: false, plugins: [{name: rate-limiting, config: {minute: 3}}]}\n"
    )
    limits = {r.route.name: r.config(RateLimiting) for r in kong.parse(text).routes()}
    assert limits["a"] is not None
    assert limits["b"] is not None
    assert limits["a"].config.windows() == {"second": 5, "minute": 9}
    assert limits["b"].config.windows() == {"minute": 3}


def test_routes_are_tried_in_kongs_order() -> None:
    text = (
        f"{HEAD}services:\n- name: vectors\n  url: https://edge:8443\n  routes:\n"
        "  - {name: short, paths: [/p], strip_path: false}\n"
        "  - {name: long, paths: [/p/long], strip_path: false}\n"
        '  - {name: regex, paths: ["~/p(/|$)"], strip_path: false}\n'
        '  - {name: urgent, paths: ["~/p"], strip_path: false, regex_priority: 5}\n'
        "  - {name: method, paths: [/], strip_path: false, methods: [GET]}\n"
    )
    assert [r.route.name for r in kong.parse(text).routes()] == ["method", "urgent", "regex", "long", "short"]
