"""A server in Python as a user may write one, for `plexus join`: `joined_server.py PORT [--health | --any]`.

Answers test.Who/Ask with its port. With --health it offers grpc.health.v1; SIGUSR1 changes what that says.
With --any every method is answered with the port. Prints its process id once it listens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

Status = health_pb2.HealthCheckResponse


def read(name: str) -> bytes:
    return Path(os.environ[name]).read_bytes()


def configuration() -> Any:
    pair = (read("PLEXUS_KEY_PATH"), read("PLEXUS_CERTIFICATE_PATH"))
    return grpc.ssl_server_certificate_configuration([pair], read("PLEXUS_CA_PATH"))


class AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        del handler_call_details
        return self._handler


def main(port: str, *, with_health: bool, with_any: bool) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    ask: Any = grpc.unary_unary_rpc_method_handler(lambda _request, _context: port.encode())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", {"Ask": ask}),))
    if with_any:
        server.add_generic_rpc_handlers((AnyMethod(ask),))
    servicer = health.HealthServicer()
    if with_health:
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=True
    )
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    server.start()
    print(os.getpid(), flush=True)  # noqa: T201 - the protocol with the test
    stop = threading.Event()
    said = Status.SERVING

    def change(*_: object) -> None:
        nonlocal said
        said = Status.NOT_SERVING if said == Status.SERVING else Status.SERVING
        servicer.set("", said)

    servicer.set("", said)
    signal.signal(signal.SIGUSR1, change)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.2):  # a signal's handler runs between two waits
        pass
    server.stop(5).wait()


if __name__ == "__main__":
    main(sys.argv[1], with_health="--health" in sys.argv, with_any="--any" in sys.argv)
