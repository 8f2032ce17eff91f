"""One HTML page without anything that is loaded from elsewhere. Imports no jax.

Elements are those of `xml.etree`, which escapes every text and attribute when it writes them.
"""

import base64
import functools
import json
import pathlib
from collections.abc import Sequence
from xml.etree import ElementTree

from issgd_jax.extras import check_extra

Element = ElementTree.Element
_HERE = pathlib.Path(__file__).parent
# Nothing is fetched and nothing is sent, whatever a text or a library says. Vega compiles its expressions.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
_TEXT = "currentColor"
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _TEXT, "titleColor": _TEXT, "domainColor": "var(--line)", "tickColor": "var(--line)",
        "gridColor": "var(--line)", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "gridOpacity": 0.5,
    },
    "legend": {
        "labelColor": _TEXT, "titleColor": _TEXT, "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 400,
    },
}  # fmt: skip


def tag(name: str, /, *children: Element | str, **attributes: str) -> Element:
    """Returns an element.

    Args:
      name: of the element.
      children: elements and texts.
      attributes: a trailing underscore is left out, others are hyphens.

    Example:
      >>> ElementTree.tostring(tag("p", "a < b ", tag("b", "c"), class_="x"), encoding="unicode", method="html")
      '<p class="x">a &lt; b <b>c</b></p>'
    """
    element = ElementTree.Element(name, {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> Element:
    """Returns a table that scrolls inside itself; the first cell of a row is its header.

    Args:
      caption: of the table.
      header: of the columns.
      rows: of cells.
      numbers: whether all columns but the first stand to the right.
    """
    side = {"class_": "number"} if numbers else {}
    head = tag("tr", *(tag("th", text, scope="col", **(side if place else {})) for place, text in enumerate(header)))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell, **side) for cell in rest)) for first, *rest in rows
    ]
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scroll", role="region", tabindex="0", aria_label=caption)


def image(png: bytes, alt: str) -> Element:
    """Returns a picture that is part of the page."""
    return tag("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=alt)


def document(title: str, body: Sequence[Element], charts: dict[str, dict]) -> str:
    """Returns the text of the page.

    Args:
      title: of the page.
      body: its content.
      charts: {id of the element to draw in: chart, see `view.charts`}.

    Raises:
      MissingExtraError: the library of charts is not installed.
    """
    # No text of a chart can end the element that it stands in.
    content = json.dumps({"config": _CONFIG, "charts": charts}, allow_nan=False).replace("<", "\\u003c")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", _read("report.css")),
    ]
    scripts = [
        tag("script", content, type="application/json", id="charts"),
        tag("script", _vega(), type="module"),
        tag("script", _read("report.js"), type="module"),
    ]
    page = tag("html", tag("head", *head), tag("body", *body, *(scripts if charts else ())), lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def check() -> None:
    """Checks that pages can be made.

    Raises:
      MissingExtraError: the library of charts is not installed.
    """
    check_extra("a report", "vl_convert")


@functools.cache
def _vega() -> str:
    check()
    import vl_convert

    return vl_convert.javascript_bundle(None)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
