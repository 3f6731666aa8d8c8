"""The one interceptor of every server: identity, admission, access, trace, handler, errors, metrics.

grpc.aio asks its interceptors for a handler on every call. This one wraps each method once and then answers
from a table, so that the whole chain costs one await. The four RPC kinds share `_Call`, where the policy is.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.rpc import status_pb2
from opentelemetry import propagate
from opentelemetry.trace import SpanKind, StatusCode

from plexus.client.propagation import TRACEPARENT, call_context
from plexus.options.v1 import options_pb2
from services.runtime import access, retry_budget, status
from services.runtime.decoding import decoded, decoding, each_decoded
from services.runtime.errors import DeadlineExceededError, PlexusError, ResourceExhaustedError
from services.runtime.request import Request, Rest
from services.runtime.telemetry import HANDLED, IN_FLIGHT, LATENCY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from google.protobuf.message import Message
    from opentelemetry.trace import Tracer

    from services.runtime.config import ServerConfig

log = structlog.get_logger(__name__)

HTTP_STATUS_KEY = "x-http-status"
"""Metadata by which a REST answer gets another HTTP status than its gRPC code's; the edge takes it out."""
TRUNCATED = b"\xff\xff\xff\xff"
"""Not a valid HttpBody: the edge resets the client's stream when it sees it, since on HTTP/1.1 a gRPC error
after the first message would otherwise end the body like a complete one."""
_UNBOUNDED = ("/grpc.health.v1.Health/",)  # never refused for load: the answer to "are you overloaded?"


class Admission:
    """Counts the calls in progress in a process and refuses those beyond the bound."""

    def __init__(self, service: str, limit: int) -> None:
        self._limit = limit
        self._active = 0
        self._gauge = IN_FLIGHT.labels(service)

    def enter(self) -> None:
        """Count a call.

        Raises:
            ResourceExhaustedError: The bound is reached.
        """
        if self._active >= self._limit:
            raise ResourceExhaustedError(
                "the server handles as many calls as it may", reason="SERVER_BUSY", retry_after_s=1
            )
        self._active += 1
        self._gauge.set(self._active)

    def leave(self) -> None:
        """Count its end."""
        self._active -= 1
        self._gauge.set(self._active)


class Method:
    """What is known of a method before any call: path, metrics, rules."""

    def __init__(self, path: str, pipeline: Pipeline) -> None:
        service, _, name = path.removeprefix("/").rpartition("/")
        self.path = path
        self.service = service
        self.name = name
        self.latency = LATENCY.labels(service, name)
        self.bounded = not path.startswith(_UNBOUNDED)
        self.access = pipeline.access.get(path) or access.access_of(path)
        self.pipeline = pipeline
        self._handled: dict[grpc.StatusCode, Any] = {}

    def finished(self, code: grpc.StatusCode, seconds: float) -> None:
        """Record the end of a call."""
        self.latency.observe(seconds)
        counter = self._handled.get(code)
        if counter is None:
            counter = self._handled[code] = HANDLED.labels(self.service, self.name, code.name)
        counter.inc()


