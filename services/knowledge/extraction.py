"""Text of documents, as Markdown: text as it is, everything else through kreuzberg."""

from __future__ import annotations

import mimetypes
import re

from services.runtime.errors import InvalidArgumentError

PLAIN = frozenset({"text/plain", "text/markdown", "text/x-markdown", "text/x-rst"})
SUPPORTED = PLAIN | {
    "text/html",
    "application/xhtml+xml",
    "application/pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}
_ENDINGS = {".md": "text/markdown", ".markdown": "text/markdown", ".rst": "text/x-rst", ".log": "text/plain"}
_HTML = frozenset({"text/html", "application/xhtml+xml"})
_FRONT_MATTER = re.compile(r"\A---\n.*?(?=^# |\n\n(?!## ))", re.DOTALL | re.MULTILINE)


class ExtractionError(Exception):
    """A document that has no readable text; trying again would not help."""


def content_type_of(uri: str, given: str) -> str:
    """The media type of a document: as given, else by the URI's ending.

    Raises:
        InvalidArgumentError: It is of a type that cannot be read.
    """
    kind = given.split(";", maxsplit=1)[0].strip().lower()
    if not kind:
        ending = re.search(r"\.[A-Za-z0-9]+$", uri)
        kind = _ENDINGS.get(ending[0].lower(), "") if ending else "text/plain"
        kind = kind or mimetypes.guess_type(uri)[0] or ""
    if kind not in SUPPORTED:
        raise InvalidArgumentError(
            f"documents of type {kind or 'unknown'} cannot be read",
            field="content_type",
            reason="UNSUPPORTED_CONTENT_TYPE",
        )
    return kind


def extract(content: bytes, content_type: str) -> str:
    """The text of a document. Blocking: call it in a thread.

    Raises:
        ExtractionError: The document is damaged or has no text.
    """
    if content_type in PLAIN:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ExtractionError(f"not UTF-8 at byte {error.start}") from error
    else:
        text = _with_kreuzberg(content, content_type)
    text = text.replace("\r\n", "\n").replace("\0", "")
    if not text.strip():
        raise ExtractionError("the document has no text")
    return text


def _with_kreuzberg(content: bytes, content_type: str) -> str:
    import kreuzberg  # noqa: PLC0415 - heavy; the first document that needs it loads it

    page = content_type in _HTML
    if page:
        from services.knowledge.webpage import main_part  # noqa: PLC0415 - lxml, with the first page

        try:
            content = main_part(content)
        except ValueError as error:
            raise ExtractionError(str(error)) from error
    config = kreuzberg.ExtractionConfig(output_format="markdown", use_cache=False)
    try:
        result = kreuzberg.extract_bytes_sync(content, "text/html" if page else content_type, config)
    except kreuzberg.KreuzbergError as error:
        raise ExtractionError(str(error).split("\n", 1)[0][:300]) from error
    text = str(result.content)
    return _FRONT_MATTER.sub("", text, count=1) if page else text
