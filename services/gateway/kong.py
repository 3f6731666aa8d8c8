"""gateway/kong.yml: the part of Kong's declarative format that the embedded edge honours.

Everything else in the file is an error that names its path and line: a field silently ignored would be a
silently open door.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from services.gateway import plugins as known
from services.gateway.plugins import Group, Model
from services.runtime import yaml_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EDGE_SERVICE = "edge"
"""The Kong service whose routes the edge answers itself."""
PAGES = ("healthz", "docs", "openapi")
"""Names of the routes that service may have."""
GRPC_SUFFIX = "-grpc"
_CREDENTIALS = ("jwt_secrets", "keyauth_credentials", "basicauth_credentials", "hmacauth_credentials")


class KongFileError(ValueError):
    """kong.yml cannot be honoured.

    Attributes:
        problems: One text per problem: path, line and reason.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Route(Model):
    """Paths that lead to a service."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    id: str | None = None
    paths: list[str] = Field(min_length=1)
    """`~` and a regular expression anchored at the start, or a bare string prefix."""
    methods: list[Literal["GET", "HEAD", "PUT", "PATCH", "POST", "DELETE", "OPTIONS"]] | None = Field(
        default=None, min_length=1
    )
    protocols: list[Literal["http", "https", "grpc", "grpcs"]] = Field(default=["http", "https"])
    strip_path: Literal[False]
    """Must be false: the proto's annotations hold whole paths (Kong's own default is true)."""
    regex_priority: int = 0
    request_buffering: bool = True
    """Without effect here: the edge never holds a streamed body."""
    response_buffering: bool = True
    """As request_buffering."""
    path_handling: Literal["v0"] = "v0"
    tags: list[str] = Field(default_factory=list)
    plugins: list[known.Plugin] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Route:
        if {"http", "https"} & set(self.protocols) and {"grpc", "grpcs"} & set(self.protocols):
            raise ValueError("protocols: http and grpc cannot share a route")
        for path in self.paths:
            if not path.startswith(("/", "~/")):
                raise ValueError(f"paths: {path!r} must start with / or ~/")
        if len({path.startswith("~") for path in self.paths}) > 1:
            raise ValueError("paths: regular expressions and prefixes in one route; give each its own")
        return self

    @property
    def is_grpc(self) -> bool:
        """Whether the route takes native gRPC."""
        return bool({"grpc", "grpcs"} & set(self.protocols))


class Service(Model):
    """What routes lead to: the mesh service of the same name, with `-grpc` cut off."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    id: str | None = None
    url: str
    """Where Kong finds the edge; the edge itself takes the instances from the mesh."""
    retries: int = Field(default=5, ge=0, le=32)
    """Further attempts after a failed connection; a request that reached an instance is never repeated."""
    connect_timeout: int = Field(default=60000, gt=0)
    """Milliseconds."""
    read_timeout: int = Field(default=60000, gt=0)
    """Longest silence of a call, in milliseconds."""
    tags: list[str] = Field(default_factory=list)
    plugins: list[known.Plugin] = Field(default_factory=list)
    routes: list[Route] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_url(self) -> Service:
        parts = urlsplit(self.url)
        if parts.scheme not in {"https", "grpcs"} or not parts.hostname:
            raise ValueError("url: must be https:// or grpcs:// and name the edge's host")
        if parts.path or parts.query or parts.fragment or parts.username:
            raise ValueError("url: only a host and a port; a path would be prepended to every request")
        for route in self.routes:
            if route.is_grpc != (parts.scheme == "grpcs"):
                raise ValueError(
                    f"routes: protocols of {route.name!r} do not fit the url's scheme {parts.scheme}"
                )
            if self.name == EDGE_SERVICE and route.name not in PAGES:
                raise ValueError(f"routes: the edge itself only has {', '.join(PAGES)}, not {route.name!r}")
        return self

    @property
    def mesh_service(self) -> str:
        """Name of the service in the mesh."""
        return self.name.removesuffix(GRPC_SUFFIX)


class AclGroup(Model):
    """Membership."""

    group: Group
    tags: list[str] = Field(default_factory=list)


class Consumer(Model):
    """A known application or user; its credentials are in the credential store."""

    username: str = Field(pattern=r"^[A-Za-z0-9._@-]+$", max_length=64)
    id: str | None = None
    tags: list[str] = Field(default_factory=list)
    acls: list[AclGroup] = Field(default_factory=list)
    plugins: list[known.RateLimiting] = Field(default=[], max_length=1)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the consumer's groups."""
        return tuple(acl.group for acl in self.acls)


PluginT = TypeVar("PluginT", bound=known.BasePlugin)


@dataclass(frozen=True, slots=True)
class Scoped:
    """A plugin with where it stands: `global`, `service:<name>`, `route:<name>` or `consumer:<name>`."""

    scope: str
    plugin: known.Plugin


@dataclass(frozen=True, slots=True)
class EffectiveRoute:
    """A route, its service, and the plugins that act on it, by name."""

    service: Service
    route: Route
    plugins: dict[str, Scoped]

    def config(self, kind: type[PluginT]) -> PluginT | None:
        """The plugin of this type that acts on the route, if any."""
        for scoped in self.plugins.values():
            if isinstance(scoped.plugin, kind):
                return scoped.plugin
        return None


