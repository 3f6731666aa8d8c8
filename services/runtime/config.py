"""Configuration: environment, then plexus.yaml, then defaults; every value knows where it came from.

`PLEXUS_<SECTION>__<KEY>` sets a key (`__` again for nested ones); `PLEXUS_<SECTION>__<KEY>_FILE` names a
file whose content is the value, for secrets. `PLEXUS_CONFIG` names the YAML file; default: ./plexus.yaml.
A section or key that nobody reads is an error: a typo must not silently become a default.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from services.runtime.addresses import bracketed, is_loopback
from services.runtime.errors import FieldViolation, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SECTIONS = (
    "server",
    "mesh",
    "consul",
    "telemetry",
    "gateway",
    "vectors",
    "storage",
    "search",
    "inference",
    "queueing",
    "knowledge",
)
"""Names of all sections; each is one Section model, owned by the package that reads it."""

_PREFIX = "PLEXUS_"

IPAddress = Annotated[str, AfterValidator(lambda value: str(ipaddress.ip_address(value)))]
"""Type of a key that is an IP address, which is kept in its shortest form."""


class Section(BaseModel):
    """Base of a configuration section: frozen, unknown keys refused, attribute docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerConfig(Section):
    """Bounds of every gRPC server."""

    host: IPAddress = "127.0.0.1"
    """IP address that servers listen on and are registered with: this host's own in a mesh of several hosts,
    which needs Consul. Health checks stay on the loopback address; for metrics and the edge there are
    `telemetry.metrics_host` and `gateway.host`."""
    max_concurrent_calls: int = 1000
    """Calls handled at once, streams included; one more gets RESOURCE_EXHAUSTED."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Largest message taken or sent, after decompression."""
    default_deadline_s: float = 300.0
    """Deadline of a unary call whose caller set none."""
    drain_s: float = 10.0
    """How long running calls may go on at a stop."""
    min_ping_interval_s: float = Field(default=10.0, gt=0)
    """How often a client may ask for a sign of life while nothing is sent; the connection of one that asks
    more often is closed. The SDK asks every 20 s while it has calls."""
    reflection: bool = False
    """Serve gRPC reflection; for development only, it names every method to anyone with a certificate."""

    @property
    def netloc(self) -> str:
        """The host as it stands before `:port`."""
        return bracketed(self.host)

    @property
    def reachable_as(self) -> str:
        """The same for callers: a name that certificates carry."""
        return "localhost" if is_loopback(self.host) else self.netloc


