"""Pages of one project's resources, and changes by mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.queueing.faces.pubsub_names import is_of, project
from services.runtime.errors import InvalidArgumentError
from services.runtime.paging import decode_token, encode_token, page_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_STEP = 1000


async def listed(read: Callable[..., Awaitable[list[Any]]], request: Any, kind: str) -> tuple[list[Any], str]:
    """A page of what is of the request's project, and the token of the next.

    Args:
        read: Lists all, given `limit` and `after`.
        request: With project, page_size and page_token.
        kind: Of what is listed, to tell page tokens apart.
    """
    wanted, limit = project(request.project), page_size(request.page_size)
    after = (decode_token(request.page_token, kind, wanted) or b"").decode()
    found: list[Any] = []
    while len(found) <= limit:
        read_now = await read(limit=_STEP, after=after)
        found += [entry for entry in read_now if is_of(entry.name, wanted)]
        if len(read_now) < _STEP:
            break
        after = read_now[-1].name
    token = encode_token(found[limit - 1].name.encode(), kind, wanted) if len(found) > limit else ""
    return found[:limit], token


def merge(present: Any, wanted: Any, mask: Any, mutable: Sequence[str]) -> None:
    """Take over into `present` what the mask names.

    Raises:
        InvalidArgumentError: It names nothing, or what cannot be changed.
    """
    if not mask.paths:
        raise InvalidArgumentError("must name what changes", field="update_mask")
    for path in mask.paths:
        if path.split(".")[0] not in mutable:
            raise InvalidArgumentError(f"{path!r} cannot be changed", field="update_mask")
    mask.MergeMessage(wanted, present, True, True)  # noqa: FBT003 - replaces messages and repeated fields
