"""Pages of the documentation as data: fenced blocks, what is to be run, what is to come out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANDBOOK = ROOT / "examples" / "handbook"
PAGES = [ROOT / "README.md", *sorted(HANDBOOK.glob("*.md"))]
GENERATED = frozenset({"cli.md", "keys.md", "rest.md"})
"""Written by tools.handbook from the code's own words."""
RUN = frozenset({"bash", "console", "python"})
SHOWN = frozenset({"json", "text"})
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!--\s*not run:(.*?)-->\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        language: What follows the fence.
        text: What is inside.
        line: Line of the fence, from 1.
        not_run: The reason given for not running it; None if it is run.
        output: The block directly below, if that shows this one's output.
    """

    language: str
    text: str
    line: int
    not_run: str | None = None
    output: Block | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to run: a program in bash or Python, and what it is to print, if the page says so."""

    language: str
    text: str
    line: int
    expected: str | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A page with its blocks in order."""

    path: Path
    text: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return _FENCE.sub("", self.text)

    def steps(self) -> list[Step]:
        found: list[Step] = []
        for block in self.blocks:
            if block.language not in RUN or block.not_run is not None:
                continue
            if block.language == "console":
                found.extend(_console_steps(block))
                continue
            shown = block.output
            found.append(
                Step(
                    block.language,
                    block.text,
                    block.line,
                    expected=shown.text if shown else None,
                    as_json=shown is not None and shown.language == "json",
                )
            )
        return found


def read(path: Path) -> Page:
    text = path.read_text()
    blocks: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        language, content = match.groups()
        between = text[end : match.start()]
        mark = _MARK.search(between)
        block = Block(
            language,
            content,
            text.count("\n", 0, match.start()) + 1,
            not_run=mark[1].strip() if mark else None,
        )
        last = blocks[-1] if blocks else None
        if last and not between.strip() and last.language in {"bash", "python"} and language in SHOWN:
            blocks[-1] = Block(last.language, last.text, last.line, last.not_run, output=block)
        else:
            blocks.append(block)
        end = match.end()
    return Page(path, text, blocks)


def _console_steps(block: Block) -> list[Step]:
    """`$ command` and, until the next one, what it prints."""
    steps: list[Step] = []
    command: list[str] = []
    output: list[str] = []
    at = block.line

    def finish() -> None:
        if command:
            expected = "\n".join(output) if output else None
            steps.append(Step("bash", "\n".join(command), at, expected))

    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.startswith("$ "):
            finish()
            command, output, at = [line[2:]], [], number
        elif command and command[-1].endswith("\\") and not output:
            command.append(line)
        else:
            output.append(line)
    finish()
    return steps


def text_fits(expected: str, printed: str) -> bool:
    """Whether a text is what a page shows; `…` there stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def json_fits(expected: Any, given: Any) -> bool:
    """Whether a JSON value has at least what a page shows; the string `…` there stands for anything."""
    if expected == "…":
        return True
    if isinstance(expected, dict):
        return isinstance(given, dict) and all(
            key in given and json_fits(value, given[key]) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(given, list)
            and len(expected) == len(given)
            and all(json_fits(*pair) for pair in zip(expected, given, strict=True))
        )
    if isinstance(expected, str) and isinstance(given, str):
        return text_fits(expected, given)
    return bool(expected == given)


def fits(step: Step, printed: str) -> bool:
    """Whether a step printed what its page shows."""
    if step.expected is None:
        return True
    if step.as_json:
        try:
            return json_fits(json.loads(step.expected), json.loads(printed))
        except ValueError:
            return False
    return text_fits(step.expected, printed)
