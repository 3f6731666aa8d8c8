"""What `plexus schedule` makes of its arguments; the handbook's page runs it against a backend."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from services.cli import schedule, schedule_tables
from services.cli.main import app
from services.runtime.errors import InvalidArgumentError


def test_spans_and_times_become_what_json_has() -> None:
    assert [schedule.span(text) for text in ("90s", "15m", "1.5s", "7d", "0")] == [
        "90s",
        "900s",
        "1.5s",
        "604800s",
        "0s",
    ]
    assert schedule.moment("2026-12-24T18:00:00+01:00") == "2026-12-24T17:00:00Z"
    before = datetime.now(UTC)
    found = datetime.fromisoformat(schedule.moment("+10m"))
    assert before + timedelta(minutes=10) <= found <= datetime.now(UTC) + timedelta(minutes=10)


@pytest.mark.parametrize("text", ["2026-12-24", "tomorrow", "2026-12-24T18:00:00", "+soon", ""])
def test_a_time_without_a_zone_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        schedule.moment(text)


def test_when_becomes_fields() -> None:
    when = schedule.When(every="15m", anchor="2026-01-01T00:00:00Z", jitter="30s", max_firings=3)
    assert when.fields() == {
        "every": {"interval": "900s", "anchor": "2026-01-01T00:00:00Z"},
        "jitter": "30s",
        "maxFirings": 3,
    }
    when = schedule.When(
        cron="@daily", zone="Asia/Tokyo", start="2026-01-01T00:00:00Z", end="2027-01-01T00:00:00Z"
    )
    assert when.fields() == {
        "cron": {"expression": "@daily", "timeZone": "Asia/Tokyo"},
        "startTime": "2026-01-01T00:00:00Z",
        "endTime": "2027-01-01T00:00:00Z",
    }


def test_changes_name_parts_and_no_more() -> None:
    assert schedule.When(zone="Asia/Tokyo").changes() == {"cron": {"timeZone": "Asia/Tokyo"}}
    when = schedule.When(every="1h", jitter="0", start="none", end="2027-01-01T00:00:00Z", max_firings=0)
    changes = when.changes() | {"message": {"data": "", "attributes": {"kind": "poll"}}, "topic": "jobs"}
    assert changes["startTime"] is None
    assert schedule.paths(changes) == [
        "every.interval",
        "jitter",
        "maxFirings",
        "startTime",
        "endTime",
        "message.data",
        "message.attributes",
        "topic",
    ]
    with pytest.raises(InvalidArgumentError, match="in one way"):
        schedule.When(zone="Asia/Tokyo", every="1h").changes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what changes"),
        (["--cron", "@daily", "--anchor", "+1h"], "in one way"),
        (["--end", "someday"], "no time with a zone"),
        (["--missed", "perhaps"], "is none of skip, once, all"),
    ],
)
def test_a_change_that_says_nothing_or_nonsense_is_refused(arguments: list[str], message: str) -> None:
    command = ["schedule", "update", "s", "--url", "http://127.0.0.1:9", "--token", "t", *arguments]
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, InvalidArgumentError)
    assert message in found.exception.message


def test_a_message_is_made_of_its_parts() -> None:
    made = schedule.message(
        "é", ["kind=poll", "empty=", "a=b=c"], key="k", priority="high", ttl="1h", correlation_id="c"
    )
    assert made == {
        "data": base64.b64encode("é".encode()).decode(),
        "attributes": {"kind": "poll", "empty": "", "a": "b=c"},
        "orderingKey": "k",
        "correlationId": "c",
        "priority": "PRIORITY_HIGH",
        "ttl": "3600s",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --cron, --at and --every"),
        (["--cron", "@daily", "--every", "1h"], "one of --cron, --at and --every"),
        (["--every", "often"], "no span of time"),
        (["--at", "noon"], "no time with a zone"),
        (["--every", "1h", "--attribute", "kind"], "KEY=VALUE"),
        (["--every", "1h", "--priority", "urgent"], "is none of low, normal"),
    ],
)
def test_nonsense_is_refused_before_anything_is_asked(arguments: list[str], message: str) -> None:
    command = ["schedule", "create", "s", "--topic", "jobs", "--url", "http://127.0.0.1:9", *arguments]
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, InvalidArgumentError)
    assert message in found.exception.message


def test_tables_say_what_is_and_leave_out_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    bare = {"name": "s", "topic": "jobs", "state": "SCHEDULE_STATE_PAUSED", "revision": "1"}
    bare |= {"missedRuns": "MISSED_RUNS_ONCE", "at": "2026-12-24T18:00:00Z"}
    full = bare | {
        "every": {"interval": "900s"},
        "nextFireTime": "2026-12-24T18:00:00Z",
        "lastError": "no topic [jobs]",
        "firings": "7",
    }
    schedule_tables.schedules_table([bare, full])
    schedule_tables.schedule_lines(full)
    schedule_tables.runs_table(
        [{"number": "3", "dueTime": "2026-12-24T18:00:00Z", "manual": True, "state": "RUN_STATE_FAILED"}]
    )
    shown = capsys.readouterr().out
    for text in (
        "at 2026-12-24",
        "every 900s",
        "paused",
        "no topic [jobs]",
        "fired    7",
        "(by hand)",
        "failed",
    ):
        assert text in shown
