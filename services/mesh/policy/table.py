"""The policies in force: the last good one of each service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.mesh.policy.domain import Document, Policy, PolicyError
from services.mesh.policy.parse import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger(__name__)


class PolicyTable:
    """Takes documents, keeps policies."""

    def __init__(self) -> None:
        self._documents: dict[str, Document] = {}
        self._policies: dict[str, Policy] = {}
        self.refusals: dict[str, str] = {}

    def of(self, service: str) -> Policy:
        """The policy of a service; the default one if it has none."""
        return self._policies.get(service) or Policy(service=service)

    def document(self, service: str) -> Document | None:
        """The text that is in force, if any."""
        return self._documents.get(service) if service in self._policies else None

    def services(self) -> list[str]:
        """Who has a policy of their own."""
        return sorted(self._policies)

    def replace(self, documents: Mapping[str, Document]) -> set[str]:
        """Take over a whole set of documents.

        A service whose document is not valid keeps its policy, and the reason is kept in `refusals`.

        Returns:
            Services whose policy is another now.
        """
        changed = set()
        for service in self._policies.keys() - documents.keys():
            del self._policies[service]
            self._documents.pop(service, None)
            changed.add(service)
        for service in self.refusals.keys() - documents.keys():
            del self.refusals[service]
        for service, document in documents.items():
            known = self._documents.get(service)
            if known is not None and known.text == document.text:
                self.refusals.pop(service, None)
                continue
            try:
                policy = parse(document, service=service)
            except PolicyError as error:
                if self.refusals.get(service) != error.message:
                    self.refusals[service] = error.message
                    log.exception("policy_refused", policy=service, reason=error.message)
                continue
            self.refusals.pop(service, None)
            self._documents[service] = document
            if policy != self._policies.get(service):
                self._policies[service] = policy
                changed.add(service)
        return changed