class MeshConfig(Section):
    """Registration and identity."""

    lease_s: float = 10.0
    """An instance that has not renewed its registration for this long is gone."""
    certificate_ttl_s: float = 24 * 3600.0
    """Life of a certificate from the local CA; renewed at two thirds of it."""
    intentions: Path | None = None
    """Folder of service-intentions files, watched; default: the ones shipped with Plexus. What
    `plexus mesh apply` writes goes into the state folder and comes first."""
    policies: Path | None = None
    """Folder of traffic policies, watched; default: the ones shipped with Plexus. What `plexus mesh apply`
    writes goes into the state folder and comes first."""
    zone: str = "local"
    """Failure domain that this process runs in."""
    version: str = ""
    """Version of this process's service, by which policies tell a canary from the rest; default: that of
    Plexus."""
    control_planes: tuple[str, ...] = ()
    """Control planes as host:port, comma separated in a variable; default: the one that `plexus up` started.
    One name with several addresses, as in Consul's DNS, beats several names: clients go from an address that
    ends to the next at once, but to another name only for services they do not know yet."""
    control_port: int = Field(default=0, ge=0, le=65535)
    """Port of the control plane on this host; 0: chosen free once and kept in the state folder. Clients on
    other hosts have it in their `control_planes`."""
    max_streams: int = 20_000
    """Calls that the control plane handles at once; every client of the mesh holds a stream."""

    @field_validator("control_planes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )


class TelemetryConfig(Section):
    """Logs, traces and metrics."""

    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "auto"
    """json, console, or auto: console on a terminal."""
    otlp_endpoint: str | None = None
    """OTLP/HTTP endpoint of a collector; none: trace context is passed on and no span is exported."""
    sample_ratio: float = 1.0
    """Share of traces started here that are exported."""
    metrics_host: IPAddress = "127.0.0.1"
    """IP address at which a process serves its metrics, to whoever reaches it: there is no login."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the metrics; 0 is a free one. Another is for `plexus serve`, which is one process."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One configuration value with its origin: the variable, the file, or `default`."""

    key: str
    value: str
    source: str


SectionT = TypeVar("SectionT", bound=Section)


class Settings:
    """All configured values, unvalidated, until a section's model reads its part."""

    def __init__(self, environment: Mapping[str, str] | None = None, file: Path | None = None) -> None:
        """Read the environment and the file.

        Args:
            environment: Variables; the process's own by default.
            file: The YAML file; default `PLEXUS_CONFIG`, else ./plexus.yaml if it exists.

        Raises:
            InvalidArgumentError: An unknown section, an unreadable file, or a value given twice.
        """
        env = os.environ if environment is None else environment
        self._values: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, str] = {}
        path = file or (Path(env["PLEXUS_CONFIG"]) if env.get("PLEXUS_CONFIG") else None)
        if path is None and Path("plexus.yaml").is_file():
            path = Path("plexus.yaml")
        if path is not None:
            self._read_file(path)
        self._read_environment(env)

    def _read_file(self, path: Path) -> None:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InvalidArgumentError(f"{path}: {error}", reason="CONFIG_UNREADABLE") from error
        if not isinstance(content, dict):
            raise InvalidArgumentError(f"{path}: must be a mapping of sections", reason="CONFIG_INVALID")
        for section, keys in content.items():
            self._check_section(str(section), str(path))
            if not isinstance(keys, dict):
                raise InvalidArgumentError(
                    f"{path}: {section} must be a mapping of keys", reason="CONFIG_INVALID"
                )
            self._values[section] = dict(keys)
            for key in _leaves(keys):
                self._sources[f"{section}.{key}"] = str(path)

    def _read_environment(self, env: Mapping[str, str]) -> None:
        for name in sorted(env):
            if not name.startswith(_PREFIX) or "__" not in name:
                continue
            section, *keys = name[len(_PREFIX) :].lower().split("__")
            if section == "test":
                continue  # PLEXUS_TEST_… belongs to the test suite
            self._check_section(section, name)
            value: str = env[name]
            if keys[-1].endswith("_file"):
                keys[-1] = keys[-1].removesuffix("_file")
                try:
                    value = Path(value).read_text().rstrip("\n")
                except OSError as error:
                    raise InvalidArgumentError(f"{name}: {error}", reason="CONFIG_UNREADABLE") from error
            target = self._values.setdefault(section, {})
            for key in keys[:-1]:
                target = target.setdefault(key, {})
            target[keys[-1]] = value
            self._sources[".".join((section, *keys))] = name

    @staticmethod
    def _check_section(section: str, where: str) -> None:
        if section not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise InvalidArgumentError(
                f"{where}: unknown section {section!r}; known: {known}", reason="CONFIG_UNKNOWN_SECTION"
            )

    def section(self, name: str, model: type[SectionT]) -> SectionT:
        """Validate one section.

        Raises:
            InvalidArgumentError: Unknown keys or wrong values, each with its source.
        """
        try:
            return model.model_validate(self._values.get(name, {}))
        except ValidationError as error:
            violations = []
            for problem in error.errors(include_url=False, include_input=False):
                key = ".".join((name, *map(str, problem["loc"])))
                source = self._sources.get(key, "configuration")
                unknown = problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1
                text = _unknown_key(str(problem["loc"][0]), model) if unknown else problem["msg"]
                violations.append(FieldViolation(key, f"{text} (from {source})"))
            text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
            raise InvalidArgumentError(text, violations=violations, reason="CONFIG_INVALID") from error

    def explain(self, name: str, model: type[Section]) -> list[Explained]:
        """List a section's values with their sources; secrets are masked."""
        values = self.section(name, model)
        rows = []
        for key, field in type(values).model_fields.items():
            value = getattr(values, key)
            shown = (
                "********" if isinstance(value, SecretStr) or "SecretStr" in str(field.annotation) else value
            )
            full = f"{name}.{key}"
            source = next(
                (self._sources[s] for s in self._sources if s == full or s.startswith(full + ".")), "default"
            )
            rows.append(Explained(full, "" if shown is None else str(shown), source))
        return rows


def _unknown_key(key: str, model: type[Section]) -> str:
    close = difflib.get_close_matches(key, model.model_fields, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key; see `plexus config` for all"


def _leaves(keys: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def project_file(relative: str) -> Path:
    """A file or folder that ships with Plexus, such as gateway/kong.yml, in a checkout or a wheel."""
    root = Path(__file__).resolve().parents[2]
    checkout = root / relative
    return checkout if checkout.exists() else root / "services" / "_project" / relative
