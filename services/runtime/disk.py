"""What a full disk is called, whichever library meets it."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from typing import TYPE_CHECKING

from services.runtime.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_AFTER_S = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether this error means that no space is left."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL


def full_disk() -> ResourceExhaustedError:
    """The one error of a full disk."""
    return ResourceExhaustedError("the disk is full", reason="DISK_FULL", retry_after_s=RETRY_AFTER_S)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full disk into ResourceExhaustedError with reason DISK_FULL; other errors pass as they are."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if is_full(error):
            raise full_disk() from error
        raise
