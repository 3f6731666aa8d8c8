"""What the pages name exists: links, configuration keys, REST paths, RPCs, commands and their options."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml
from google.protobuf import descriptor_pool

from plexus.inference.v1 import inference_pb2
from plexus.knowledge.v1 import knowledge_pb2
from plexus.queueing.v1 import queueing_pb2
from plexus.search.v1 import search_pb2
from plexus.storage.v1 import storage_pb2
from plexus.vectors.v1 import vectors_pb2
from services.cli.explain import section_models
from services.cli.main import app
from services.runtime.config import Settings
from tests.docs.pages import GENERATED, PAGES, ROOT, RUN, Page, Step, fits, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

EVERY_PAGE = pytest.mark.parametrize("page", [read(path) for path in PAGES], ids=lambda page: page.name)
MARKED_AT_MOST = 12
"""Blocks that cannot run in a test are few: each is a claim that nothing checks."""
# Imported for their descriptors.
FILES = (inference_pb2, knowledge_pb2, queueing_pb2, search_pb2, storage_pb2, vectors_pb2)

_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_REST = re.compile(r"(?:\b(GET|PUT|POST|DELETE|PATCH) )?(?:https?://[\w.:]+|\$URL)?(/v1/[^\s`\"'\\?)]+)")
_CURL_METHOD = re.compile(r"-X (GET|PUT|POST|DELETE|PATCH)")
_RPC = re.compile(r"\b(Vectors|Storage|Search|Inference|Queueing|Knowledge)Service[./](\w+)")
_VARIABLE = re.compile(r"\bPLEXUS_([A-Z]+)__([A-Z0-9_]+)")
_COMMAND = re.compile(r"\bplexus ([a-z]+)((?: [^|;&`\n]+)?)")


def anchors(page: Page) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_lead_somewhere(page: Page) -> None:
    for target in _LINK.findall(page.prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.path.parent / path).resolve() if path else page.path
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(read(linked)), f"{page.name}: {target}"


def keys() -> set[str]:
    return {f"{name}.{key}" for name, model in section_models().items() for key in model.model_fields}


@EVERY_PAGE
def test_configuration_keys_exist(page: Page) -> None:
    known = keys()
    sections = "|".join(section_models())
    named = {
        code for code in _CODE.findall(page.prose) if re.fullmatch(rf"({sections})\.[a-z][a-z0-9_]+", code)
    }
    shown_as_wrong = re.compile(r"^.*\|\| true$|^plexus: .*$", re.MULTILINE)
    for section, key in _VARIABLE.findall(shown_as_wrong.sub("", page.text)):
        named.add(f"{section}.{key}".lower().removesuffix("_file"))
    assert named <= known, f"{page.name}: {sorted(named - known)}"


@EVERY_PAGE
def test_shown_configuration_files_are_valid(page: Page) -> None:
    for block in page.blocks:
        content = yaml.safe_load(block.text) if block.language == "yaml" else None
        if not isinstance(content, dict) or not set(content) <= set(section_models()):
            continue
        settings = Settings({})
        settings._values = content
        for name in content:
            settings.section(name, section_models()[name])


@cache
def rest_paths() -> list[tuple[re.Pattern[str], set[str]]]:
    document = json.loads((ROOT / "generated/openapi/plexus.openapi.json").read_text())
    found = []
    for path, operations in document["paths"].items():
        several = any(
            parameter.get("description") == "May contain slashes."
            for operation in operations.values()
            for parameter in operation.get("parameters", [])
        )
        last = path.rfind("{")
        pattern = ""
        for position, part in enumerate(re.split(r"(\{[\w.]+\})", path)):
            if position % 2 == 0:
                pattern += re.escape(part)
            else:
                whole = several and path.find(part) == last
                pattern += ".+" if whole else "[^/:]+"
        found.append((re.compile(pattern), {method.upper() for method in operations}))
    return found


def rest_uses(page: Page) -> Iterator[tuple[str | None, str]]:
    for code in _CODE.findall(page.prose):
        for method, path in _REST.findall(code):
            yield method or None, path
    for block in page.blocks:
        if block.language not in RUN:
            continue
        for line in block.text.replace("\\\n", " ").replace("$API/", "/v1/").splitlines():
            given = _CURL_METHOD.search(line)
            for method, path in _REST.findall(line):
                yield method or (given[1] if given else None), path


@EVERY_PAGE
def test_rest_paths_exist(page: Page) -> None:
    for method, path in rest_uses(page):
        found = [methods for pattern, methods in rest_paths() if pattern.fullmatch(path.rstrip(".,;:"))]
        assert found, f"{page.name}: {path}"
        if method:
            assert any(method in methods for methods in found), f"{page.name}: {method} {path}"


@EVERY_PAGE
def test_rpcs_exist(page: Page) -> None:
    pool = descriptor_pool.Default()
    for service, method in _RPC.findall(page.text):
        name = f"plexus.{service.lower()}.v1.{service}Service"
        assert method == "Stub" or method in pool.FindServiceByName(name).methods_by_name, (
            f"{page.name}: {name}.{method}"
        )


def command_of(words: list[str]) -> click.Command:
    command: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return command  # type: ignore[no-any-return]


@EVERY_PAGE
def test_commands_and_their_options_exist(page: Page) -> None:
    if page.path.name in GENERATED:
        return  # a docstring may speak of what comes
    texts = _CODE.findall(page.prose) + [block.text for block in page.blocks if block.language in RUN]
    for text in texts:
        for name, all_words in _COMMAND.findall(text.replace("\\\n", " ")):
            rest = all_words.partition(" -- ")[0]  # what follows is another program's
            try:
                command = command_of([name, *rest.split()])
            except KeyError as error:
                raise AssertionError(f"{page.name}: plexus {name}{rest}") from error
            options = {
                each for parameter in command.params for each in parameter.opts + parameter.secondary_opts
            }
            options |= set(command.context_settings.get("help_option_names", ["--help", "-h"]))
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", re.sub(r"\"[^\"]*\"", "", rest)):
                assert option in options, f"{page.name}: plexus {name}{rest}: {option}"


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    marked = [
        (page.name, block) for page in map(read, PAGES) for block in page.blocks if block.not_run is not None
    ]
    for name, block in marked:
        assert block.language in RUN, f"{name}:{block.line}: only what would be run is marked"
        assert len((block.not_run or "").split()) >= 4, f"{name}:{block.line}: say why it is not run"
    assert len(marked) <= MARKED_AT_MOST, [f"{name}:{block.line}" for name, block in marked]


def test_no_page_has_a_fence_without_a_language() -> None:
    for page in map(read, PAGES):
        for block in page.blocks:
            assert block.language, f"{page.name}:{block.line}"


@pytest.mark.parametrize(
    ("expected", "printed", "as_json", "right"),
    [
        ("a … c", "a b\nb c\n", False, True),
        ("a … c", "a b d", False, False),
        ('{"a": "…", "b": [1]}', '{"a": 3, "b": [1], "more": 0}', True, True),
        ('{"a": 1}', '{"b": 1}', True, False),
        ('{"a": [1]}', '{"a": [1, 2]}', True, False),
        ('{"a": 1}', "not JSON", True, False),
    ],
)
def test_what_is_shown_is_compared(expected: str, printed: str, as_json: bool, right: bool) -> None:
    assert fits(Step("bash", "", 1, expected, as_json=as_json), printed) is right
