"""Where a process serves its metrics."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack

import httpx
import pytest

from services.runtime import telemetry
from services.runtime.config import TelemetryConfig
from services.runtime.errors import FailedPreconditionError


async def test_metrics_are_served_at_the_configured_address() -> None:
    async with AsyncExitStack() as stack:
        where = telemetry.serve_metrics(stack, TelemetryConfig(metrics_host="127.0.0.2"))
        assert where.startswith("127.0.0.2:")
        async with httpx.AsyncClient(timeout=60) as http:
            assert "grpc_server_in_flight" in (await http.get(f"http://{where}/metrics")).text


async def test_a_port_that_somebody_has_is_an_error_that_names_the_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with AsyncExitStack() as stack:
            with pytest.raises(FailedPreconditionError, match=rf"127.0.0.1:{port}: .*telemetry.metrics_port"):
                telemetry.serve_metrics(stack, TelemetryConfig(metrics_port=port))
