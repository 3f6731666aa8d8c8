"""Write the pages of the handbook that are references: commands, REST, configuration keys.

    python -m tools.handbook           # write examples/handbook/{cli,rest,keys}.md
    python -m tools.handbook --check   # exit 1 if they differ from what the code says

The sources are typer's command tree, generated/openapi and the configuration models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from services.cli.explain import section_models
from services.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
HANDBOOK = ROOT / "examples" / "handbook"
OPENAPI = ROOT / "generated" / "openapi" / "plexus.openapi.json"
_NOTE = "<!-- Written by `python -m tools.handbook`; not by hand. -->\n"
_CLI = (
    "`plexus` is the one command. Each error is one line that says what to do; the exit code is 0 for "
    "success, 1 for a failure and 2 for wrong usage. `plexus COMMAND --help` shows the same as this page."
)
_REST = (
    "Every call of the public interface, by service; the edge serves the complete description, with the "
    "fields of each request and answer, at `/docs` and as OpenAPI at `/openapi.json`. A request needs a "
    "token of a consumer in one of the groups named. The RPC of the same name is the call's gRPC form."
)
_KEYS = (
    "Every key with its default. The variable of a key is `PLEXUS_`, its section, two underscores and its "
    "name, in upper case; see [configuration](configuration.md). Names end in their unit: `_s` is seconds, "
    "`_bytes` bytes."
)
_NUMBERS = {1024: "KiB", 1024**2: "MiB", 1024**3: "GiB"}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"
    yield ""


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _commands(inner, f"{path} {name}")
    else:
        yield path, command


def _metavar(argument: Any) -> str:
    name = argument.name.upper()
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def cli() -> str:
    """The page of commands."""
    lines = [
        "# Commands",
        "",
        _NOTE,
        _CLI,
        "",
    ]
    for path, command in _commands(typer.main.get_command(app), "plexus"):
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option"]
        usage = " ".join([path, "[OPTIONS]", *map(_metavar, arguments)])
        lines += [f"## {path}", "", command.help or "", "", "```text", usage, "```", ""]
        rows = [(f"`{each.name.upper()}`", each.help or "") for each in arguments]
        for each in options:
            names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
            default = each.default
            shown = default not in (None, False, (), "") and not each.secondary_opts
            rows.append((names, (each.help or "") + (f" Default `{default}`." if shown else "")))
        lines += _table(("argument or option", "meaning"), rows)
    return "\n".join(lines).rstrip() + "\n"


def rest() -> str:
    """The page of REST calls."""
    document = json.loads(OPENAPI.read_text())
    lines = [
        "# REST reference",
        "",
        _NOTE,
        _REST,
        "",
        "Beside these the edge itself answers `/healthz`, `/docs` and `/openapi.json`, without a token.",
        "",
    ]
    for tag in document["tags"]:
        lines += [f"## {tag['name']}", "", " ".join(tag["description"].split()), ""]
        rows = []
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] not in operation["tags"]:
                    continue
                what, _, errors = operation["summary"].partition(" Errors: ")
                rpc = operation["operationId"].replace("_", ".")
                groups = ", ".join(operation.get("x-plexus-groups", [])) or "none"
                rows.append((f"`{method.upper()} {path}`", f"`{rpc}`", what, errors or "", groups))
        lines += _table(("call", "RPC", "what it does", "errors", "groups"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        for size, unit in reversed(_NUMBERS.items()):
            if value >= size and value % size == 0:
                return f"`{value}` ({value // size} {unit})" if value >= 1024**2 else f"`{value}`"
    return f"`{json.dumps(value, default=str)}`"  # str shows a secret as asterisks


def keys() -> str:
    """The page of configuration keys."""
    lines = [
        "# Configuration keys",
        "",
        _NOTE,
        _KEYS,
        "",
    ]
    for name, model in section_models().items():
        purpose = re.sub(r"^Section `\w+`\.$", "", (model.__doc__ or "").strip().partition("\n")[0])
        lines += [f"## {name}", "", *([purpose, ""] if purpose else [])]
        rows = [
            (
                f"`{name}.{key}`",
                _default(field.get_default(call_default_factory=True)),
                field.description or "",
            )
            for key, field in model.model_fields.items()
        ]
        lines += _table(("key", "default", "meaning"), rows)
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"cli.md": cli, "rest.md": rest, "keys.md": keys}


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only report what would change")
    check: bool = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = HANDBOOK / name, make()
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text)
    if check and stale:
        sys.exit(f"the handbook is stale, run `make protos`: {', '.join(stale)}")
    print("the reference pages are up to date" if check else f"{len(stale)} reference pages rewritten")


if __name__ == "__main__":
    main()
