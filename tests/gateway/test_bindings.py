"""REST requests as Envoy matches them, against the bindings of the protos."""

from __future__ import annotations

import re

import pytest

from services.gateway.envoy.bindings import bindings
from services.gateway.envoy.descriptors import plexus_files

VECTORS = "/plexus.vectors.v1.VectorsService/"


def methods(verb: str, path: str) -> set[str]:
    return {
        method.rpartition("/")[2]
        for method, requests in bindings(plexus_files()).items()
        if method.startswith((VECTORS, "/plexus.storage.v1.StorageService/"))
        for bound, regex in requests
        if bound == verb and re.fullmatch(regex, path)
    }


@pytest.mark.parametrize(
    ("verb", "path", "method"),
    [
        ("GET", "/v1/vectors/collections", {"ListCollections"}),
        ("GET", "/v1/vectors/collections?page_size=3&page_token=%2F", {"ListCollections"}),
        ("GET", "/v1/vectors/collections/a%2Fb", {"GetCollection"}),
        ("DELETE", "/v1/vectors/collections/a", {"DeleteCollection"}),
        ("GET", "/v1/vectors/collections/a/b/c/d", set()),
        ("PUT", "/v1/vectors/collections", set()),
    ],
)
def test_a_request_is_the_method_that_the_transcoder_makes_of_it(
    verb: str, path: str, method: set[str]
) -> None:
    assert methods(verb, path) == method


def test_every_binding_is_a_regular_expression_that_its_own_template_meets() -> None:
    for requests in bindings(plexus_files()).values():
        for verb, regex in requests:
            assert verb.isupper()
            assert regex.startswith("/")
            re.compile(regex)
