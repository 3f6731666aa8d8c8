"""From the text of a policy to the policy, with the line of every mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from services.mesh.policy.domain import MAX_BYTES, Policy, PolicyError
from services.runtime import yaml_lines

if TYPE_CHECKING:
    from services.mesh.policy.domain import Document


def parse(document: Document, *, service: str | None = None) -> Policy:
    """Read one policy.

    Args:
        document: The text and where it is from.
        service: Whose policy it has to be; default: whose it says.

    Raises:
        PolicyError: It is not valid; a problem a line, as `file:line: key: reason`.
    """
    if len(document.text) > MAX_BYTES:
        raise PolicyError(f"{document.origin}:1: longer than {MAX_BYTES} bytes")
    try:
        data, lines = yaml_lines.load(document.text)
    except yaml_lines.YamlError as error:
        raise PolicyError(f"{document.origin}:{error.line}: {error}") from error
    if not isinstance(data, dict):
        raise PolicyError(f"{document.origin}:1: must be a mapping")
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        problems = [_problem(document.origin, lines, dict(item)) for item in error.errors(include_url=False)]
        raise PolicyError("\n".join(problems)) from error
    if service is not None and policy.service != service:
        line = lines[("service",)]
        raise PolicyError(
            f"{document.origin}:{line}: service: must be {service!r}, which the file is named after"
        )
    return policy


def _problem(origin: str, lines: dict[yaml_lines.Path, int], item: dict[str, Any]) -> str:
    reason = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        reason = "no such key"
    # The path in the file: what stands there, and at most the one key that is missing.
    path: list[str | int] = []
    line = 1
    for step in item["loc"]:
        if (*path, step) in lines:
            path.append(step)
            line = lines[tuple(path)]
        elif item["type"] == "missing":
            path.append(step)
            break
    if item["type"] == "value_error" and not path:
        # A rule across keys names the key itself.
        head = reason.partition(":")[0].partition("[")[0].partition(".")[0]
        line = lines.get((head,), line)
    return f"{origin}:{line}: {_dotted(path)}: {reason}" if path else f"{origin}:{line}: {reason}"


def _dotted(path: list[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text
