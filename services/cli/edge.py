"""What commands that ask the edge have in common: their options, and the connection that those describe."""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_type_hints

from services.cli.options import ConsumerOption, StateOption, TokenOption, UrlOption, state_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from services.cli.api import Api

P = ParamSpec("P")
R = TypeVar("R")
ServiceT = TypeVar("ServiceT")


@dataclass(frozen=True, slots=True)
class Edge:
    """Which edge a command asks, and as whom; services.cli.api says what stands for None."""

    state: Path | None
    url: str | None
    token: str | None
    consumer: str

    @contextmanager
    def api(self) -> Iterator[Api]:
        """The edge's REST API.

        Raises:
            PlexusError: No edge or no token can be found.
        """
        from services.cli.api import Api, bearer_token, edge_url  # noqa: PLC0415 - httpx is slow to import

        folder = state_folder(self.state)
        with Api(edge_url(folder, self.url), bearer_token(folder, self.token, self.consumer)) as api:
            yield api

    @contextmanager
    def open(self, service: Callable[[Api], ServiceT]) -> Iterator[ServiceT]:
        """A service of the API; see `api`."""
        with self.api() as api:
            yield service(api)


def asks_edge(consumer: str) -> Callable[[Callable[Concatenate[Edge, P], R]], Callable[..., R]]:
    """Give a command the options of an Edge, which becomes its first argument; typer sees the options alone.

    Args:
        consumer: Who asks when --consumer does not say.
    """
    options: dict[str, tuple[Any, Any]] = {
        "state": (StateOption, None),
        "url": (UrlOption, None),
        "token": (TokenOption, None),
        "consumer": (ConsumerOption, consumer),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    ]

    def decorate(function: Callable[Concatenate[Edge, P], R]) -> Callable[..., R]:
        hints = get_type_hints(function, include_extras=True)
        _, *own = inspect.signature(function).parameters.values()
        parameters = [*(each.replace(annotation=hints[each.name]) for each in own), *added]

        @functools.wraps(function)
        def command(**given: Any) -> R:
            edge = Edge(**{name: given.pop(name) for name in options})
            return function(edge, **given)  # type: ignore[call-arg]  # typer gives everything by name

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate
