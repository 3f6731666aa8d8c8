"""What a reader of a web page reads: its main part, without navigation, link lists and page furniture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lxml import etree, html

if TYPE_CHECKING:
    from lxml.html import HtmlElement

_NEVER = ("script", "style", "noscript", "template", "svg", "iframe", "nav", "form", "button", "head")
_FURNITURE = ("header", "footer", "aside")
"""Furniture of a page, but content where they stand inside its marked main part."""
_ROLES = frozenset({"navigation", "search", "contentinfo", "banner"})
_PERMALINKS = frozenset({"¶", "#", "🔗", "§"})
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_LISTS = ("ul", "ol", "table", "dl")
_LINKED = 0.6
"""Share of linked text from which on a list only leads elsewhere."""
_SHORT_LIST = 200
"""Characters below which a list is kept whatever it is made of."""
_LONG_DEFINITION = 200
"""Characters from which on a definition that can be linked to is a section of its own."""

_NAME = 80
"""Longest name of such a section, in characters."""


def main_part(content: bytes) -> bytes:
    """The main part of an HTML page as HTML.

    Links and images are gone, their texts stay. Lists of links (tables of contents, indexes) are dropped. A
    long definition with an anchor, as documentation of an API has them, becomes a section named after its
    term.

    Raises:
        ValueError: There is no HTML in it.
    """
    root = _parse(content)
    marked = root.xpath('//main | //*[@role="main"]')
    main: HtmlElement = marked[0] if marked else root
    _drop(main, _NEVER if marked else (*_NEVER, *_FURNITURE))
    _drop_link_lists(main)
    etree.strip_tags(main, "a", "img", "span")
    _definitions_to_sections(main)
    inner = etree.tostring(main, method="html", encoding="unicode", with_tail=False)
    return f'<html><head><meta charset="utf-8"></head><body>{inner}</body></html>'.encode()


def _parse(content: bytes) -> HtmlElement:
    try:
        content.decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # told by the page, or guessed
    parser = html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True)
    try:
        root: HtmlElement = html.document_fromstring(content, parser=parser)
    except etree.ParserError as error:
        raise ValueError(str(error)) from error
    return root


def _drop(main: HtmlElement, tags: tuple[str, ...]) -> None:
    for element in list(main.iter(etree.Element)):
        if element is main:
            continue
        role = element.get("role", "")
        furniture = element.tag in tags or role in _ROLES or element.get("hidden") is not None
        keeps_title = element.tag == "header" and element.find(".//h1") is not None
        permalink = element.tag == "a" and (element.text or "").strip() in _PERMALINKS
        if (furniture and not keeps_title) or permalink:
            element.drop_tree()


def _drop_link_lists(main: HtmlElement) -> None:
    for element in list(main.iter(*_LISTS)):
        size = len("".join(element.itertext()).strip())
        if size < _SHORT_LIST:
            continue
        linked = sum(len("".join(link.itertext()).strip()) for link in element.iter("a"))
        if linked >= _LINKED * size:
            element.drop_tree()


def _definitions_to_sections(main: HtmlElement) -> None:
    level = 1
    for element in list(main.iter(*_HEADINGS, "dl")):
        if element.tag != "dl":
            level = int(element.tag[1])
            continue
        depth = sum(1 for above in element.iterancestors("div") if above.get("data-section"))
        container = element.getparent()
        for term in list(element.iterchildren("dt")):
            description = term.getnext()
            if term.get("id") is None or description is None or description.tag != "dd":
                continue
            # What follows a section beside it is one too: it would be taken for a part of that otherwise.
            follows = container.get("data-sections") == str(level)
            if follows or len("".join(description.itertext())) >= _LONG_DEFINITION:
                container.set("data-sections", str(level))
                description.tag = "div"
                description.set("data-section", "1")
                _to_section(term, min(level + 1 + depth, 6))


def _to_section(term: HtmlElement, level: int) -> None:
    """Put a heading with the term's name before its full text."""
    text = " ".join("".join(term.itertext()).split())
    name, bracket, _ = text.partition("(")
    heading = etree.Element(f"h{level}")
    heading.text = f"{name.strip()}()" if bracket else text[:_NAME]
    whole = etree.Element("p")
    etree.SubElement(whole, "code").text = text
    tail = term.tail
    term.clear()
    term.tag, term.tail = "div", tail
    term.extend((heading, whole))
