"""Bounds on how much one request may hold."""

from __future__ import annotations

from services.runtime.errors import InvalidArgumentError


def check_batch(count: int, maximum: int, field: str) -> None:
    """Check the number of entries of a batch.

    Raises:
        InvalidArgumentError: It is empty or too large.
    """
    if not 1 <= count <= maximum:
        raise InvalidArgumentError(
            f"must have 1 to {maximum} entries, has {count}",
            field=field,
            reason="BATCH_SIZE",
            metadata={"maximum": str(maximum)},
        )


def check_count(count: int, maximum: int, field: str) -> None:
    """Check the number of entries of a list that may be empty.

    Raises:
        InvalidArgumentError: There are too many.
    """
    if count > maximum:
        raise InvalidArgumentError(f"at most {maximum}", field=field)
