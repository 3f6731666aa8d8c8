"""The Kong plugins that the embedded edge honours, field by field; any other field is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GROUP_PATTERN = r"^[A-Za-z0-9._-]+$"
Group = Annotated[str, Field(pattern=GROUP_PATTERN, max_length=64)]


class Model(BaseModel):
    """Base of everything in kong.yml: frozen, typed as written, nothing ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BasePlugin(Model):
    """What every plugin has."""

    id: str | None = None
    instance_name: str | None = None
    enabled: bool = True
    """False: as if it were not there."""
    tags: list[str] = []


class JwtConfig(Model):
    """Bearer tokens whose `iss` names a credential; expiry and not-before are always verified."""

    key_claim_name: Literal["iss"] = "iss"
    claims_to_verify: list[Literal["exp", "nbf"]]
    header_names: list[Literal["authorization", "Authorization"]] = Field(
        default=["authorization"], min_length=1, max_length=1
    )
    uri_param_names: list[str] = Field(max_length=0)
    """Must be the empty list: a token in a URL ends up in logs (Kong's own default is `jwt`)."""
    cookie_names: list[str] = Field(default=[], max_length=0)
    secret_is_base64: Literal[False] = False
    run_on_preflight: bool = True
    """Without effect here: the cors plugin answers preflights before this one runs."""
    maximum_expiration: Literal[0] = 0

    @model_validator(mode="after")
    def _verifies_both(self) -> JwtConfig:
        if set(self.claims_to_verify) != {"exp", "nbf"}:
            raise ValueError("claims_to_verify must list exp and nbf: the edge always verifies both")
        return self


class Jwt(BasePlugin):
    """Authentication by token."""

    name: Literal["jwt"]
    config: JwtConfig


class AclConfig(Model):
    """Groups that may pass, or all but those that may not."""

    allow: list[Group] | None = Field(default=None, min_length=1)
    deny: list[Group] | None = Field(default=None, min_length=1)
    hide_groups_header: Literal[False] = False

    @model_validator(mode="after")
    def _one_of(self) -> AclConfig:
        if (self.allow is None) == (self.deny is None):
            raise ValueError("exactly one of allow and deny")
        return self


class Acl(BasePlugin):
    """Authorization by group."""

    name: Literal["acl"]
    config: AclConfig


WINDOWS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
"""Kong's window names that the edge counts, with their length."""


class RateLimitingConfig(Model):
    """Fixed windows of UTC time; a refused request counts in none of them."""

    second: int | None = Field(default=None, gt=0)
    minute: int | None = Field(default=None, gt=0)
    hour: int | None = Field(default=None, gt=0)
    day: int | None = Field(default=None, gt=0)
    limit_by: Literal["consumer", "credential", "ip", "service"] = "consumer"
    """Whose requests are counted together; without a consumer, the client's address."""
    policy: Literal["local"] = "local"
    fault_tolerant: Literal[True] = True
    hide_client_headers: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> RateLimitingConfig:
        limits = [limit for limit in (self.second, self.minute, self.hour, self.day) if limit is not None]
        if not limits:
            raise ValueError("at least one of second, minute, hour, day")
        if limits != sorted(limits):
            raise ValueError("the limit of a longer window must not be below that of a shorter one")
        return self

    def windows(self) -> dict[str, int]:
        """The limit of each configured window, shortest first."""
        return {name: limit for name in WINDOWS_S if (limit := getattr(self, name)) is not None}


class RateLimiting(BasePlugin):
    """Request limits."""

    name: Literal["rate-limiting"]
    config: RateLimitingConfig


class CorsConfig(Model):
    """Cross-origin rules; an origin is a literal, `*`, or an anchored regular expression."""

    origins: list[str] = Field(min_length=1)
    methods: list[Literal["GET", "HEAD", "PUT", "PATCH", "POST", "DELETE", "OPTIONS"]] = Field(min_length=1)
    headers: list[str] = Field(min_length=1)
    """Required, unlike in Kong: the edge does not echo what a browser asks for."""
    exposed_headers: list[str] = []
    credentials: bool = False
    max_age: int | None = Field(default=None, ge=0)
    preflight_continue: Literal[False] = False
    private_network: Literal[False] = False


class Cors(BasePlugin):
    """Cross-origin resource sharing."""

    name: Literal["cors"]
    config: CorsConfig


_UNITS = {"megabytes": 1 << 20, "kilobytes": 1 << 10, "bytes": 1}


class RequestSizeLimitingConfig(Model):
    """The largest request body; a stream is counted as it passes."""

    allowed_payload_size: int = Field(default=128, gt=0)
    size_unit: Literal["megabytes", "kilobytes", "bytes"] = "megabytes"
    require_content_length: Literal[False] = False

    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return self.allowed_payload_size * _UNITS[self.size_unit]


class RequestSizeLimiting(BasePlugin):
    """Body size limits."""

    name: Literal["request-size-limiting"]
    config: RequestSizeLimitingConfig


class CorrelationIdConfig(Model):
    """The request id: the client's own, or a new UUID."""

    header_name: Literal["X-Request-ID", "X-Request-Id", "x-request-id"]
    generator: Literal["uuid"]
    echo_downstream: bool = False


class CorrelationId(BasePlugin):
    """Request ids."""

    name: Literal["correlation-id"]
    config: CorrelationIdConfig


Plugin = Annotated[
    Jwt | Acl | RateLimiting | Cors | RequestSizeLimiting | CorrelationId, Field(discriminator="name")
]
