"""What a kind of saga does, and the rules that a definition must keep to be one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from services.queueing.resources import RetryPolicy, check_labels, check_name
from services.queueing.sagas.templates import Reference, references
from services.runtime.errors import InvalidArgumentError

MAX_STEPS = 64
MIN_TIMEOUT_S = 0.01
MAX_TIMEOUT_S = 24 * 3600.0
_STEP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_METHOD = re.compile(r"([a-z][a-z0-9_]*)/([A-Za-z][A-Za-z0-9]*)")


@dataclass(frozen=True, slots=True)
class Action:
    """Something that is done by a worker on a topic, or by a method of a service of the mesh.

    Attributes:
        topic: The worker's; empty for a method.
        method: `service/Method`; empty for a topic.
        request: The method's request as JSON, with references.
        timeout_s: How long an attempt may take.
        retry: When a failed attempt is repeated.
    """

    topic: str = ""
    method: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class Step:
    """An action, and what undoes it if anything must."""

    name: str
    action: Action
    compensation: Action | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """Steps that are done in this order.

    Attributes:
        name: Of the definition.
        steps: What is done.
        labels: For its owner's bookkeeping.
        version: 1 for the first; 0 before it is stored.
        created: When the name was, seconds since 1970.
        updated: When this version was, seconds since 1970.
    """

    name: str
    steps: tuple[Step, ...]
    labels: dict[str, str] = field(default_factory=dict)
    version: int = 0
    created: float = 0.0
    updated: float = 0.0

    def check(self) -> None:
        """Apply the rules that need nothing but the definition itself.

        Raises:
            InvalidArgumentError: It could not run.
        """
        check_name(self.name, "definition.name")
        check_labels(self.labels, "definition.labels")
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise InvalidArgumentError(f"needs 1 to {MAX_STEPS} steps", field="definition.steps")
        before: set[str] = set()
        for position, step in enumerate(self.steps):
            at = f"definition.steps[{position}]"
            if not _STEP_NAME.fullmatch(step.name):
                raise InvalidArgumentError(
                    "must be 1 to 63 letters, digits, hyphens and underscores, beginning with a letter",
                    field=f"{at}.name",
                )
            if step.name in before:
                raise InvalidArgumentError(
                    f"step {step.name!r} is there twice", field=f"{at}.name", reason="DUPLICATE_STEP"
                )
            _check_action(step.action, before, f"{at}.action")
            before.add(step.name)
            if step.compensation is not None:
                _check_action(step.compensation, before, f"{at}.compensation")


def _check_action(action: Action, known: set[str], at: str) -> None:
    if bool(action.topic) == bool(action.method):
        raise InvalidArgumentError("needs a topic or an rpc", field=at)
    if action.topic:
        check_name(action.topic, f"{at}.topic")
    elif not _METHOD.fullmatch(action.method):
        raise InvalidArgumentError("must be service/Method", field=f"{at}.rpc.method", reason="UNKNOWN_RPC")
    if not MIN_TIMEOUT_S <= action.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidArgumentError("must be 10 ms to 24 h", field=f"{at}.timeout")
    for reference in references(action.request, f"{at}.rpc.request"):
        _check_reference(reference, known)


def _check_reference(reference: Reference, known: set[str]) -> None:
    step = reference.step
    if step is not None and step not in known:
        raise InvalidArgumentError(
            f"{reference.text} refers to a step that is not done before this one",
            field=reference.field,
            reason="UNKNOWN_REFERENCE",
        )
