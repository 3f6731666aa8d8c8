"""What `plexus saga` reads and prints; what it does is tested by the commands of the handbook."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.cli.saga import read_definition, read_input, short
from services.cli.saga_tables import event_line, saga_table
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", ["", "[1]", "steps: []", "name: 5", "name: [", "name: a\nsteps: 2020-01-01"])
def test_a_file_that_is_no_definition_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "saga.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"saga\.yaml: "):
        read_definition(str(file))
    with pytest.raises(InvalidArgumentError, match="none"):
        read_definition(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"'])
def test_an_input_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--input"):
        read_input(text)


def test_an_event_is_one_line() -> None:
    event = {
        "revision": "12",
        "time": "T",
        "type": "SAGA_EVENT_TYPE_ATTEMPT_FAILED",
        "step": "charge",
        "compensation": True,
        "attempt": 2,
        "errorCode": "INTERNAL",
        "error": "no",
    }
    assert event_line(event) == "  12  T  undo charge #2: attempt failed  INTERNAL: no"
    assert short("SAGA_STATE_STUCK") == "stuck"


def test_a_saga_is_shown_whole_and_a_workers_error_is_no_control_of_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = {
        "errorCode": "INVALID_ARGUMENT",
        "error": "collection.dimension: [bold]must be 1 to 65536\x1b[2J",
    }
    step = {"name": "a-step-with-a-long-name", "state": "SAGA_STEP_STATE_FAILED", "attempts": 1, **error}
    saga_table(
        {"id": "s", "definition": "order", "version": 1, "state": "SAGA_STATE_COMPENSATED", "steps": [step]}
        | error
    )
    printed = capsys.readouterr().out
    assert printed.count("INVALID_ARGUMENT: collection.dimension: [bold]must be 1 to 65536\ufffd[2J") == 2
    assert "a-step-with-a-long-name" in printed
    assert "\x1b" not in event_line(
        {"revision": "1", "time": "T", "type": "SAGA_EVENT_TYPE_ATTEMPT_FAILED", **error}
    )
