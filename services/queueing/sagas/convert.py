"""Between saga messages and the domain."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, struct_pb2

from plexus.queueing.v1 import sagas_pb2
from services.queueing.convert import duration_to, present_to, retry_from, retry_to, seconds, timestamp_to
from services.queueing.sagas.codec import json_text
from services.queueing.sagas.contract import Order, Which
from services.queueing.sagas.definitions import Action, Definition, Step
from services.queueing.sagas.domain import (
    MAX_INPUT_BYTES,
    MAX_REQUEST_ID,
    Cause,
    Kind,
    State,
    StepState,
    check_id,
)
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from google.protobuf.message import Message as Proto

    from services.queueing.sagas.domain import Record, Saga, StepRun
    from services.runtime.request import Request

MAX_DEFINITION_BYTES = 256 * 1024
_EXACT = 2.0**53

_STATES = {
    State.RUNNING: sagas_pb2.SAGA_STATE_RUNNING,
    State.COMPENSATING: sagas_pb2.SAGA_STATE_COMPENSATING,
    State.SUCCEEDED: sagas_pb2.SAGA_STATE_SUCCEEDED,
    State.COMPENSATED: sagas_pb2.SAGA_STATE_COMPENSATED,
    State.STUCK: sagas_pb2.SAGA_STATE_STUCK,
}
_STATES_FROM = {number: state for state, number in _STATES.items()}
_CAUSES = {
    Cause.NONE: sagas_pb2.SAGA_CAUSE_UNSPECIFIED,
    Cause.FAILED: sagas_pb2.SAGA_CAUSE_FAILED,
    Cause.TIMED_OUT: sagas_pb2.SAGA_CAUSE_TIMED_OUT,
    Cause.CANCELLED: sagas_pb2.SAGA_CAUSE_CANCELLED,
}
_STEP_STATES = {state: sagas_pb2.SagaStepState.Value(f"SAGA_STEP_STATE_{state.name}") for state in StepState}
_KINDS = {kind: sagas_pb2.SagaEventType.Value(f"SAGA_EVENT_TYPE_{kind.name}") for kind in Kind}


def plain(struct: struct_pb2.Struct | struct_pb2.Value) -> Any:
    """The JSON value of a Struct or Value; whole numbers are integers again, as in the JSON that was sent."""
    return _whole(json_format.MessageToDict(struct))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return value


def _struct(value: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(value, struct_pb2.Struct())


def definition_from(message: sagas_pb2.SagaDefinition) -> Definition:
    """The domain's definition, with its defaults for what is absent.

    Raises:
        InvalidArgumentError: It is too large, or a policy is out of bounds.
    """
    if message.ByteSize() > MAX_DEFINITION_BYTES:
        raise InvalidArgumentError(f"at most {MAX_DEFINITION_BYTES} bytes", field="definition")
    steps = []
    for position, step in enumerate(message.steps):
        at = f"definition.steps[{position}]"
        undo = _action(step.compensation, f"{at}.compensation") if step.HasField("compensation") else None
        steps.append(Step(step.name, _action(step.action, f"{at}.action"), undo))
    return Definition(message.name, tuple(steps), dict(message.labels))


def _action(message: sagas_pb2.SagaAction, at: str) -> Action:
    default = Action()
    try:
        retry = retry_from(message.retry)
    except InvalidArgumentError as error:  # of a subscription, by its path
        raise InvalidArgumentError(error.message, field=f"{at}.retry") from None
    try:
        request = plain(message.rpc.request)
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidArgumentError(str(error), field=f"{at}.rpc.request") from None
    return Action(
        topic=message.topic,
        method=message.rpc.method,
        request=request,
        timeout_s=seconds(message.timeout) if message.HasField("timeout") else default.timeout_s,
        retry=retry,
    )


def definition_to(definition: Definition) -> sagas_pb2.SagaDefinition:
    """The proto's definition."""
    return sagas_pb2.SagaDefinition(
        name=definition.name,
        version=definition.version,
        steps=[
            sagas_pb2.SagaStep(
                name=step.name,
                action=_action_to(step.action),
                compensation=_action_to(step.compensation) if step.compensation else None,
            )
            for step in definition.steps
        ],
        labels=definition.labels,
        create_time=timestamp_to(definition.created),
        update_time=timestamp_to(definition.updated),
    )


def _action_to(action: Action) -> sagas_pb2.SagaAction:
    message = sagas_pb2.SagaAction(timeout=duration_to(action.timeout_s), retry=retry_to(action.retry))
    if action.topic:
        message.topic = action.topic
    else:
        message.rpc.method = action.method
        message.rpc.request.CopyFrom(_struct(action.request))
    return message


def order_from(message: sagas_pb2.StartSagaRequest, request: Request) -> Order:
    """What is to be started.

    Raises:
        InvalidArgumentError: A malformed id, or an input over the bound.
    """
    if message.id:
        check_id(message.id)
    if len(message.request_id) > MAX_REQUEST_ID:
        raise InvalidArgumentError(f"at most {MAX_REQUEST_ID} characters", field="request_id")
    try:
        value = plain(message.input)
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidArgumentError(str(error), field="input") from None
    if len(json_text(value)) > MAX_INPUT_BYTES:
        raise InvalidArgumentError(f"at most {MAX_INPUT_BYTES} bytes as JSON", field="input")
    caller = request.consumer or request.peer
    return Order(
        definition=message.definition,
        input=value,
        id=message.id,
        request=_digest(caller.encode(), message.request_id.encode()) if message.request_id else "",
        digest=_digest(_bytes(message)),
        trace=request.traceparent,
    )


def _bytes(message: Proto) -> bytes:
    return message.SerializeToString(deterministic=True)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def which_from(message: sagas_pb2.ListSagasRequest) -> Which:
    """The domain's choice of sagas."""
    return Which(message.definition, _STATES_FROM.get(message.state))


def saga_to(saga: Saga) -> sagas_pb2.Saga:
    """The proto's saga."""
    return sagas_pb2.Saga(
        id=saga.id,
        definition=saga.definition,
        version=saga.version,
        state=_STATES[saga.state],
        cause=_CAUSES[saga.cause],
        error_code=saga.problem.code,
        error=saga.problem.text,
        input=_struct(saga.input),
        steps=[
            _step_to(step, saga.pause_until if position == saga.position else 0.0)
            for position, step in enumerate(saga.steps)
        ],
        revision=saga.revision,
        create_time=timestamp_to(saga.created),
        update_time=timestamp_to(saga.updated),
        end_time=present_to(saga.ended),
    )


def _step_to(step: StepRun, again: float) -> sagas_pb2.SagaStepStatus:
    return sagas_pb2.SagaStepStatus(
        name=step.name,
        state=_STEP_STATES[step.state],
        attempts=step.attempts,
        compensation_attempts=step.undo_attempts,
        result=json_format.ParseDict(step.result, struct_pb2.Value()) if step.done else None,
        error_code=step.problem.code,
        error=step.problem.text,
        next_attempt_time=present_to(again),
    )


def event_to(record: Record) -> sagas_pb2.SagaEvent:
    """The proto's event."""
    return sagas_pb2.SagaEvent(
        revision=record.revision,
        time=timestamp_to(record.time),
        type=_KINDS[record.kind],
        state=_STATES[record.state],
        step=record.step,
        compensation=record.undo,
        attempt=record.attempt,
        error_code=record.problem.code,
        error=record.problem.text,
        elapsed=duration_to(record.took_s) if record.took_s else None,
    )
