"""`plexus config`: every value and where it came from."""

from __future__ import annotations

import importlib
import inspect

from services.mesh.consul.config import ConsulConfig
from services.runtime import config

_RUNTIME_SECTIONS: dict[str, type[config.Section]] = {
    "server": config.ServerConfig,
    "mesh": config.MeshConfig,
    "consul": ConsulConfig,
    "telemetry": config.TelemetryConfig,
}


def section_models() -> dict[str, type[config.Section]]:
    """The model of every section that this installation has, in the order of `config.SECTIONS`."""
    found = {}
    for name in config.SECTIONS:
        model = _RUNTIME_SECTIONS.get(name) or _model_of(name)
        if model is not None:
            found[name] = model
    return found


def _model_of(service: str) -> type[config.Section] | None:
    """The Section of services/<service>/config.py that is not part of another one."""
    module_name = f"services.{service}.config"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name in {module_name, f"services.{service}"}:
            return None  # a service that has nothing to configure
        raise
    expected = f"{service}config"
    for name, value in inspect.getmembers(module, inspect.isclass):
        if name.lower() == expected and issubclass(value, config.Section):
            return value
    return None


def explain() -> list[config.Explained]:
    """All values with their sources, secrets masked.

    Raises:
        InvalidArgumentError: Unknown keys or wrong values; the text names each with its source.
    """
    settings = config.Settings()
    return [row for name, model in section_models().items() for row in settings.explain(name, model)]
