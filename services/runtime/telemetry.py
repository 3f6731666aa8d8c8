"""Logs, traces and metrics of a process."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from plexus.client.propagation import call_context
from services.runtime.addresses import netloc
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AsyncExitStack

    from opentelemetry.trace import Tracer

    from services.runtime.config import TelemetryConfig

HANDLED = Counter("grpc_server_handled_total", "Calls finished, by status.", ["service", "method", "code"])
LATENCY = Histogram(
    "grpc_server_handling_seconds",
    "Time from start to end of a call.",
    ["service", "method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
IN_FLIGHT = Gauge("grpc_server_in_flight", "Calls being handled.", ["service"])


def _add_request(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = call_context.get()
    if context is not None:
        if context.request_id:
            event.setdefault("request_id", context.request_id)
        if context.traceparent:
            event.setdefault("trace_id", context.traceparent.split("-")[1])
    return event


def configure_logging(service: str, config: TelemetryConfig) -> None:
    """Send structured logs to stderr: JSON, or readable lines on a terminal."""
    level = logging.getLevelNamesMapping().get(config.log_level.upper(), logging.INFO)
    console = config.log_format == "console" or (config.log_format == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _add_request,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard module; warnings and worse are shown in the same stream.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s", force=True)


def serve_metrics(stack: AsyncExitStack, config: TelemetryConfig) -> str:
    """Serve /metrics until the stack closes.

    Returns:
        Where, as `host:port`.

    Raises:
        FailedPreconditionError: The configured address cannot be had.
    """
    try:
        server, thread = start_http_server(config.metrics_port, addr=config.metrics_host)
    except OSError as error:
        where = netloc(config.metrics_host, config.metrics_port)
        raise FailedPreconditionError(
            f"metrics cannot be served at {where}: {error.strerror}; see telemetry.metrics_port",
            reason="METRICS_PORT_TAKEN",
        ) from error
    stack.callback(server.server_close)
    stack.callback(thread.join)
    stack.callback(server.shutdown)
    return netloc(config.metrics_host, server.server_port)


def configure_tracing(service: str, config: TelemetryConfig) -> tuple[Tracer | None, Callable[[], None]]:
    """Export spans if a collector is configured.

    Returns:
        The tracer, or None when nothing is exported, and what to call at the end of the process.
    """
    if not config.otlp_endpoint:
        return None, lambda: None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - heavy
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - heavy, only with a collector
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - the same
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - the same
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415 - the same

    provider = TracerProvider(
        resource=Resource.create({"service.name": service}),
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
    )
    exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.get_tracer("plexus"), provider.shutdown