class _Call:
    """One call: entered before the handler, left after it, whatever the RPC kind."""

    __slots__ = (
        "_code",
        "_context",
        "_entered",
        "_message",
        "_method",
        "_span",
        "_started",
        "_trailers",
        "request",
    )

    def __init__(self, method: Method, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._method = method
        self._context = context
        self._code = grpc.StatusCode.OK
        self._message = ""
        self._trailers: tuple[tuple[str, str | bytes], ...] = ()
        self._entered = False
        self._span: Any = None
        self._started = time.monotonic()
        self.request = Request()

    def begin(self) -> None:
        """Identify, admit and authorize the caller.

        Raises:
            PlexusError: The call is refused.
        """
        method, context, request = self._method, self._context, self.request
        pipeline = method.pipeline
        headers = _read_headers(request, context, pipeline.trusted_peer)
        remaining = context.time_remaining()
        if remaining is not None:
            request.deadline = self._started + remaining
        call_context.set(request)
        pipeline.retries.arrived(retry=retry_budget.ATTEMPTS_KEY in headers)
        if method.bounded:
            pipeline.last_call = self._started
            pipeline.admission.enter()
            self._entered = True
        access.check(request, method.path, pipeline.authorizer, method.access)
        if pipeline.tracer is not None:
            self._span = pipeline.tracer.start_span(
                method.path.removeprefix("/"),
                context=propagate.extract(headers),
                kind=SpanKind.SERVER,
                attributes={"rpc.system": "grpc", "rpc.service": method.service, "rpc.method": method.name},
            )
            parent = self._span.get_span_context()
            request.traceparent = f"00-{parent.trace_id:032x}-{parent.span_id:016x}-{parent.trace_flags:02x}"
            request.traced = True

    def failed(self, error: Exception) -> status_pb2.Status:
        """Turn an error into the call's status; what is not a domain error is logged and not told."""
        error = _told(error)
        if not isinstance(error, PlexusError):
            error_id = uuid.uuid4().hex
            log.error("call_failed", method=self._method.path, error_id=error_id, exc_info=error)
            error = PlexusError("internal error", metadata={"error_id": error_id})
        answer = status.to_status(error, self.request.request_id)
        self._code = status.code_of(error)
        self._context.set_code(self._code)
        self._context.set_details(answer.message)
        # What the handler set for the case that it fails, such as Content-Range of a 416, goes along.
        self._trailers = (*(self._context.trailing_metadata() or ()),)
        self._trailers += ((status.DETAILS_KEY, answer.SerializeToString()),)
        if self.request.rest is not None and error.reason in status.HTTP_STATUS:
            self._trailers += ((HTTP_STATUS_KEY, str(status.HTTP_STATUS[error.reason])),)
        if error.retry_after_s is not None:  # the edge passes it on as the HTTP header of that name
            self._trailers += (("retry-after", str(math.ceil(error.retry_after_s))),)
        if self._code in retry_budget.RETRYABLE and not self._method.pipeline.retries.allows():
            self._trailers += (retry_budget.STOP,)
        self._message = answer.message
        self._context.set_trailing_metadata(self._trailers)
        return answer

    async def refuse(self) -> NoReturn:
        """Send the status alone, as the last act of a unary call.

        Returning after `set_code` would send an empty message first, and a transcoder would show that
        instead of the error. Abort is safe here although stop() does not wait for aborted handlers:
        nothing is left to do.
        """
        await self._context.abort(self._code, self._message, self._trailers)

    def cancelled(self) -> None:
        """Record that the caller went away or its deadline passed."""
        self._code = grpc.StatusCode.CANCELLED

    def end(self) -> None:
        """Record the end."""
        if self._entered:
            self._method.pipeline.admission.leave()
        self._method.finished(self._code, time.monotonic() - self._started)
        if self._span is not None:
            if self._code is not grpc.StatusCode.OK:
                self._span.set_status(StatusCode.ERROR, self._code.name)
            self._span.end()


def _told(error: Exception) -> Exception:
    """What a TaskGroup that failed tells the caller: its first domain error."""
    if not isinstance(error, ExceptionGroup):
        return error
    domain: Exception | None = error.subgroup(PlexusError)
    while isinstance(domain, ExceptionGroup):
        domain = domain.exceptions[0]
    return domain or error


def _read_headers(
    request: Request, context: grpc.aio.ServicerContext[Any, Any], trusted_peer: str
) -> dict[str, str]:
    """Fill the request from the connection and the metadata; the end user only from the edge's word."""
    identities = context.auth_context().get("peer_spiffe_id") or context.auth_context().get(
        "x509_subject_alternative_name", ()
    )
    for identity in identities:
        text = identity.decode("utf-8", "replace")
        name = access.service_name(text)
        if name:
            request.peer, request.peer_id = name, text
            break
    else:
        request.peer = trusted_peer
    headers = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
    request.request_id = headers.get("x-request-id", "")[:128] or os.urandom(16).hex()
    request.traceparent = headers.get("traceparent", "")
    request.traced = TRACEPARENT.fullmatch(request.traceparent) is not None
    if not request.traced:
        request.traceparent = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
    if request.peer == access.EDGE:
        request.consumer = headers.get("x-consumer-username", "")
        groups = headers.get("x-consumer-groups", "")
        request.groups = frozenset(group.strip() for group in groups.split(",") if group.strip())
        if "x-envoy-original-path" in headers:  # added by the transcoder, and by nobody else
            request.rest = Rest(headers.get("x-envoy-original-method", ""), headers)
    return headers


class Pipeline(grpc.aio.ServerInterceptor):
    """The interceptor."""

    def __init__(
        self,
        service: str,
        config: ServerConfig,
        authorizer: access.Authorizer,
        *,
        tracer: Tracer | None = None,
        trusted_peer: str = "",
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Set the rules of a server.

        Args:
            service: Name for the metrics.
            config: Bounds.
            authorizer: The intentions.
            tracer: Makes spans; None exports nothing.
            trusted_peer: Identity of a caller without certificate. Only for a server that listens without TLS
                inside a test; the mesh's servers take no such connection.
            groups: Of end users, by path, for methods whose proto is not ours and so does not name them.
        """
        self.admission = Admission(service, config.max_concurrent_calls)
        self.authorizer = authorizer
        self.tracer = tracer
        self.trusted_peer = trusted_peer
        self.access = {path: options_pb2.Access(groups=names) for path, names in (groups or {}).items()}
        self.retries = retry_budget.RetryBudget()
        self.default_deadline_s = config.default_deadline_s
        self.max_message_bytes = config.max_message_bytes
        self.last_call = -math.inf
        self._handlers: dict[str, Any] = {}

    async def quiet(self, seconds: float, *, within_s: float) -> bool:
        """Wait until no call but health checks has come for a while; False if that takes too long."""
        end = time.monotonic() + within_s
        while (left_s := self.last_call + seconds - time.monotonic()) > 0:
            if time.monotonic() + left_s > end:
                return False
            await asyncio.sleep(left_s)
        return True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Answer with the wrapped handler of the method, or None if there is no such method."""
        path = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is None:
            original = await continuation(handler_call_details)
            if original is None:
                return None
            handler = self._handlers[path] = self._wrap(path, original)
        return handler

    def _wrap(self, path: str, handler: Any) -> Any:
        method = Method(path, self)
        check = each_decoded if handler.request_streaming else decoded
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(
                _streaming(method, behaviour, check),
                request_deserializer=decoding(handler.request_deserializer, self.max_message_bytes),
                response_serializer=_or_bytes(handler.response_serializer),
            )
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            _unary(method, behaviour, check),
            request_deserializer=decoding(handler.request_deserializer, self.max_message_bytes),
            response_serializer=handler.response_serializer,
        )


def _or_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    if serialize is None:
        return None
    return lambda message: message if isinstance(message, bytes) else serialize(message)


def _unary(
    method: Method, behaviour: Callable[[Any, Any], Awaitable[Any]], check: Callable[[Any], Any]
) -> Callable[[Any, Any], Awaitable[Any]]:
    limit = method.pipeline.default_deadline_s

    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        call = _Call(method, context)
        try:
            call.begin()
            if call.request.deadline is not None:
                return await behaviour(check(request), context)
            async with asyncio.timeout(limit):
                return await behaviour(check(request), context)
        except TimeoutError:
            call.failed(DeadlineExceededError(f"the call took longer than {limit:g} s"))
        except Exception as error:  # noqa: BLE001 - the one place where any error becomes a status
            call.failed(error)
        except BaseException:
            call.cancelled()
            raise
        finally:
            call.end()
        return await call.refuse()

    return handle


def _streaming(
    method: Method, behaviour: Callable[[Any, Any], AsyncIterator[Any]], check: Callable[[Any], Any]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        call = _Call(method, context)
        last: Any = None
        try:
            call.begin()
            async for response in behaviour(check(request), context):
                yield response
                last = response
        except Exception as error:  # noqa: BLE001 - as in _unary
            answer = call.failed(error)
            if last is not None and call.request.rest is not None:
                words = _last_words(type(last), answer)
                if words is not None:
                    yield words
        except BaseException:
            call.cancelled()
            raise
        finally:
            call.end()

    return handle


def _last_words(kind: type[Message], answer: status_pb2.Status) -> Message | bytes | None:
    """What ends a REST stream that broke off, where HTTP/1.1 has no place for a status after the first byte.

    A typed stream tells the error in its last message; raw bytes cannot, so the edge resets the connection.
    """
    if kind.DESCRIPTOR.full_name == "google.api.HttpBody":
        return TRUNCATED
    field = kind.DESCRIPTOR.fields_by_name.get("error")
    if field is None or field.message_type is not status_pb2.Status.DESCRIPTOR:
        return None
    return kind(error=answer)
