"""From the text of a policy to the policy, with the line of every mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        raise PolicyError("\n".join(yaml_lines.problems(document.origin, lines, error))) from error
    if service is not None and policy.service != service:
        line = lines[("service",)]
        raise PolicyError(
            f"{document.origin}:{line}: service: must be {service!r}, which the file is named after"
        )
    return policy