class Kong(Model):
    """The whole file."""

    format_version: Literal["3.0"] = Field(alias="_format_version")
    plugins: list[known.Plugin] = Field(default_factory=list)
    consumers: list[Consumer] = Field(default_factory=list)
    services: list[Service] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique(self) -> Kong:
        for kind, names in (
            ("services", [service.name for service in self.services]),
            ("routes", [route.name for service in self.services for route in service.routes]),
            ("consumers", [consumer.username for consumer in self.consumers]),
        ):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{kind}: {', '.join(repeated)} named twice")
        for scope, listed in self._scopes():
            names = [plugin.name for plugin in listed]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{scope}: plugin {', '.join(repeated)} twice")
        for effective in self.routes():
            if "acl" in effective.plugins and "jwt" not in effective.plugins:
                raise ValueError(f"routes: {effective.route.name!r} has acl without jwt; nobody could pass")
        correlation = [s for s, listed in self._scopes() for p in listed if p.name == "correlation-id"]
        if any(scope != "global" for scope in correlation):
            raise ValueError("plugins: correlation-id is honoured globally only")
        return self

    def _scopes(self) -> Iterator[tuple[str, list[known.Plugin]]]:
        yield "global", self.plugins
        for service in self.services:
            yield f"service:{service.name}", service.plugins
            for route in service.routes:
                yield f"route:{route.name}", route.plugins

    def routes(self) -> Iterator[EffectiveRoute]:
        """All routes in the order in which Kong tries them.

        Routes with more kinds of attributes come first, then regular expressions by priority, then the
        longest prefix. For each plugin name the narrowest scope wins, its configuration whole.
        """
        found = []
        for service in self.services:
            for route in service.routes:
                effective: dict[str, Scoped] = {}
                for scope, listed in (
                    ("global", self.plugins),
                    (f"service:{service.name}", service.plugins),
                    (f"route:{route.name}", route.plugins),
                ):
                    effective.update({p.name: Scoped(scope, p) for p in listed if p.enabled})
                found.append(EffectiveRoute(service, route, effective))
        yield from sorted(found, key=_kong_order)

    def limits(self) -> Iterator[tuple[str, known.RateLimitingConfig]]:
        """Every rate limit with its scope."""
        for scope, listed in self._scopes():
            for plugin in listed:
                if isinstance(plugin, known.RateLimiting) and plugin.enabled:
                    yield scope, plugin.config
        for consumer in self.consumers:
            for limit in consumer.plugins:
                if limit.enabled:
                    yield f"consumer:{consumer.username}", limit.config

    def echoes_request_id(self) -> bool:
        """Whether answers carry the request id."""
        return any(
            isinstance(p, known.CorrelationId) and p.enabled and p.config.echo_downstream
            for p in self.plugins
        )


def _kong_order(effective: EffectiveRoute) -> tuple[int, int, int, int]:
    route = effective.route
    is_regex = any(path.startswith("~") for path in route.paths)
    return (
        0 if route.methods else 1,
        0 if is_regex else 1,
        -route.regex_priority,
        -max(len(path) for path in route.paths),
    )


def load(path: Path) -> Kong:
    """Read and check a file.

    Raises:
        KongFileError: It cannot be read, or holds anything that the edge does not honour.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KongFileError([f"{path}: {error}"]) from error
    return parse(text, name=path.name)


def parse(text: str, *, name: str = "kong.yml") -> Kong:
    """Check the text of a file; `name` is what errors call it.

    Raises:
        KongFileError: As `load`.
    """
    try:
        data, lines = yaml_lines.load(text)
    except yaml_lines.YamlError as error:
        raise KongFileError([f"{name}: {error}"]) from error
    if not isinstance(data, dict):
        raise KongFileError([f"{name}:1: must be a mapping"])
    try:
        return Kong.model_validate(data)
    except ValidationError as error:
        problems = [_problem(name, data, lines, dict(item)) for item in error.errors(include_url=False)]
        raise KongFileError(problems) from error


def _problem(name: str, data: Any, lines: dict[yaml_lines.Path, int], item: dict[str, Any]) -> str:
    """One problem as `file:line: path: reason`."""
    path: list[str | int] = []
    line = 1
    node = data
    location = item["loc"]
    for position, step in enumerate(location):
        inside = (isinstance(node, dict) and step in node) or (
            isinstance(node, list) and isinstance(step, int) and step < len(node)
        )
        if inside:
            node = node[step]
            path.append(step)
            line = lines.get(tuple(path), line)
        elif position == len(location) - 1 and item["type"] == "missing":
            path.append(step)
        # Any other step is a union's tag, which stands nowhere in the file.
    reason = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        reason = "not honoured by the embedded edge"
        if path and path[-1] in _CREDENTIALS:
            reason = "credentials do not belong in this file; the edge keeps them in the state folder"
    elif item["type"] == "union_tag_invalid":
        path.append("name")
        reason = f"plugin {item['ctx']['tag']!r} is not honoured by the embedded edge"
    elif item["type"] == "literal_error":
        reason = f"{item['input']!r} is not honoured by the embedded edge (only {item['ctx']['expected']})"
    return f"{name}:{line}: {yaml_lines.dotted(path)}: {reason}" if path else f"{name}:{line}: {reason}"
