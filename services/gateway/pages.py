"""The edge's own pages: the OpenAPI file and the page that shows it, without any network."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from services.gateway.envoy.types import Pages
from services.runtime.config import project_file

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def pages() -> Pages:
    """Where the pages lie; the page has one inline script, which the policy names by its hash."""
    docs = Path(__file__).with_name("docs.html")
    scripts = _SCRIPT.findall(docs.read_text(encoding="utf-8"))
    if len(scripts) != 1:
        raise ValueError("docs.html must have exactly one inline script")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    return Pages(
        docs=docs, openapi=project_file("generated/openapi/plexus.openapi.json"), docs_script_sha256=digest
    )
