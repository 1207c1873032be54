"""Rows -> pictures: Vega-Lite, drawn beforehand as SVG, so that a page needs no script to show them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from peft_mask.cli.answer import plain

Rows = Sequence[Mapping[str, Any]]
# colors that stand for others: the page says what they are, by day and by night
_INK, _LINE, _SERIES = "#010101", "#020202", [f"#03010{place}" for place in range(6)]
_VARIABLES = {_INK: "--ink", _LINE: "--line"} | {color: f"--s{place}" for place, color in enumerate(_SERIES)}
_SVG = "{http://www.w3.org/2000/svg}"
_DRAWN = {"svg", "g", "path", "rect", "line", "text", "title", "circle", "defs", "clipPath", "linearGradient", "stop"}
_POINTED_AT = ("rect mark", "point", "bar")  # what stands for a row; a line stands for many
_BARE = {"labels": False, "ticks": False}  # an axis of which the title says enough


def svg(spec: Mapping[str, Any], name: str, title: str) -> str:
    """Draw a chart.

    Args:
        spec: Vega-Lite, with its data.
        name: of the chart, of letters and digits; it begins the ids inside, which are unique in a page then.
        title: what it shows, for who cannot see it.

    Returns:
        An element for HTML. It holds shapes and texts alone; every mark has a title, which shows where one points.

    Raises:
        ImportError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError("a report draws its charts with vl-convert: pip install 'peft-mask[report]'.") from error
    config = {**_CONFIG, "padding": {**_CONFIG["padding"], "left": _CONFIG["padding"]["left"] + _longest(spec)}}
    drawn = vl_convert.vegalite_to_svg({**spec, "config": config, "background": "transparent"}, allowed_base_urls=[])
    return _embedded(drawn, name, title)


def heat(rows: Rows, *, x: str, y: str, value: str, step: int = 24, most: float | None = None) -> dict[str, Any]:
    """Return a chart of cells.

    Args:
        rows: with a column for each of the following, and `said`, what a cell says when it is pointed at.
        x: name of the column along the axis.
        y: of that down the side.
        value: of that which colors, a share.
        step: pixels of a cell.
        most: the value of the last color; by default the largest.
    """
    angle = 0 if step < 40 else -30
    most = max((row[value] for row in rows), default=0.0) if most is None else most
    shown = ".2%" if most < 0.1 else ".0%"
    return {
        "data": {"values": [_plain(row) for row in rows]},
        "width": {"step": step},
        "height": {"step": step},
        "mark": {"type": "rect", "stroke": _LINE, "strokeWidth": 0.5},
        "encoding": {
            "x": {
                "field": x,
                "type": "nominal",
                "sort": None,
                "title": x,
                "axis": {"labelAngle": angle},
            },
            "y": {"field": y, "type": "nominal", "sort": None, "title": None},
            "color": {
                "field": value,
                "type": "quantitative",
                "title": value,
                "scale": {"scheme": "viridis", "domain": [0, most or 1]},  # or equal budgets would look unequal
                "legend": {"format": shown},
            },
            "description": {"field": "said"},
        },
    }


def table_of_pairs(rows: Rows) -> dict[str, Any]:
    """Return a chart of pairs, `a` against `b`, colored and labeled by their `agreement`."""
    chart = heat(rows, x="b", y="a", value="agreement", step=64)
    chart["encoding"]["x"]["title"] = None
    chart["encoding"]["x"]["axis"] = {"labelAngle": -30}
    cell = {"mark": chart.pop("mark"), "encoding": {name: chart["encoding"].pop(name) for name in ("color",)}}
    cell["encoding"]["color"]["scale"] = {"scheme": "viridis", "domain": [0, 1]}
    number = {
        "mark": {"type": "text", "fontSize": 13},
        "encoding": {
            "text": {"field": "agreement", "format": ".1%"},
            "color": {"condition": {"test": "datum.agreement > 0.6", "value": "black"}, "value": "white"},
        },
    }
    return chart | {"layer": [cell, number]}


def places(rows: Rows) -> dict[str, Any]:
    """Return a chart of matrices, one a `kind`, cells of `row` and `column` colored by `ratio`."""
    most = max((row["ratio"] for row in rows), default=1.0)
    return {
        "data": {"values": [_plain(row) for row in rows]},
        "columns": 3,
        "facet": {"field": "kind", "type": "nominal", "sort": None, "title": None},
        "resolve": {"axis": {"x": "independent", "y": "independent"}},
        "spec": {
            "width": 150,
            "height": 150,
            "mark": "rect",
            "encoding": {
                "x": {"field": "column", "type": "ordinal", "title": "inputs", "axis": _BARE},
                "y": {"field": "row", "type": "ordinal", "title": "outputs", "axis": _BARE},
                "color": {
                    "field": "ratio",
                    "type": "quantitative",
                    "title": "times the mean",
                    "scale": {"scheme": "viridis", "domain": [0, max(2.0, min(most, 8.0))], "clamp": True},
                },
                "description": {"field": "said"},
            },
        },
    }


