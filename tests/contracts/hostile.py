"""Requests of nobody who means well: each field of each method, at and beyond the edge of its type."""

from __future__ import annotations

import asyncio
import math
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import json_format, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from plexus.client.failures import problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

    from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

PATIENCE_S = 120.0
_WAITING_S = 0.3
_DEPTH = 4
_AT_ONCE = 8
_UNTYPED = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE,
)
_TEXTS = (
    "",
    "a\0b",
    "../../etc/passwd",
    "/",
    "\r\nx-groups: admin",
    "\u202egnp.exe",
    "e\u0301",
    "\U0001f4a5",
    "'; DROP TABLE topics; --",
    "${saga.id}",
    "*",
    "NaN",
    "9" * 400,
    "a" * 70_000,
    "(" * 5_000,
    "*." * 2_000,
    '{"a":' * 2_000,
)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), -1, 0, 1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), -1, 0, 1, 2**53 + 1, 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), -1, 0, 999, 2**31 - 1),
}
_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -0.0, 5e-324, 3e38)
_BYTES = (b"", b"\0", b"\xff" * 100, b"\x80")
_SPANS = ((0, 0), (-1, 0), (0, -1), (2**63 - 1, 0), (-(2**63), 0), (1, -1), (0, 2**31 - 1), (10**12, 0))
_MANY = 2_000


def _deep() -> struct_pb2.Value:
    value = struct_pb2.Value(number_value=math.nan)
    for _ in range(25):  # a message may be nested 100 deep, and each level of a value takes three
        value = struct_pb2.Value(struct_value=struct_pb2.Struct(fields={"a": value}))
    return value


def _values(field: FieldDescriptor) -> Iterator[Any]:
    kind = field.cpp_type
    if kind in _INTEGERS:
        yield from _INTEGERS[kind]
    elif kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        yield from _NUMBERS
    elif kind == FieldDescriptor.CPPTYPE_BOOL:
        yield from (True, False)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        yield from _BYTES
    elif kind == FieldDescriptor.CPPTYPE_STRING:
        yield from _TEXTS


def _whole(message_type: Descriptor) -> Iterator[Message]:
    """Values of well-known types."""
    make = GetMessageClass(message_type)
    match message_type.full_name:
        case "google.protobuf.Duration" | "google.protobuf.Timestamp":
            for seconds, nanos in _SPANS:
                yield make(seconds=seconds, nanos=nanos)
        case "google.protobuf.FieldMask":
            for paths in (["*"], ["no.such"], [""], ["name"], ["a" * 70_000], ["labels.x"]):
                yield make(paths=paths)
        case "google.protobuf.Struct":
            yield make(fields={"a": _deep()})
            yield make(fields={"": struct_pb2.Value()})
            yield make(fields={"a": struct_pb2.Value(number_value=math.inf), "b": struct_pb2.Value()})
            yield make(fields={str(n): struct_pb2.Value(bool_value=True) for n in range(_MANY)})
        case "google.protobuf.Value":
            yield make()
            yield _deep()
            yield make(number_value=math.nan)
            yield make(string_value="a" * 70_000)


async def probe(
    stub: Any,
    service: ServiceDescriptor,
    names: Mapping[str, str],
    bases: Mapping[str, Any],
    restore: Callable[[], Awaitable[None]],
    waiting: Collection[str] = (),
) -> None:
    """Send variations of a good request of every method, each with one field that is odd.

    Args:
        stub: Of the service, with what `names` and `bases` name.
        service: Whose methods.
        names: Values of text fields by their names.
        bases: Good requests as JSON, for methods where names alone make none.
        restore: Makes again what a method may have deleted.
        waiting: Methods that wait for something to come, if the request is good.

    Raises:
        AssertionError: One was answered by no error of ours, or not in time; all of them are told.
    """
    wrong: list[str] = []
    together = asyncio.Semaphore(_AT_ONCE)

    async def send(method: MethodDescriptor, request: Message, odd: str) -> None:
        async with together:
            error = await _answer(stub, method, request, waits=method.name in waiting)
        if error:
            wrong.append(f"{method.name} {odd}: {error}")

    for method in service.methods:
        base = GetMessageClass(method.input_type)()
        if method.name in bases:
            json_format.ParseDict(bases[method.name], base)
        else:
            _fill(base, names)
        async with asyncio.TaskGroup() as group:
            for odd, request in _variations(base, names):
                group.create_task(send(method, request, odd))
        await restore()
    assert not wrong, "\n".join(wrong)


