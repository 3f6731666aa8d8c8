"""Methods of services of the mesh as steps: found among the generated descriptors, called over xDS."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

import plexus
from plexus.client.failures import problem
from plexus.client.propagation import CallContext, call_context
from plexus.options.v1 import options_pb2
from services.queueing.sagas.domain import Problem
from services.queueing.sagas.machine import Failed, Succeeded
from services.queueing.sagas.results import result_of_call
from services.queueing.sagas.templates import MissingValueError, filled, references
from services.runtime.access import EDGE
from services.runtime.errors import InvalidArgumentError, PermissionDeniedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

    from plexus.client.channel import MeshChannel
    from services.queueing.sagas.definitions import Action, Definition
    from services.queueing.sagas.domain import Saga
    from services.runtime.request import Request

_OPAQUE = "google.protobuf."
"""Messages whose JSON form is not an object of their fields."""


class Channels(Protocol):
    """Gives the channel of a service of the mesh."""

    def __call__(self, service: str) -> MeshChannel:
        """The channel of `xds:///service`."""
        ...


@cache
def find(method: str) -> MethodDescriptor | None:
    """The method named `service/Method`; None if there is none that a saga may call."""
    service, _, name = method.partition("/")
    for base in plexus.__path__:
        # Not pkgutil: the generated folders are namespace packages, which it does not list.
        for module in sorted(Path(base).glob(f"{service}/v1/*_pb2.py")):
            file = importlib.import_module(f"plexus.{service}.v1.{module.stem}").DESCRIPTOR
            for each in file.services_by_name.values():
                found: MethodDescriptor | None = each.methods_by_name.get(name)
                # Without access option it is the mesh's own business.
                if found is not None and found.GetOptions().HasExtension(options_pb2.access):
                    return found
    return None


def check_methods(definition: Definition, request: Request) -> None:
    """Check each call of a definition: the method, who defines it, and the request as far as it is known.

    Args:
        definition: With its own rules kept.
        request: The call that brings it.

    Raises:
        InvalidArgumentError: Unknown or streaming method, a request that does not fit it.
        PermissionDeniedError: The caller may not call the method itself.
    """
    for position, step in enumerate(definition.steps):
        for action, role in ((step.action, "action"), (step.compensation, "compensation")):
            if action is not None and action.method:
                _check(action, request, f"definition.steps[{position}].{role}.rpc")


def _check(action: Action, request: Request, at: str) -> None:
    method = find(action.method)
    if method is None or method.client_streaming or method.server_streaming:
        kind = "is no method of a service" if method is None else "streams"
        raise InvalidArgumentError(f"{action.method} {kind}", field=f"{at}.method", reason="UNKNOWN_RPC")
    groups = method.GetOptions().Extensions[options_pb2.access].groups
    # A saga calls with this service's identity: it must not give anybody rights that he has not.
    if request.peer == EDGE and groups and request.groups.isdisjoint(groups):
        raise PermissionDeniedError(
            f"{request.consumer} is in none of the groups that may call {action.method}: {', '.join(groups)}",
            reason="GROUP_REQUIRED",
            metadata={"groups": ",".join(groups), "method": action.method},
        )
    known = _known_part(action.request, method.input_type, f"{at}.request")
    try:
        json_format.ParseDict(known, GetMessageClass(method.input_type)())
    except (json_format.ParseError, ValueError, TypeError) as error:
        raise InvalidArgumentError(str(error), field=f"{at}.request") from None


def _known_part(template: Any, message: Descriptor | None, at: str) -> Any:
    """A template without what references will fill in; a field that is filled in must exist."""
    if isinstance(template, dict):
        kept = {}
        for name, value in template.items():
            field = None if message is None else _field(message, name)
            if message is not None and field is None:
                raise InvalidArgumentError(f"{message.full_name} has no such field", field=f"{at}.{name}")
            if not _is_reference(value):
                kept[name] = _known_part(value, _inner(field), f"{at}.{name}")
        return kept
    if isinstance(template, list):
        parts = (_known_part(one, message, at) for one in template if not _is_reference(one))
        return list(parts)
    return template


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and any(True for _ in references(value, ""))


def _field(message: Descriptor, name: str) -> FieldDescriptor | None:
    found: FieldDescriptor | None = message.fields_by_name.get(name)
    return found or next((field for field in message.fields if field.json_name == name), None)


def _inner(field: FieldDescriptor | None) -> Descriptor | None:
    """The message whose fields a field's JSON object has; None if it has none, or anything."""
    if field is None or field.message_type is None:
        return None
    inner: Descriptor = field.message_type
    if inner.GetOptions().map_entry or inner.full_name.startswith(_OPAQUE):
        return None
    return inner


class Methods:
    """Calls methods for sagas."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def call(self, saga: Saga, action: Action) -> Succeeded | Failed:
        """Do the attempt that is under way; what came of it.

        A repeated attempt has the same request id, so that a service which knows the first answer gives it.
        """
        if saga.attempt is None:
            raise ValueError(f"nothing to call in saga {saga.id!r}")
        call_id = saga.attempt.call_id
        method = find(action.method)
        if method is None:  # defined when another version of this service knew it
            return Failed(call_id, Problem("UNIMPLEMENTED", f"no method {action.method}"), untouched=True)
        values = {"saga": {"id": saga.id}, "input": saga.input, "results": saga.results}
        message: Any = GetMessageClass(method.input_type)()
        try:
            json_format.ParseDict(filled(action.request, values), message)
        except (MissingValueError, json_format.ParseError, ValueError, TypeError) as error:
            return Failed(call_id, Problem("INVALID_ARGUMENT", str(error)), untouched=True)
        if "request_id" in method.input_type.fields_by_name and not message.request_id:
            phase = "compensation" if saga.undoing else "action"
            message.request_id = f"{saga.secret}-{saga.position}-{phase}-{saga.id}"
        service = action.method.partition("/")[0]
        invoke: Callable[..., Any] = self._channels(service).unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        context = call_context.set(CallContext(request_id=call_id, traceparent=saga.trace))
        try:
            answer = await invoke(message, timeout=action.timeout_s)
        except grpc.aio.AioRpcError as error:
            found = problem(error)
            fields = "; ".join(f"{each.field}: {each.description}" for each in found.violations)
            return Failed(call_id, Problem(found.code.name, fields or found.message))
        finally:
            call_context.reset(context)
        return result_of_call(
            call_id, json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)
        )