def points(rows: Rows, *, y: str) -> dict[str, Any]:
    """Return a chart of points: `share` along the axis, `y` down the side, `of` by color."""
    return {
        "data": {"values": [_plain(row) for row in rows]},
        "width": 420,
        "height": {"step": 48, "for": "position"},
        "mark": {"type": "point", "filled": True, "opacity": 0.75, "size": 46},
        "encoding": {
            "x": {"field": "share", "type": "quantitative", "axis": {"format": ".0%"}, "title": "share of the zeros"},
            "y": {"field": y, "type": "nominal", "sort": None, "title": None},
            "yOffset": {"field": "of", "type": "nominal", "sort": None},
            "color": _colored("of"),
            "shape": {"field": "of", "type": "nominal", "sort": None, "title": None},
            "description": {"field": "said"},
        },
    }


def lines(rows: Rows, *, x: str, y: str, of: str | None = None, percent: bool = False) -> dict[str, Any]:
    """Return a chart of lines: `y` over `x`, a line each `of`."""
    chart: dict[str, Any] = {
        "data": {"values": [_plain(row) for row in rows]},
        "width": 420,
        "height": 200,
        "mark": {"type": "line", "point": {"size": 22}, "strokeWidth": 2},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "title": x, "axis": {"tickMinStep": 1}},
            "y": {
                "field": y,
                "type": "quantitative",
                "title": y,
                "scale": {"zero": False},
                "axis": {"format": ".1%" if percent else "~g"},
            },
            "color": {"value": _SERIES[0]} if of is None else _colored(of),
            "description": {"field": "said"},
        },
    }
    if of is not None:
        chart["encoding"]["color"]["legend"] = {"orient": "bottom", "columns": 1}  # beside it, pairs would find no room
        chart["encoding"]["shape"] = {"field": of, "type": "nominal", "sort": None, "legend": None}
    return chart


def bars(rows: Rows, *, x: str, y: str, of: str | None = None) -> dict[str, Any]:
    """Return a chart of bars across: `x` long, one each `y`, beside one another by `of`."""
    beside = {} if of is None else {"yOffset": {"field": of, "type": "nominal", "sort": None}}
    return {
        "data": {"values": [_plain(row) for row in rows]},
        "width": 420,
        "height": {"step": 26 if of is None else 34, "for": "position"},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "title": x, "axis": {"format": "~s"}},
            "y": {"field": y, "type": "nominal", "sort": None, "title": None},
            "color": {"value": _SERIES[0]} if of is None else _colored(of),
            "description": {"field": "said"},
            **beside,
        },
    }


def _longest(spec: Mapping[str, Any]) -> int:
    """Letters of the longest name down the side: a font in place of the chart's may be a pixel a letter wider."""
    down = spec.get("encoding", {}).get("y", {})
    if down.get("type") != "nominal":
        return 0
    return min(max((len(str(row[down["field"]])) for row in spec["data"]["values"]), default=0), 60)


def _colored(field: str) -> dict[str, Any]:
    return {"field": field, "type": "nominal", "sort": None, "title": None, "scale": {"range": _SERIES}}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are printable. None is cut: two that begin alike would become one; axes and legends cut."""
    return {key: plain(value) if isinstance(value, str) else value for key, value in row.items()}


def _embedded(drawn: str, name: str, title: str) -> str:
    """The picture for a page: colors by the page's names, ids of its own, a title for each mark, and nothing active."""
    for color, variable in _VARIABLES.items():
        drawn = drawn.replace(f'"{color}"', f'"var({variable})"')
    root = ET.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", " ", drawn))
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag.removeprefix(_SVG) not in _DRAWN:
                parent.remove(child)
    for element in root.iter():
        label = element.attrib.pop("aria-label", None)
        if label and element.get("aria-roledescription") in _POINTED_AT:
            ET.SubElement(element, f"{_SVG}title").text = label
        for attribute, value in [*element.attrib.items()]:
            if attribute.startswith(("on", "aria", "role")) or "href" in attribute:
                del element.attrib[attribute]
            elif attribute == "id":
                element.set("id", f"{name}-{value}")
            elif value.startswith("url(#"):
                element.set(attribute, value.replace("url(#", f"url(#{name}-"))
    root.set("role", "img")
    root.set("aria-label", title)
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    return ET.tostring(root, encoding="unicode")


_TEXT = {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_CONFIG: dict[str, Any] = {
    "font": "Arial, Liberation Sans, sans-serif",  # as wide where it is shown as where it was measured
    "padding": {"left": 12, "right": 12, "top": 5, "bottom": 5},
    "axis": {**_TEXT, "gridColor": _LINE, "domainColor": _LINE, "tickColor": _LINE, "labelLimit": 320},
    # without room for the last name it is left out, in place of being moved over that before it
    "axisQuantitative": {"labelFlush": False, "labelOverlap": True, "labelSeparation": 6, "titlePadding": 10},
    "legend": {**_TEXT, "labelLimit": 420, "gradientStrokeColor": _LINE},
    "header": {**_TEXT, "labelLimit": 200},
    "text": {"color": _INK},
    "view": {"stroke": "transparent"},
}