async def _answer(stub: Any, method: MethodDescriptor, request: Message, *, waits: bool) -> str:
    """Send a request; what is wrong with how it is answered."""
    sent = iter([request]) if method.client_streaming else request
    call = getattr(stub, method.name)(sent, timeout=_WAITING_S if waits else PATIENCE_S)
    try:
        if method.server_streaming:
            async for _ in call:
                break  # it was accepted
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        if waits and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ""
        found = problem(error)
        if error.code() in _UNTYPED or not found.reason or not found.message:
            return f"{error.code().name} {found.reason} {error.details()}"
    return ""


def _variations(base: Message, names: Mapping[str, str]) -> Iterator[tuple[str, Message]]:
    """Each with what is odd about it."""
    kind: Any = base.DESCRIPTOR
    for path in _paths(kind, ()):
        for value in _odd(path[-1]):
            request = type(base)()
            request.CopyFrom(base)
            holder: Any = request
            for step in path[:-1]:
                holder = _enter(holder, step, names)
            _place(holder, path[-1], value)
            shown = f"{len(value)} of {value[:1]!r:.60}" if isinstance(value, list) else f"{value!r:.60}"
            yield f"{'.'.join(step.name for step in path)} = {shown}", request


def _odd(field: FieldDescriptor) -> Iterator[Any]:
    """Values to give a field: of a map its keys, of a list its entries."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        yield from ([key] for key in _values(kind.fields_by_name["key"]))
        yield [f"key{number}" for number in range(_MANY)]
        return
    values = list(_values(field) if kind is None else _whole(kind))
    if kind is not None:
        values.append(GetMessageClass(kind)())
    if not field.is_repeated:
        yield from values
        return
    yield []
    yield from ([value] for value in values)
    yield ["x" if isinstance(values[0], str) else values[-1]] * _MANY


def _place(holder: Any, field: FieldDescriptor, value: Any) -> None:
    if not field.is_repeated:
        if field.message_type is None:
            setattr(holder, field.name, value)
        else:
            getattr(holder, field.name).CopyFrom(value)
        return
    held = getattr(holder, field.name)
    holder.ClearField(field.name)
    if not isinstance(held, MutableMapping):
        held.extend(value)
        return
    for key in value:
        if hasattr(held[key], "SetInParent"):
            held[key].SetInParent()


def _enter(holder: Any, field: FieldDescriptor, names: Mapping[str, str]) -> Any:
    if field.is_repeated:
        held = getattr(holder, field.name)
        if not held:
            _fill(held.add(), names)
        return held[0]
    inner = getattr(holder, field.name)
    if not holder.HasField(field.name):
        inner.SetInParent()
        _fill(inner, names)
    return inner


def _fill(message: Message, names: Mapping[str, str]) -> None:
    """Give text fields their values."""
    for field in message.DESCRIPTOR.fields:
        plain = field.cpp_type == FieldDescriptor.CPPTYPE_STRING and not field.is_repeated
        if plain and field.containing_oneof is None and field.name in names:
            setattr(message, field.name, names[field.name])


def _paths(kind: Descriptor, above: tuple[FieldDescriptor, ...]) -> Iterator[tuple[FieldDescriptor, ...]]:
    for field in kind.fields:
        path = (*above, field)
        yield path
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name.startswith("google.protobuf."):
            continue
        if len(path) < _DEPTH and sum(step.message_type is inner for step in above) < 1:
            yield from _paths(inner, path)
