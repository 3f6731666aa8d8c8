"""SQLite files across upgrades."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from services.runtime.database import connect
from services.runtime.errors import FailedPreconditionError

if TYPE_CHECKING:
    from pathlib import Path

FIRST = "CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY);"
SECOND = "ALTER TABLE things ADD COLUMN size INTEGER NOT NULL DEFAULT 7;"
BROKEN = "CREATE TABLE others (name TEXT); INSERT INTO nowhere VALUES (1);"


def test_what_was_written_before_an_upgrade_is_there_after_it(tmp_path: Path) -> None:
    file = tmp_path / "x.sqlite"
    old = connect(file, [FIRST])
    old.execute("INSERT INTO things VALUES ('a')")
    old.close()
    for _ in range(2):
        new = connect(file, [FIRST, SECOND])
        assert new.execute("SELECT name, size FROM things").fetchall() == [("a", 7)]
        new.close()


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.sqlite"
    connect(file, [FIRST, SECOND]).close()
    with pytest.raises(FailedPreconditionError, match=r"x\.sqlite was written by a newer version"):
        connect(file, [FIRST])


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.sqlite"
    connect(file, [FIRST]).close()
    with pytest.raises(sqlite3.OperationalError):
        connect(file, [FIRST, BROKEN])
    again = connect(file, [FIRST, SECOND])
    assert again.execute("SELECT name FROM sqlite_master WHERE name = 'others'").fetchone() is None
    again.close()
