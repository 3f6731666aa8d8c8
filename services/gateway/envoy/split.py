"""One route of kong.yml as several: by the conditions and shares of the service's traffic policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.mesh.xds.endpoints import SUBSET_FILTER, SUBSET_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from services.gateway.envoy.types import Edge, Json
    from services.gateway.traffic import Way


def split(route: Json, edge: Edge, service: str, *, grpc: bool) -> Iterator[Json]:
    """The routes to put in place of one, in order.

    Args:
        route: Envoy's route, which leads to the service.
        edge: With the policies and the REST bindings.
        service: The mesh service.
        grpc: It takes native gRPC, whose paths are methods; else REST.
    """
    ways = edge.ways.get(service, ())
    if not ways:
        yield route
        return
    for way in ways:
        for on_path in _on_paths(way, edge.bindings, grpc=grpc):
            headers = [*route["match"].get("headers", ()), *on_path, *way.headers]
            match = {**route["match"], **({"headers": headers} if headers else {})}
            action = {key: value for key, value in route["route"].items() if key != "cluster"}
            yield {**route, "match": match, "route": {**action, **_towards(service, way)}}


def _on_paths(way: Way, bindings: Mapping[str, list[tuple[str, str]]], *, grpc: bool) -> Iterator[list[Json]]:
    """Header matchers for the paths of a way; several lists are alternatives."""
    if way.any_path:
        yield []
    elif grpc:
        condition = {"exact": way.method} if way.method else {"prefix": way.prefix}
        yield [{"name": ":path", "string_match": condition}]
    else:
        by_verb: dict[str, list[str]] = {}
        for path, requests in bindings.items():
            if way.takes(path):
                for verb, regex in requests:
                    by_verb.setdefault(verb, []).append(regex)
        for verb, found in sorted(by_verb.items()):
            paths = {"safe_regex": {"regex": "|".join(sorted(found))}}
            yield [
                {"name": ":method", "string_match": {"exact": verb}},
                {"name": ":path", "string_match": paths},
            ]


def _towards(service: str, way: Way) -> Json:
    if not way.shares:
        return {"cluster": service}
    if len(way.shares) == 1:
        ((subset, _),) = way.shares
        return {"cluster": service, "metadata_match": _subset(subset)}
    clusters = [
        {"name": service, "weight": weight, "metadata_match": _subset(subset)}
        for subset, weight in way.shares
    ]
    return {"weighted_clusters": {"clusters": clusters}}


def _subset(name: str) -> Json:
    return {"filter_metadata": {SUBSET_FILTER: {SUBSET_KEY: name}}}


def by_subset() -> Json:
    """What a cluster needs to choose among its endpoints by subset and by weight.

    A subset that has just lost its last instance is answered by any other, until the routes leave it out.
    """
    return {
        "lb_subset_config": {
            "fallback_policy": "ANY_ENDPOINT",
            "subset_selectors": [{"keys": [SUBSET_KEY]}],
            "list_as_any": True,
            "locality_weight_aware": True,
        },
        "common_lb_config": {"locality_weighted_lb_config": {}},
    }
