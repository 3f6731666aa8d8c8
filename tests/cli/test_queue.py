"""`plexus queue` and `plexus worker`: what they refuse by themselves, what they show of hostile messages."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.cli.queue import Queues, pairs, readable, span
from services.cli.queue_tables import dead_letter_stats, deliveries, line, stats
from services.cli.worker import find_app
from services.runtime.errors import InvalidArgumentError, NotFoundError, PlexusError

if TYPE_CHECKING:
    from pathlib import Path


def _message(data: bytes, **fields: object) -> dict[str, object]:
    return {"messageId": "1", "data": base64.b64encode(data).decode(), **fields}


def test_content_is_text_where_it_is_text() -> None:
    assert readable(_message("größe".encode())) == {"messageId": "1", "data": "größe"}
    assert readable(_message(b"\xff")) == {"messageId": "1", "dataBase64": "/w=="}


def test_what_somebody_published_does_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = _message(b"\x1b[2J[red]gone", attributes={"\x1b]0;": "\x07"})
    deliveries([hostile])
    shown = capsys.readouterr().out
    assert "[red]gone" in shown
    assert not {"\x1b", "\x07"} & set(shown)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert not {"\x1b", "\x07"} & set(line(hostile))


def test_options_are_read_or_refused() -> None:
    assert pairs(["a=b=c", "d="], "--label") == {"a": "b=c", "d": ""}
    for wrong in ("a", "=b"):
        with pytest.raises(InvalidArgumentError, match="KEY=VALUE"):
            pairs([wrong], "--label")
    assert [span(seconds) for seconds in (0.0, 60.0, 0.25, 2592000.0)] == ["0s", "60s", "0.25s", "2592000s"]


class _Api:
    """Answers as the service does."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def call(self, _method: str, path: str, _body: object = None) -> Any:
        return self._answers[path.rpartition("/")[2]]


def test_counts_that_are_bounds_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"ready": "7", "leased": "0", "delayed": "0", "dead": "0", "unexamined": "5"}
    queues = Queues(_Api({"stats": counts}))  # type: ignore[arg-type]
    stats([{"subscription": "s", "topic": "t", **queues.stats("s")}])
    assert "≤ 7" in capsys.readouterr().out


def test_reasons_are_counted_and_control_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    answer: dict[str, Any] = {"total": "4", "reasons": {"rare": "1", "of\x1b[2J ten": "3"}}
    queues = Queues(_Api({"deadLetterStats": answer}))  # type: ignore[arg-type]
    dead_letter_stats(queues.dead_letter_stats("s"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["3", "1"]
    assert "\x1b" not in "".join(lines)


def test_what_deletes_for_good_wants_a_yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLEXUS_URL", "http://127.0.0.1:9")  # nothing is asked there
    monkeypatch.setenv("PLEXUS_TOKEN", "none")
    result = CliRunner().invoke(app, ["queue", "dlq", "purge", "work", "--state", str(tmp_path)])
    assert isinstance(result.exception, InvalidArgumentError)
    assert "--yes" in result.exception.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["queue", "publish", "t", "x", "--priority", "urgent"], "'urgent' is none of low, normal"),
        (["queue", "subscriptions", "create", "s", "t", "--backoff", "1"], "'1' is none of immediate, fixed"),
        (["queue", "seek", "s"], "one of --time, --sequence and --snapshot"),
        (["queue", "seek", "s", "--time", "now", "--snapshot", "x"], "one of --time, --sequence"),
        (["queue", "seek", "s", "--time", "yesterday", "--yes"], "no time with a zone"),
        (["queue", "seek", "s", "--time", "now"], "--yes"),
    ],
)
def test_wrong_options_are_refused_in_the_words_of_the_command(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLEXUS_URL", "http://127.0.0.1:9")  # nothing is asked there
    monkeypatch.setenv("PLEXUS_TOKEN", "none")
    result = CliRunner().invoke(app, [*arguments, "--state", str(tmp_path)])
    assert isinstance(result.exception, InvalidArgumentError)
    assert said in result.exception.message


def test_a_worker_says_what_is_wrong_with_its_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue_test_shop.py").write_text(
        "import plexus.client\nempty = plexus.client.TaskApp('shop')\nother = 3\n"
        "full = plexus.client.TaskApp('full')\n@full.task()\ndef work() -> None: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert set(find_app("queue_test_shop:full").tasks) == {"work"}
    expected: dict[str, tuple[type[PlexusError], str]] = {
        "queue_test_shop": (InvalidArgumentError, "MODULE:APP"),
        "queue_test_shop:nothing": (NotFoundError, "has no 'nothing'"),
        "queue_test_shop:other": (InvalidArgumentError, "is a int"),
        "queue_test_shop:empty": (InvalidArgumentError, "no tasks"),
        "queue_test_nowhere:app": (NotFoundError, "no module"),
    }
    for target, (kind, text) in expected.items():
        with pytest.raises(kind, match=text):
            find_app(target)
