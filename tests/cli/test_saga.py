"""What `plexus saga` reads and prints; what it does is tested by the commands of the handbook."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.cli.saga import read_definition, read_input, short
from services.cli.saga_tables import event_line
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
