"""Functions that workers run: an app declares them, callers send their arguments, and results come back.

    app = plexus.client.TaskApp("shop")

    @app.task(retries=3, retry_on=(OSError,), timeout_s=60)
    async def invoice(order: int, country: str = "NL") -> str: ...

    async with app.open():
        handle = await invoice.delay(17)
        print(await handle.result(timeout_s=60))

`plexus worker module:app` runs them.
"""

from __future__ import annotations

import inspect
import typing
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from plexus.client.blocking import BlockingTask
from plexus.client.join import connect
from plexus.client.kept import MAX_KEEP_S
from plexus.client.publisher import new_dedup_id
from plexus.client.sending import MAX_RETRIES, Sender
from plexus.queueing.v1 import queueing_pb2 as pb
from plexus.queueing.v1 import queueing_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from plexus.client.results import Handle

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

TASK = "plexus-task"
"""Attribute of a task's message: its name."""
STEP, PHASE = "plexus-saga-step", "plexus-saga-phase"
"""Attributes of a saga's request: the name of the step, and whether it is to be done or undone."""
ACTION, COMPENSATION = "action", "compensation"
MAX_BACKOFF_S = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a task is sent.

    Attributes:
        delay_s: Not run before this much has passed, up to 30 days.
        expires_s: Given up when it has waited this long; 0 is never.
        priority: What is run first.
        dedup_id: The same within the service's window is sent once; empty is none.
        correlation_id: Of the work that it belongs to.
    """

    delay_s: float = 0.0
    expires_s: float = 0.0
    priority: pb.Priority.ValueType = pb.PRIORITY_NORMAL
    dedup_id: str = ""
    correlation_id: str = ""


@dataclass(frozen=True, slots=True)
class Task(Generic[P, R, C]):
    """A function of an app, with parameters P and result R; calling it runs it here, and gives C.

    Attributes:
        name: Its name within the app.
        function: The function itself, asynchronous or not.
        queue: Topic and subscription through which it goes.
        retries: Runs after the first, if that fails.
        retry_on: Exceptions after which it is tried again; after any other it is given up at once.
        backoff_s: Pause before the first retry; doubled for each further one.
        timeout_s: Of one run; a run that takes longer has failed.
        keep_s: How long its result can be found by its id, in any process; 0 is not at all.
    """

    app: TaskApp
    name: str
    function: Callable[P, C]
    queue: str
    retries: int
    retry_on: tuple[type[Exception], ...]
    backoff_s: float
    timeout_s: float
    keep_s: float
    arguments: Arguments
    returns: TypeAdapter[R]
    sending: Options = field(default_factory=Options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run it here."""
        return self.function(*args, **kwargs)

    def options(self, **changes: Any) -> Task[P, R, C]:
        """The same task, sent in another way: `invoice.options(delay_s=60).delay(17)`; see Options."""
        return replace(self, sending=replace(self.sending, **changes))

    async def send(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Send it to the workers and want no result; returns the message's id, once it is durable.

        Raises:
            TypeError: The arguments do not fit the signature, or are no JSON.
            PublishError: It could not be sent.
            grpc.RpcError: Its queue could not be made.
        """
        return await self.app.sender.send(self, self.arguments.dump(args, kwargs))

    async def delay(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Send it to the workers; its result comes to the handle.

        Raises:
            TypeError: The arguments do not fit the signature, or are no JSON.
            PublishError: It could not be sent.
            grpc.RpcError: Its queue could not be made.
        """
        return await self.app.sender.delay(self, self.arguments.dump(args, kwargs))

    async def find(self, call_id: str, *, timeout_s: float) -> R:
        """Wait for a result that any process asked for with `delay`, if the task has `keep_s`.

        Args:
            call_id: Of the handle.
            timeout_s: How long to wait.

        Raises:
            ResultNotFoundError: Nobody asked for it, or it is not kept any more.
            TimeoutError: It did not come in time.
            TaskFailedError: The task was given up.
        """
        return await self.app.sender.find(self, call_id, timeout_s=timeout_s)

    @property
    def blocking(self) -> BlockingTask[P, R]:
        """The same task for threads without an event loop: `invoice.blocking.delay(17)`."""
        return BlockingTask(self)

    def message(self, data: bytes, attributes: dict[str, str]) -> pb.Message:
        """What is published."""
        sending = self.sending
        message = pb.Message(
            data=data,
            attributes={TASK: self.name, **attributes},
            dedup_id=sending.dedup_id or new_dedup_id(),
            priority=sending.priority,
            correlation_id=sending.correlation_id,
        )
        message.retry.max_attempts = self.retries + 1
        message.retry.minimum.FromMilliseconds(round(self.backoff_s * 1000))
        for name in ("delay", "ttl"):
            seconds = sending.delay_s if name == "delay" else sending.expires_s
            if seconds:
                getattr(message, name).FromMilliseconds(round(seconds * 1000))
        return message


class Arguments:
    """A function's parameters as a model: arguments to JSON, checked, and back."""

    def __init__(self, function: Callable[..., Any], *, some: bool = False) -> None:
        """Read the signature.

        Args:
            function: Whose parameters.
            some: They are some of those that come.

        Raises:
            TypeError: It has parameters that JSON has no names for.
        """
        self._signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        for number, (name, parameter) in enumerate(self._signature.parameters.items()):
            if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
                raise TypeError(f"{function.__qualname__}: {name} must be a parameter with a name")
            default = ... if parameter.default is parameter.empty else parameter.default
            # Fields have names of their own: a parameter may be called as a method of models is.
            fields[f"argument{number}"] = (hints.get(name, Any), Field(default, alias=name))
            self._names[f"argument{number}"] = name
        config = ConfigDict(extra="ignore" if some else "forbid")
        self._model: type[BaseModel] = create_model(function.__name__, __config__=config, **fields)
        self._adapter = TypeAdapter(self._model)

    def dump(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """Arguments as a JSON object.

        Raises:
            TypeError: They do not fit, or are no JSON.
        """
        bound = self._signature.bind(*args, **kwargs)
        try:
            model = self._model.model_validate(bound.arguments)
            return self._adapter.dump_json(model, by_alias=True, exclude_unset=True)
        except (ValidationError, PydanticSerializationError) as error:
            raise TypeError(f"{self._model.__name__}: {error}") from error

    def load(self, data: bytes) -> dict[str, Any]:
        """Arguments from a JSON object, of the types in the signature.

        Raises:
            ValueError: They do not fit.
        """
        model = self._model.model_validate_json(data)
        return {name: getattr(model, field) for field, name in self._names.items()}


class _Decorator(Protocol):
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> Task[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Task[P, R, R]: ...


class TaskApp:
    """Tasks under one name, which is also that of their queue unless they have another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tasks: dict[str, Task[Any, Any, Any]] = {}
        self.steps: dict[tuple[str, str], Task[Any, Any, Any]] = {}
        self._sender: Sender | None = None

    def task(
        self,
        *,
        name: str = "",
        queue: str = "",
        retries: int = 0,
        retry_on: tuple[type[Exception], ...] = (Exception,),
        backoff_s: float = 1.0,
        timeout_s: float = 600.0,
        keep_s: float = 0.0,
        step: str = "",
        undoes: str = "",
    ) -> _Decorator:
        """Make a function a task; see Task for the settings.

        With `step` it does this step of sagas whose definition has its queue as the step's topic, with
        `undoes` it undoes it; its parameters are then some of `saga_id`, `step`, `phase`, `attempt`, `input`
        and `results`.

        Raises:
            TypeError: Its parameters are not all named, or a type of theirs is no JSON.
            ValueError: There is one of this name, or for this step, or a number is out of bounds.
        """
        if step and undoes:
            raise ValueError("a task does a step or undoes one")
        if not 0 <= retries <= MAX_RETRIES or not 0 <= backoff_s <= MAX_BACKOFF_S or timeout_s <= 0:
            raise ValueError(
                f"retries is 0 to {MAX_RETRIES}, backoff_s 0 to {MAX_BACKOFF_S:g}, timeout_s above 0"
            )
        if keep_s and not 1 <= keep_s <= MAX_KEEP_S:
            raise ValueError(f"keep_s is 0, or 1 to {MAX_KEEP_S:g}")

        def decorate(function: Callable[..., Any]) -> Task[Any, Any, Any]:
            known = name or function.__name__
            if known in self.tasks:
                raise ValueError(f"there is a task {known!r} already")
            role = (step or undoes, ACTION if step else COMPENSATION)
            if role in self.steps:
                raise ValueError(f"there is a task for the {role[1]} of step {role[0]!r} already")
            annotation = typing.get_type_hints(function, include_extras=True).get("return", Any)
            made: Task[Any, Any, Any] = Task(
                app=self,
                name=known,
                function=function,
                queue=queue or self.name,
                retries=retries,
                retry_on=retry_on,
                backoff_s=backoff_s,
                timeout_s=timeout_s,
                keep_s=keep_s,
                arguments=Arguments(function, some=bool(role[0])),
                returns=TypeAdapter(annotation),
            )
            self.tasks[known] = made
            if role[0]:
                self.steps[role] = made
            return made

        return cast("_Decorator", decorate)

    @asynccontextmanager
    async def open(self, stub: queueing_pb2_grpc.QueueingServiceStub | None = None) -> AsyncIterator[None]:
        """Send tasks within; at the end everything sent is durable or has failed.

        Args:
            stub: A QueueingService stub. Default: that of the mesh, as `plexus.client.connect` finds it.
        """
        async with AsyncExitStack() as stack:
            if stub is None:
                mesh = await stack.enter_async_context(connect())
                stub = mesh.stub(queueing_pb2_grpc.QueueingServiceStub)
            self._sender = await stack.enter_async_context(Sender(stub))
            stack.callback(setattr, self, "_sender", None)
            yield

    def meant(self, attributes: Mapping[str, str]) -> Task[Any, Any, Any]:
        """The task that a message is for.

        Raises:
            LookupError: There is none.
        """
        name, step = attributes.get(TASK, ""), attributes.get(STEP, "")
        if name or not step:
            found, what = self.tasks.get(name), f"task {name!r}"
        else:
            phase = attributes.get(PHASE, "")
            found, what = self.steps.get((step, phase)), f"task for the {phase} of step {step!r}"
        if found is None:
            raise LookupError(f"no {what} in this worker")
        return found

    def keep_s(self, queue: str) -> float:
        """How long the results of a queue's tasks are kept."""
        return max((task.keep_s for task in self.tasks.values() if task.queue == queue), default=0.0)

    @property
    def sender(self) -> Sender:
        """What sends the app's tasks.

        Raises:
            RuntimeError: It is not open.
        """
        if self._sender is None:
            raise RuntimeError(
                f"tasks are sent within `async with app.open()` of {self.name!r}, or by `task.blocking`"
            )
        return self._sender
