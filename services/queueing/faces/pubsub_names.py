"""Google Pub/Sub's resource names and this service's."""

from __future__ import annotations

import re

from services.runtime.errors import InvalidArgumentError

DEFAULT_PROJECT = "plexus"
"""Whose topics and subscriptions have the same names here; others have their project before."""
DELETED = "_deleted-topic_"
_PREFIX = "projects."
_NAME = re.compile(
    r"projects/([a-z][a-z0-9-]{0,61})/(topics|subscriptions|snapshots)/([A-Za-z][A-Za-z0-9._-]*)"
)
_PROJECT = re.compile(r"projects/([a-z][a-z0-9-]{0,61})")


def _wrong(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "must be projects/{project}/{topics, subscriptions or snapshots}/{name},"
        " of letters, digits, dots, hyphens and underscores",
        field=field,
        reason="INVALID_RESOURCE_NAME",
    )


def own(name: str, kind: str, field: str) -> str:
    """The name here of a resource there.

    Raises:
        InvalidArgumentError: It is no name of this kind.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[2] != kind or found[3].startswith(_PREFIX):
        raise _wrong(field)
    return found[3] if found[1] == DEFAULT_PROJECT else f"{_PREFIX}{found[1]}.{found[3]}"


def theirs(name: str, kind: str) -> str:
    """The name there of a resource here."""
    if name.startswith(_PREFIX):
        project, _, rest = name.removeprefix(_PREFIX).partition(".")
        return f"projects/{project}/{kind}/{rest}"
    return f"projects/{DEFAULT_PROJECT}/{kind}/{name}"


def project(name: str) -> str:
    """The project of a listing.

    Raises:
        InvalidArgumentError: It is no project's name.
    """
    found = _PROJECT.fullmatch(name)
    if found is None:
        raise InvalidArgumentError("must be projects/{project}", field="project")
    return found[1]


def is_of(name: str, wanted: str) -> bool:
    """Whether a resource here is of a project."""
    return theirs(name, "topics").startswith(f"projects/{wanted}/")
