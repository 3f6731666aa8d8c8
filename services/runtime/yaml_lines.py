"""YAML with positions: plain data beside the line of every value, for errors that point to the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from pydantic import ValidationError

Path = tuple["str | int", ...]


class YamlError(ValueError):
    """The text is no YAML, or a mapping names a key twice.

    Attributes:
        line: Where, counted from 1.
    """

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


class _Constructor(yaml.SafeLoader):
    """Builds plain values from nodes that are composed already."""


def load(text: str) -> tuple[Any, dict[Path, int]]:
    """Parse `text`.

    Returns:
        The data, and for the path of each value (`("services", 0, "name")`) its line, counted from 1.

    Raises:
        YamlError: Syntax errors and repeated keys, with the line.
    """
    loader = _Constructor(text)
    lines: dict[Path, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {(): 1}
        return _value(loader, node, (), lines), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        text = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(text, 1 if mark is None else mark.line + 1) from error
    except yaml.YAMLError as error:
        raise YamlError(str(error)) from error
    finally:
        loader.dispose()


def _value(loader: _Constructor, node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, (*path, index), lines) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        data: dict[Hashable, Any] = {}
        for key_node, child in node.value:
            key = loader.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise YamlError(f"line {line}: the key {key!r} is not a text", line)
            if key in data:
                raise YamlError(f"line {line}: {key!r} is given twice", line)
            data[key] = _value(loader, child, (*path, key), lines)
            lines[(*path, key)] = line
        return data
    return loader.construct_object(node, deep=True)


def problems(origin: str, lines: dict[Path, int], error: ValidationError) -> list[str]:
    """What a model says against a file's data, a problem each, as `file:line: key: reason`.

    Args:
        origin: What the file is called.
        lines: From `load`.
        error: What validation raised.
    """
    return [_problem(origin, lines, dict(item)) for item in error.errors(include_url=False)]


def _problem(origin: str, lines: dict[Path, int], item: dict[str, Any]) -> str:
    reason = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        reason = "no such key"
    # The path in the file: what stands there, and at most the one key that is missing.
    path: list[str | int] = []
    line = 1
    for step in item["loc"]:
        if (*path, step) in lines:
            path.append(step)
            line = lines[tuple(path)]
        elif item["type"] == "missing":
            path.append(step)
            break
    if item["type"] == "value_error" and not path:
        # A rule across keys names the key itself.
        head = reason.partition(":")[0].partition("[")[0].partition(".")[0]
        line = lines.get((head,), line)
    return f"{origin}:{line}: {dotted(path)}: {reason}" if path else f"{origin}:{line}: {reason}"


def dotted(path: Sequence[str | int]) -> str:
    """A path as people write it: `services[0].name`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text
