"""The command as a user types it, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from services.cli.durations import per_second, seconds
from services.cli.models import fetch_missing
from services.gateway.credentials import CredentialStore
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-c", "from services.cli.main import main; main()"]


def plexus(state: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
    return subprocess.run(
        [*COMMAND, *arguments],
        env=inherited | {"PLEXUS_STATE": str(state)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not result.stdout
    return result.stderr


@pytest.mark.parametrize("command", [("status",), ("down",), ("status", "--json")])
def test_commands_for_a_running_plexus_say_in_one_line_how_to_start_it(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert "plexus up" in one_line(plexus(tmp_path, *command))


def test_up_on_a_taken_port_says_in_one_line_how_to_take_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "--port" in one_line(plexus(tmp_path, "up", "--port", str(port)))
        assert "--port" in one_line(plexus(tmp_path, "up", PLEXUS_GATEWAY__PORT=str(port)))


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    assert plexus(tmp_path, "up", "--port", "0").returncode == 2
    assert plexus(tmp_path, "fly").returncode == 2


@pytest.mark.parametrize(
    "words", [("fly",), ("up", "--port", "0"), ("ingest",), ("models", "fly"), ("status", "--fast")]
)
def test_wrong_usage_is_one_line_that_names_the_help(tmp_path: Path, words: tuple[str, ...]) -> None:
    result = plexus(tmp_path, *words)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--help" in result.stderr


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert plexus(tmp_path, "--version").stdout == f"plexus {version('plexus-mesh')}\n"


def test_logs_before_the_first_start_say_so(tmp_path: Path) -> None:
    result = plexus(tmp_path, "logs")
    assert (result.returncode, result.stdout) == (0, "")
    assert "plexus up" in result.stderr


def test_a_start_without_models_and_without_an_index_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    warnings: list[str] = []
    fetch_missing(tmp_path, warnings.append)
    (warning,) = warnings
    assert "plexus models pull" in warning


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['plexus', '--help']\n"
        "from services.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('grpc', 'pydantic', 'cryptography', 'httpx', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert result.stdout.endswith("[]\n")


def test_a_token_names_its_consumer_and_ends_when_asked(tmp_path: Path) -> None:
    credential = CredentialStore(tmp_path).ensure(["demo"])["demo"][0]
    result = plexus(tmp_path, "token", "--consumer", "demo", "--ttl", "90s")
    assert result.returncode == 0
    claims: dict[str, Any] = jwt.decode(result.stdout.strip(), str(credential.secret), algorithms=["HS256"])
    assert claims["sub"] == "demo"
    assert claims["exp"] - claims["iat"] == 90


def test_a_token_for_an_unknown_consumer_names_the_known_ones(tmp_path: Path) -> None:
    CredentialStore(tmp_path).ensure(["demo"])
    assert "demo" in one_line(plexus(tmp_path, "token", "--consumer", "nobody"))


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("2d", 172800)]
)
def test_spans_of_time(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "h", "-1s", "1w", "1 h 2"])
def test_nonsense_is_no_span_of_time(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="1h"):
        seconds(text)


@pytest.mark.parametrize(("text", "expected"), [("10/s", 10), ("30/m", 0.5), ("7.2/h", 0.002)])
def test_rates(text: str, expected: float) -> None:
    assert per_second(text) == expected


@pytest.mark.parametrize("text", ["", "10", "0/s", "-1/s", "10/d"])
def test_nonsense_is_no_rate(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="30/m"):
        per_second(text)


def test_config_names_each_values_source(tmp_path: Path) -> None:
    file = tmp_path / "plexus.yaml"
    file.write_text("telemetry: {log_level: debug}\n")
    result = plexus(tmp_path, "config", "--json", PLEXUS_CONFIG=str(file), PLEXUS_SERVER__DRAIN_S="3")
    rows = {row["key"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert rows["telemetry.log_level"] == ("debug", str(file))
    assert rows["server.drain_s"] == ("3.0", "PLEXUS_SERVER__DRAIN_S")
    assert rows["mesh.lease_s"] == ("10.0", "default")


def test_a_wrong_configuration_is_one_line_that_names_the_variable(tmp_path: Path) -> None:
    assert "PLEXUS_SERVER__DRAIN_S" in one_line(plexus(tmp_path, "config", PLEXUS_SERVER__DRAIN_S="soon"))


def test_doctor_finds_a_taken_port_and_a_wrong_configuration(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = plexus(
            tmp_path, "doctor", "--json", PLEXUS_GATEWAY__PORT=port, PLEXUS_SERVER__DRAIN_S="soon"
        )
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert not report["healthy"]
    failures = {finding["check"]: finding for finding in report["findings"] if finding["level"] == "failure"}
    assert port in failures["port"]["detail"]
    assert "PLEXUS_SERVER__DRAIN_S" in failures["configuration"]["detail"]
    assert all(finding["remedy"] for finding in (failures["port"], failures["configuration"]))


def test_one_process_runs_in_the_foreground_until_it_is_told_to_stop(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PLEXUS_")}
    command = [*COMMAND, "serve", "control", "--state", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            for line in running.stderr:
                if "ready" in line:
                    break
            refused = one_line(plexus(tmp_path, "serve", "control"))
            assert "runs on" in refused
            running.terminate()
            running.stderr.read()
            assert running.wait(60) == 0
        finally:
            running.kill()
    assert "there are: control" in one_line(plexus(tmp_path, "serve", "nothing"))
